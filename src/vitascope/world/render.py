"""Scenes to frames.

B clips, T frames, H and W rows and columns, h and w those of a window around a subject. Positions in the frame are in
half frame heights from its middle (u right, v down); pixel (i, j) has its middle at v = (i + 0.5) 2 / H - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from vitascope.core.shapes import ClipFormat
from vitascope.world.backdrops import Backdrop, Floor, Layer, View, backdrop
from vitascope.world.camera import CameraPath, camera_path, focal_length, layer_transform, rest_scale, turn_shift
from vitascope.world.faces import MOUTH_EXTENT, MOUTH_Y, mouth_shape, paint_head, paint_mouth
from vitascope.world.motion import BOTTOM, ground_y, trajectory
from vitascope.world.scene import FACE, PLAIN_BACKGROUNDS, Scene, Subject
from vitascope.world.shapes2d import EXTENT, Local, Paint, paint_shape


@dataclass(frozen=True)
class Pose:
    """A subject as the camera sees it, one row a frame (a single row where nothing changes), on the CPU.

    centre (T, 2) and radius (T,) in half frame heights, angle (T,) in radians, stretch (T, 2).
    """

    centre: Tensor
    radius: Tensor
    angle: Tensor
    stretch: Tensor

    @property
    def num_rows(self) -> int:
        """Rows of the pose."""
        return len(self.radius)

    def every_frame(self, num_frames: int) -> Pose:
        """The same pose with a row for every frame."""
        rows = (num_frames if self.num_rows == 1 else -1, -1)
        return Pose(
            self.centre.expand(rows),
            self.radius.expand(rows[:1]),
            self.angle.expand(rows[:1]),
            self.stretch.expand(rows),
        )


@dataclass(frozen=True)
class Window:
    """Rows and columns that a subject is painted in: h x w px with the first at (top, left) of each row of a pose."""

    top: list[int]
    left: list[int]
    height_px: int
    width_px: int


def render(scenes: Sequence[Scene], fmt: ClipFormat, device: torch.device | str = "cpu") -> Tensor:
    """Frames (B, T, 3, H, W) uint8 of the scenes; they depend on the scenes and the format alone."""
    clips = torch.empty(len(scenes), fmt.num_frames, 3, fmt.height_px, fmt.width_px, dtype=torch.uint8, device=device)
    with torch.inference_mode():
        for clip, scene in zip(clips, scenes, strict=True):
            _render_into(clip, scene, fmt)
    return clips


def _render_into(clip: Tensor, scene: Scene, fmt: ClipFormat) -> None:
    """Paint one scene into `clip` (T, 3, H, W): what never changes once, the rest frame by frame."""
    path = camera_path(scene, fmt)
    still = scene.camera == "static" or scene.background in PLAIN_BACKGROUNDS
    canvas = paint_backdrop(backdrop(scene), _first(path) if still else path, fmt, clip.device)
    poses = [(subject, subject_pose(subject, path, fmt)) for subject in scene.subjects]
    while poses and len(canvas) == poses[0][1].num_rows == 1 and poses[0][0].shape != FACE:
        _paint_subject(canvas, *poses.pop(0), fmt)
    clip.copy_(canvas)
    for subject, pose in poses:
        if subject.motion == "bounces":
            _paint_shadow(clip, subject, pose, path, fmt)
        _paint_subject(clip, subject, pose, fmt)
        if subject.shape == FACE:
            _paint_mouth(clip, subject, pose, mouth_shape(subject, fmt), fmt)


def _first(path: CameraPath) -> CameraPath:
    return CameraPath(path.position[:1], path.rotation[:1], path.fov_deg[:1])


def pixel_axes(fmt: ClipFormat, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, float]:
    """u (W,) and v (H,) of the middles of the pixels, and the size of a pixel, in half frame heights."""
    px = 2.0 / fmt.height_px
    u = (torch.arange(fmt.width_px, device=device) + 0.5) * px - fmt.width_px / fmt.height_px
    return u, (torch.arange(fmt.height_px, device=device) + 0.5) * px - 1.0, px


# Backdrop


def paint_backdrop(drawing: Backdrop, path: CameraPath, fmt: ClipFormat, device: torch.device | str = "cpu") -> Tensor:
    """The backdrop as uint8 frames, (len(path), 3, H, W)."""
    canvas = torch.empty(len(path.fov_deg), 3, fmt.height_px, fmt.width_px, device=device)
    for layer in drawing.layers:
        rows, columns, view = layer_view(layer, path, fmt, device)
        if view.x.numel() and view.y.numel():
            colour, cover = layer.draw(view)
            if cover is None:
                canvas[:, :, rows, columns] = colour
            else:
                canvas[:, :, rows, columns].lerp_(colour, cover[:, None])
    if drawing.floor is not None:
        _paint_floor(canvas, drawing.floor, path, fmt)
    return canvas.add_(0.5).to(torch.uint8)


def layer_view(
    layer: Layer, path: CameraPath, fmt: ClipFormat, device: torch.device | str = "cpu"
) -> tuple[slice, slice, View]:
    """The rows and columns that a layer reaches in any frame, and its coordinates there."""
    u, v, px = pixel_axes(fmt)
    scale, shift = layer_transform(path, layer.depth)
    scale = (scale / rest_scale(layer.depth))[:, None]
    x, y = (u - shift[:, :1]) / scale, (v - shift[:, 1:]) / scale
    columns, rows = (
        _reached(x, layer.extent.left, layer.extent.right),
        _reached(y, layer.extent.top, layer.extent.bottom),
    )
    view = View(x[:, None, columns].to(device), y[:, rows, None].to(device), (px / scale)[:, None].to(device))
    return rows, columns, view


def _reached(coordinate: Tensor, low: float, high: float) -> slice:
    """The run of pixels (axis 1) whose coordinate lies in [low, high] in any frame, with one to spare at each end."""
    inside = ((coordinate >= low) & (coordinate <= high)).any(0).nonzero().flatten()
    if not len(inside):
        return slice(0, 0)
    return slice(max(0, int(inside[0]) - 1), int(inside[-1]) + 2)


def floor_rows(floor: Floor, path: CameraPath, fmt: ClipFormat, device: torch.device | str = "cpu") -> Tensor:
    """Distance from the camera to the floor at every row, (T, H), as far as its wall; the wall's where no floor is.

    A point of the floor at distance Z appears at v = f (y - cy) / Z + f tan(pitch).
    """
    _, v, _ = pixel_axes(fmt, device)
    turned = v - turn_shift(path)[:, 1:].to(device)
    height = (focal_length(path) * (floor.y - path.position[:, 1])).to(device)[:, None]
    wall = (floor.wall - path.position[:, 2]).to(device)[:, None]
    return torch.minimum(height / turned.clamp(min=1e-3), wall)


def _paint_floor(canvas: Tensor, floor: Floor, path: CameraPath, fmt: ClipFormat) -> None:
    """Lay the floor over the rows before the wall."""
    u, v, px = pixel_axes(fmt, canvas.device)
    scale, shift = layer_transform(path, floor.wall)
    foot = (scale * floor.y + shift[:, 1]).to(canvas.device)
    distance = floor_rows(floor, path, fmt, canvas.device)
    focal = focal_length(path).to(canvas.device)[:, None]
    first = max(0, min(fmt.height_px - 1, int((float(foot.min()) + 1.0) / px) - 1))
    per_unit = (distance / focal)[:, first:, None]
    x = path.position[:, 0].to(canvas.device).view(-1, 1, 1)
    x = x + (u - turn_shift(path)[:, :1].to(canvas.device))[:, None, :] * per_unit
    z = distance[:, first:, None] + path.position[:, 2].to(canvas.device).view(-1, 1, 1)
    cover = ((v[first:] - foot[:, None]) / (1.4 * px) + 0.5).clamp_(0.0, 1.0)
    colour = floor.draw(x, z, px * per_unit)
    canvas[:, :, first:].lerp_(colour, cover[:, None, :, None])


# Subjects


def subject_pose(subject: Subject, path: CameraPath, fmt: ClipFormat) -> Pose:
    """Where and how the camera sees the subject; one row if all frames are alike."""
    track = trajectory(subject, fmt)
    scale, shift = layer_transform(path, 0.0)
    columns = [scale[:, None] * track.position + shift, (scale * track.radius)[:, None], track.angle[:, None]]
    table = torch.cat([*columns, track.stretch], 1)
    if bool((table == table[:1]).all()):
        table = table[:1]
    return Pose(table[:, :2], table[:, 2], table[:, 3], table[:, 4:6])


def subject_reach(subject: Subject, pose: Pose) -> Tensor:
    """How far the subject reaches to the sides and up and down, (T, 2) in half frame heights."""
    return EXTENT[subject.shape] * pose.radius[:, None] * pose.stretch


def subject_window(centre: Tensor, reach: Tensor, fmt: ClipFormat) -> Window:
    """The smallest windows of one size around `centre` (T, 2) +- `reach` (T, 2), kept inside the frame."""
    px = 2.0 / fmt.height_px
    width = min(fmt.width_px, ceil(2.0 * float(reach[:, 0].max()) / px) + 3)
    height = min(fmt.height_px, ceil(2.0 * float(reach[:, 1].max()) / px) + 3)
    middle_x = (centre[:, 0] / px + fmt.width_px / 2).round()
    middle_y = (centre[:, 1] / px + fmt.height_px / 2).round()
    left = (middle_x - width // 2).clamp(0, fmt.width_px - width).int().tolist()
    top = (middle_y - height // 2).clamp(0, fmt.height_px - height).int().tolist()
    return Window(top, left, height, width)


def local_axes(
    pose: Pose, window: Window, fmt: ClipFormat, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, 1, w), y (T, h, 1) of a window's pixels in radii from the subject's centre, and the size of a pixel."""
    u, v, px = pixel_axes(fmt)
    columns = torch.tensor(window.left)[:, None] + torch.arange(window.width_px)
    rows = torch.tensor(window.top)[:, None] + torch.arange(window.height_px)
    x = (u[columns] - pose.centre[:, :1]) / (pose.radius * pose.stretch[:, 0])[:, None]
    y = (v[rows] - pose.centre[:, 1:]) / (pose.radius * pose.stretch[:, 1])[:, None]
    return x[:, None, :].to(device), y[:, :, None].to(device), (px / pose.radius)[:, None, None].to(device)


