"""Which way the camera moves, from how the backdrop and the subject drift.

T frames, H and W rows and columns. The upper and the lower part of the backdrop each get a uniform motion: rates tx, ty
(half frame heights a second, x right and y down) and s (growth of the logarithm of size a second). What every move does
to each backdrop is measured on the world's own renders; near and far parts differ in orbits and dollies, not in pans
and zooms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vitascope.core.shapes import ClipFormat
from vitascope.evaluation.fidelity import luma
from vitascope.evaluation.footage import Floats, Mask
from vitascope.evaluation.regions import grow
from vitascope.evaluation.subjects import SubjectTrack
from vitascope.world.camera import DOLLY_PER_S, PAN_PER_S, ZOOM_PER_S
from vitascope.world.render import render
from vitascope.world.scene import CAMERAS, DRAWN_BACKGROUNDS, Scene

BANDS = ((-1.0, 0.3), (0.55, 1.0))
"""Rows of the two parts, in half frame heights from the middle."""
NO_CAMERA = "none"
_WORK_PX = 64
_ITERATIONS = 6
_OUTLIER_LEVELS = 12.0
_PACES = np.linspace(0.5, 1.6, 23)
_PACE_SPREAD = 0.3
_SPREAD = np.array([0.05, 0.05, 0.035], np.float64)
"""Deviations of tx, ty and s that count as ordinary, ..."""
_SPREAD_SHARE = 0.15
"""... and what is added to them for every unit of the rate."""
_NUM_SEEDS = 2
_CALIBRATION = ClipFormat(_WORK_PX, _WORK_PX, num_frames=13)


@dataclass(frozen=True)
class Drift:
    """Rates (2, 3) of tx, ty, s a second of the backdrop's two parts, and of the subject (3,), nan without one."""

    backdrop: Floats
    subject: Floats


def backdrop_drift(frames: Tensor, foreground: Mask, fps: float) -> Floats:
    """Rates (2, 3) of tx, ty and s in both parts of frames (T, 3, H, W), `foreground` (T, H, W) left out.

    The motion that best carries every frame into the next one, the same for all of them: Gauss-Newton on brightness
    (Lucas and Kanade 1981) from coarse to fine, large residuals weighted down.
    """
    scale = _WORK_PX / frames.shape[-2]
    size = (_WORK_PX, max(1, round(frames.shape[-1] * scale)))
    image = functional.interpolate(luma(frames)[:, None], size, mode="area")
    free = 1 - functional.interpolate(torch.from_numpy(foreground)[:, None].float(), size, mode="area")
    rates = []
    for low, high in BANDS:
        rows = (torch.arange(_WORK_PX) + 0.5) * 2 / _WORK_PX - 1
        band = ((rows >= low) & (rows <= high)).float()[:, None]
        motion = torch.zeros(3)
        for level in (4, 2, 1):
            small, weight = functional.avg_pool2d(image, level), functional.avg_pool2d(free * band, level)
            motion = _refine(small, (weight > 0.99).float(), motion)
        rates.append(motion.numpy() * fps)
    return np.stack(rates).astype(np.float32)


def _refine(image: Tensor, weight: Tensor, motion: Tensor) -> Tensor:
    """Better rates a frame (3,) for images (T, 1, h, w), starting from `motion`."""
    before, after = image[:-1], image[1:]
    both = weight[:-1] * weight[1:]
    height, width = image.shape[-2:]
    px = 2 / height
    y = ((torch.arange(height) + 0.5) * px - 1).view(1, 1, -1, 1)
    x = ((torch.arange(width) + 0.5) * px - width / height).view(1, 1, 1, -1)
    for _ in range(_ITERATIONS):
        tx, ty, s = motion.tolist()
        # The point of `before` at (x, y) is at ((1 + s) x + tx, (1 + s) y + ty) in `after`.
        grid_x = ((1 + s) * x + tx) * height / width
        grid = torch.stack(torch.broadcast_tensors(grid_x, (1 + s) * y + ty), -1)[0]
        grid = grid.expand(len(after), -1, -1, -1)
        moved = functional.grid_sample(after, grid, padding_mode="border", align_corners=False)
        slope_y, slope_x = torch.gradient(moved, spacing=px, dim=(-2, -1))
        rest = before - moved
        inside = both * (grid.abs().amax(-1) < 1)[:, None]
        inside = inside / (1 + (rest / _OUTLIER_LEVELS) ** 2)
        columns = torch.stack([slope_x, slope_y, slope_x * x + slope_y * y], -1).reshape(-1, 3)
        weighted = columns * inside.reshape(-1, 1)
        normal = weighted.T @ columns
        normal = normal + torch.eye(3) * (1e-3 * normal.trace() / 3 + 1e-3)
        motion = motion + torch.linalg.solve(normal, weighted.T @ rest.reshape(-1))
        motion = motion.clamp(-0.2, 0.2)
    return motion


