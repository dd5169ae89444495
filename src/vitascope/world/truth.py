"""What is known exactly about a clip: who is where and how fast, when things happen, whose a pixel is, how it moves.

N subjects, T frames, H and W rows and columns. Pixel coordinates have x right and y down, (0, 0) at the upper left
corner of the frame, so that the first pixel's middle is at (0.5, 0.5). Everything is computed from the scene, nothing
is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitascope.core.shapes import ClipFormat
from vitascope.world.backdrops import Backdrop, Floor, backdrop
from vitascope.world.camera import CameraPath, camera_path, focal_length, layer_transform, turn_shift
from vitascope.world.motion import SubjectPath, trajectory
from vitascope.world.render import (
    Pose,
    floor_rows,
    layer_view,
    paint_window,
    pixel_axes,
    subject_pose,
    subject_reach,
    subject_window,
)
from vitascope.world.scene import Scene, Subject
from vitascope.world.speech import SpeechTimeline, speech_timeline


@dataclass(frozen=True)
class SubjectTruth:
    """One subject: its description, its path in the world, and its centre in the frame.

    position_px (T, 2); velocity_px (T, 2) in px a second, the camera's part in it (if it moves) by central differences;
    radius_px (T,). `speech` is the timeline of a face that speaks, None for all others.
    """

    subject: Subject
    path: SubjectPath
    pose: Pose
    position_px: Tensor
    velocity_px: Tensor
    radius_px: Tensor
    speech: SpeechTimeline | None


@dataclass(frozen=True)
class Truth:
    """Ground truth of one clip; see `ground_truth`. `impacts_s` holds the impacts of all subjects in order."""

    scene: Scene
    fmt: ClipFormat
    subjects: tuple[SubjectTruth, ...]
    camera: CameraPath
    impacts_s: tuple[float, ...]

    def attributes(self) -> dict[str, object]:
        """What a caption can say of the clip, in plain words, ready for JSON."""
        names = ("colour", "shape", "size", "motion")
        return {
            "subjects": [
                {name: getattr(truth.subject, name) for name in names} | {"syllables": list(truth.subject.syllables)}
                for truth in self.subjects
            ],
            "background": self.scene.background,
            "camera": self.scene.camera,
            "ambience": self.scene.ambience,
        }

    def masks(self) -> Tensor:
        """How much of each pixel shows each subject, (N, T, H, W) in [0, 1]; a later subject hides an earlier one."""
        shape = (len(self.subjects), self.fmt.num_frames, self.fmt.height_px, self.fmt.width_px)
        masks = torch.zeros(shape)
        for index, truth in enumerate(self.subjects):
            cover = _subject_cover(truth, self.fmt)
            masks[:index] *= 1.0 - cover
            masks[index] = cover
        return masks

    def flow(self) -> Tensor:
        """Where each pixel's thing goes next: displacement to the next frame in px, (T - 1, 2, H, W), x then y.

        The thing is the nearest subject that covers at least half of the pixel, else the backdrop's nearest layer that
        does. Mouths move with their heads, and shadows with what they lie on.
        """
        flow = _backdrop_flow(backdrop(self.scene), self.camera, self.fmt)
        for truth in self.subjects:
            shown = _subject_cover(truth, self.fmt)[:-1] > 0.5
            flow = torch.where(shown[:, None], _subject_flow(truth, self.fmt), flow)
        return flow


def ground_truth(scene: Scene, fmt: ClipFormat) -> Truth:
    """The truth about the clip that `render` and `synthesise` make of the scene in this format."""
    camera = camera_path(scene, fmt)
    subjects = tuple(_subject_truth(subject, camera, fmt) for subject in scene.subjects)
    impacts = sorted(time for truth in subjects for time in truth.path.impacts_s)
    return Truth(scene, fmt, subjects, camera, tuple(impacts))


def _subject_truth(subject: Subject, camera: CameraPath, fmt: ClipFormat) -> SubjectTruth:
    path = trajectory(subject, fmt)
    pose = subject_pose(subject, camera, fmt).every_frame(fmt.num_frames)
    px = 2.0 / fmt.height_px
    middle = torch.tensor([fmt.width_px / 2, fmt.height_px / 2])
    scale, shift = layer_transform(camera, 0.0)
    velocity = scale[:, None] * path.velocity
    if fmt.num_frames > 2:
        growth, drift = _rate(scale, fmt.fps), _rate(shift, fmt.fps)
        velocity = velocity + growth[:, None] * path.position + drift
    speech = speech_timeline(subject.syllables, fmt.duration_s) if subject.syllables else None
    return SubjectTruth(subject, path, pose, pose.centre / px + middle, velocity / px, pose.radius / px, speech)


def _rate(values: Tensor, fps: float) -> Tensor:
    """Change a second of values (T, ...), by central differences."""
    return torch.gradient(values, spacing=1.0 / fps, dim=0, edge_order=2)[0]


def _subject_cover(truth: SubjectTruth, fmt: ClipFormat) -> Tensor:
    """Cover (T, H, W) of a subject as if nothing hid it."""
    window = subject_window(truth.pose.centre, subject_reach(truth.subject, truth.pose), fmt)
    cover = paint_window(truth.subject, truth.pose, window, fmt, "cpu").cover[:, 0]
    full = torch.zeros(fmt.num_frames, fmt.height_px, fmt.width_px)
    for frame, (top, left) in enumerate(zip(window.top, window.left, strict=True)):
        full[frame, top : top + window.height_px, left : left + window.width_px] = cover[frame]
    return full


def _subject_flow(truth: SubjectTruth, fmt: ClipFormat) -> Tensor:
    """Displacement (T - 1, 2, H, W) in px of every pixel as if it were fixed to the subject.

    p' = c' + A' A^-1 (p - c), with c the centre and A the turn, size and stretch.
    """
    u, v, px = pixel_axes(fmt)
    pose = truth.pose
    size = pose.radius[:, None] * pose.stretch
    cosine, sine = pose.angle.cos(), pose.angle.sin()
    turn = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)
    shape = size[:, :, None] * turn
    carry = shape[1:] @ torch.linalg.inv(shape[:-1])
    x = u - pose.centre[:-1, :1]
    y = v - pose.centre[:-1, 1:]
    carry = carry - torch.eye(2)
    move = (pose.centre[1:] - pose.centre[:-1])[:, :, None, None]
    flow = carry[:, :, 0, None, None] * x[:, None, None, :] + carry[:, :, 1, None, None] * y[:, None, :, None]
    return (flow + move) / px


def _backdrop_flow(drawing: Backdrop, camera: CameraPath, fmt: ClipFormat) -> Tensor:
    """Displacement (T - 1, 2, H, W) in px of the backdrop: of each pixel's nearest solid layer, or of the floor."""
    u, v, px = pixel_axes(fmt)
    now = CameraPath(camera.position[:-1], camera.rotation[:-1], camera.fov_deg[:-1])
    flow = torch.zeros(fmt.num_frames - 1, 2, fmt.height_px, fmt.width_px)
    if fmt.num_frames < 2:
        return flow
    for layer in drawing.layers:
        rows, columns, view = layer_view(layer, now, fmt)
        if not (view.x.numel() and view.y.numel()):
            continue
        scale, shift = layer_transform(camera, layer.depth)
        ratio = (scale[1:] / scale[:-1])[:, None]
        step_x = (u[columns] - shift[:-1, :1]) * ratio + shift[1:, :1] - u[columns]
        step_y = (v[rows] - shift[:-1, 1:]) * ratio + shift[1:, 1:] - v[rows]
        step = torch.stack(torch.broadcast_tensors(step_x[:, None, :], step_y[:, :, None]), 1) / px
        cover = layer.draw(view)[1]
        part = flow[:, :, rows, columns]
        part.copy_(step if cover is None else torch.where((cover > layer.solid)[:, None], step, part))
    if drawing.floor is not None:
        _add_floor_flow(flow, drawing.floor, camera, now, fmt)
    return flow


def _add_floor_flow(flow: Tensor, floor: Floor, camera: CameraPath, now: CameraPath, fmt: ClipFormat) -> None:
    """Overwrite `flow` on the pixels of the floor: each is a point (X, Z) of it, seen again by the next camera."""
    u, v, px = pixel_axes(fmt)
    focal, turn = focal_length(camera), turn_shift(camera)
    distance = floor_rows(floor, now, fmt)
    wall = (floor.wall - now.position[:, 2])[:, None]
    x = now.position[:, :1, None] + (u - turn[:-1, :1])[:, None, :] * (distance / focal[:-1, None])[:, :, None]
    next_distance = distance + (camera.position[:-1, 2] - camera.position[1:, 2])[:, None]
    per_unit = (focal[1:, None] / next_distance.clamp(min=1e-3))[:, :, None]
    next_u = (x - camera.position[1:, :1, None]) * per_unit + turn[1:, :1, None]
    next_v = (floor.y - camera.position[1:, 1:2, None]) * per_unit + turn[1:, 1:, None]
    step = torch.stack([next_u - u, (next_v - v[:, None]).expand_as(next_u)], 1) / px
    flow.copy_(torch.where((distance < wall - 1e-4)[:, None, :, None], step, flow))