def paint_window(subject: Subject, pose: Pose, window: Window, fmt: ClipFormat, device: torch.device | str) -> Paint:
    """Colour and cover of the subject, of a face without its mouth, in its window."""
    local = _local(subject, pose, window, fmt, device)
    return paint_head(subject, local) if subject.shape == FACE else paint_shape(subject, local)


def _local(subject: Subject, pose: Pose, window: Window, fmt: ClipFormat, device: torch.device | str) -> Local:
    x, y, px = local_axes(pose, window, fmt, device)
    x, y = torch.broadcast_tensors(x, y)
    if subject.motion != "spins":
        return Local(x, y, x, y, px)
    cosine, sine = pose.angle.cos()[:, None, None].to(device), pose.angle.sin()[:, None, None].to(device)
    return Local(x, y, x * cosine + y * sine, y * cosine - x * sine, px)


def _paint_subject(canvas: Tensor, subject: Subject, pose: Pose, fmt: ClipFormat) -> None:
    window = subject_window(pose.centre, subject_reach(subject, pose), fmt)
    _blend(canvas, window, paint_window(subject, pose, window, fmt, canvas.device))


def _paint_mouth(canvas: Tensor, subject: Subject, pose: Pose, mouth: Tensor, fmt: ClipFormat) -> None:
    """The mouth (T, 2) moves by itself, so only a small window around it is painted anew in every frame."""
    pose = pose.every_frame(fmt.num_frames)
    down = torch.stack([-pose.angle.sin(), pose.angle.cos()], 1) * MOUTH_Y
    centre = pose.centre + down * pose.radius[:, None] * pose.stretch
    window = subject_window(centre, MOUTH_EXTENT * pose.radius[:, None] * pose.stretch, fmt)
    _blend(canvas, window, paint_mouth(_local(subject, pose, window, fmt, canvas.device), mouth.to(canvas.device)))