def subject_drift(track: SubjectTrack | None, fps: float) -> Floats:
    """Rates (3,) of tx, ty and s of a subject, by straight lines; nan where none is seen in four frames."""
    if track is None or track.present.sum() < 4:
        return np.full(3, np.nan, np.float32)
    used = track.whole if track.whole.sum() >= 4 else track.present
    time = np.nonzero(used)[0] / fps
    values = [track.centre[used, 0], track.centre[used, 1], np.log(np.maximum(track.radius[used], 1e-3))]
    return np.array([np.polyfit(time, value, 1)[0] for value in values], np.float32)


@dataclass(frozen=True)
class CameraModel:
    """Rates of both parts of every drawn backdrop under every move at its usual pace, (4, 11, 2, 3)."""

    rates: Floats

    def classify(self, drift: Drift, background: str) -> str:
        """The likeliest of CAMERAS; "none" where the background is not one of the drawn ones, before which alone a
        moving camera can be seen."""
        if background not in DRAWN_BACKGROUNDS:
            return NO_CAMERA
        expected = self.rates[DRAWN_BACKGROUNDS.index(background)]
        scores = [self._score(drift, expected[i], _subject_rates(name)) for i, name in enumerate(CAMERAS)]
        return CAMERAS[int(np.argmax(scores))]

    def _score(self, drift: Drift, backdrop: Floats, subject: np.ndarray) -> float:
        """Log likelihood of the drift, at the pace that suits it best."""
        best = -np.inf
        for pace in _PACES:
            mean = backdrop * pace
            spread = _SPREAD + _SPREAD_SHARE * np.abs(mean)
            score = -0.5 * ((pace - 1) / _PACE_SPREAD) ** 2
            score -= float((0.5 * ((drift.backdrop - mean) / spread) ** 2 + np.log(spread)).clip(max=25).sum())
            score += _subject_score(drift.subject - subject * pace)
            best = max(best, score)
        return best


def _subject_rates(camera: str) -> np.ndarray:
    """What a move does to a thing in the middle of the stage: tx, ty, s a second."""
    verb, _, way = camera.partition(" ")
    sign = {"left": -1.0, "up": 1.0, "down": -1.0, "out": -1.0, "backward": -1.0}.get(way, 1.0)
    if verb == "pans":
        return np.array([-sign * PAN_PER_S, 0, 0] if way in ("left", "right") else [0, sign * PAN_PER_S, 0])
    growth = {"zooms": ZOOM_PER_S, "dollies": DOLLY_PER_S}.get(verb, 0.0)
    return np.array([0, 0, sign * growth])


def _subject_score(gap: np.ndarray) -> float:
    """Log likelihood of a subject's drift beyond the camera's: most stay, others go anywhere. 0 without a subject."""
    if not np.isfinite(gap).all():
        return 0.0
    score = 0.0
    for value, near, far, share in zip(gap, (0.07, 0.07, 0.04), (0.4, 0.4, 0.4), (0.3, 0.3, 0.15), strict=True):
        close, wide = (np.exp(-0.5 * (value / width) ** 2) / width for width in (near, far))
        score += float(np.log((1 - share) * close + share * wide + 1e-6))
    return score


def measure_drift(frames: Tensor, tracks: list[SubjectTrack], fps: float) -> Drift:
    """Drift of the backdrop and of the largest subject of a clip (T, 3, H, W)."""
    foreground = np.zeros((len(frames), *frames.shape[-2:]), np.bool_)
    for track in tracks:
        foreground |= track.mask
    margin = max(2, round(frames.shape[-2] / 32))
    return Drift(backdrop_drift(frames, grow(foreground, margin), fps), subject_drift(next(iter(tracks), None), fps))


def build_camera_model() -> CameraModel:
    """Measure every move before every drawn backdrop (seconds of work)."""
    fmt = _CALIBRATION
    nothing = np.zeros((fmt.num_frames, fmt.height_px, fmt.width_px), np.bool_)
    table = np.zeros((len(DRAWN_BACKGROUNDS), len(CAMERAS), len(BANDS), 3), np.float32)
    for row, background in enumerate(DRAWN_BACKGROUNDS):
        for column, camera in enumerate(CAMERAS[1:], start=1):
            clips = render([Scene((), background, camera, seed=seed) for seed in range(_NUM_SEEDS)], fmt)
            table[row, column] = np.mean([backdrop_drift(clip, nothing, fmt.fps) for clip in clips], axis=0)
    return CameraModel(table)