def _paint_shadow(canvas: Tensor, subject: Subject, pose: Pose, path: CameraPath, fmt: ClipFormat) -> None:
    """A soft dark ellipse where a bouncing subject will land, stronger and narrower the nearer the subject is."""
    pose = pose.every_frame(fmt.num_frames)
    scale, shift = layer_transform(path, 0.0)
    ground = scale * ground_y(subject) + shift[:, 1]
    centre = torch.stack([pose.centre[:, 0], ground], 1)
    gap = (ground - pose.centre[:, 1]) / pose.radius / BOTTOM[subject.shape] - 1.0
    spread = 0.75 + 0.12 * gap.clamp(min=0.0)
    strength = 0.55 / (1.0 + gap.clamp(min=0.0)) ** 1.2
    size = torch.stack([spread, torch.full_like(spread, 0.085)], 1) * pose.radius[:, None]
    window = subject_window(centre, 2.0 * size, fmt)
    flat = Pose(centre, torch.ones_like(spread), torch.zeros_like(spread), size)
    x, y, _ = local_axes(flat, window, fmt, canvas.device)
    cover = strength.to(canvas.device).view(-1, 1, 1) * torch.exp(-x * x) * torch.exp(-y * y)
    _blend(canvas, window, Paint(canvas.new_zeros(1, 3, 1, 1, dtype=torch.float32), cover[:, None]))


def _blend(canvas: Tensor, window: Window, paint: Paint) -> None:
    """Lay the paint over its window in every frame of `canvas` (T, 3, H, W) uint8."""
    colour = (paint.colour * paint.cover).add_(0.5)
    keep = 1.0 - paint.cover
    alike = len(window.top) == 1
    for frame in range(len(canvas)):
        row = 0 if alike else frame
        top, left = window.top[row], window.left[row]
        region = canvas[frame, :, top : top + window.height_px, left : left + window.width_px]
        region.copy_(torch.addcmul(colour[row], keep[row], region))
