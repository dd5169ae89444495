"""Which shape a subject has, whether it is a face, and whether its picture turns.

Shapes are told by their cover on a polar grid around the centre, in radii of the disc of equal area, against the cover
of the five outlines of the world on the same grid; the best rotation is found for each by circular correlation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitascope.evaluation.footage import Floats
from vitascope.evaluation.prototypes import RADIUS, Prototype, prototypes
from vitascope.evaluation.regions import box_blur, fill_holes, grow
from vitascope.evaluation.subjects import SubjectTrack
from vitascope.world.scene import COLOURS, FACE, SHAPES, Subject

NUM_ANGLES = 120
RADII = np.linspace(0.05, 1.75, 28)
"""Polar grid, in radii of the disc of equal area; the tips of a star lie at 1.6."""
_BLURS_PX = (0, 3, 5)
SHARPNESS = 2.0
_MARK_BRIGHT = 0.4
"""Brightness of the mark of a spinning ball or ring, as a share of its colour."""
NO_SHAPE = "none"
FARTHEST = 0.35
"""Disagreement (share of the area) with the nearest shape beyond which a subject has none of the five shapes."""
_CROP = 33
"""Samples a side of the picture of a subject, which spans +- 1 radius of the outline."""


def polar_cover(mask: Floats, centre_xy_px: tuple[float, float], radius_px: float) -> Floats:
    """Cover (28, 120) of a mask (H, W) on the polar grid around a centre (in px, pixel middles at + 0.5)."""
    angle = np.arange(NUM_ANGLES) * (2 * np.pi / NUM_ANGLES)
    x = centre_xy_px[0] + radius_px * RADII[:, None] * np.cos(angle)
    y = centre_xy_px[1] + radius_px * RADII[:, None] * np.sin(angle)
    return sample(mask[..., None], x, y)[..., 0]


def sample(image: Floats, x_px: np.ndarray, y_px: np.ndarray) -> Floats:
    """Bilinear samples of an image (H, W, C) at places (...) in px; 0 outside."""
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0))).astype(np.float32)
    height, width = padded.shape[:2]
    x = np.clip(x_px + 0.5, 0, width - 1.001)
    y = np.clip(y_px + 0.5, 0, height - 1.001)
    left, top = x.astype(np.int64), y.astype(np.int64)
    fx, fy = (x - left)[..., None], (y - top)[..., None]
    upper = padded[top, left] * (1 - fx) + padded[top, left + 1] * fx
    lower = padded[top + 1, left] * (1 - fx) + padded[top + 1, left + 1] * fx
    return (upper * (1 - fy) + lower * fy).astype(np.float32)


@dataclass(frozen=True)
class OutlineModel:
    """Polar cover of the five shapes, sharp, blurred and with the mark of spinning left out (4, 5, 28, 120)."""

    templates: Floats

    def distances(self, cover: Floats) -> Floats:
        """Area of disagreement of a cover (28, 120) with each shape (5,), as a share of the area: the least over
        rotations and variants."""
        weight = (RADII * np.gradient(RADII))[:, None]
        spectrum = np.fft.rfft(cover, axis=1)
        scale = weight.sum() * NUM_ANGLES * float((cover * weight).sum() / (weight.sum() * NUM_ANGLES) or 1.0)
        template = np.fft.rfft(self.templates, axis=-1)
        cross = np.fft.irfft((spectrum * np.conj(template) * weight).sum(-2), NUM_ANGLES).max(-1)
        total = (weight * (cover**2 + self.templates**2)).sum((-2, -1)) - 2 * cross
        return (total / scale).min(0).astype(np.float32)


def build_outline_model() -> OutlineModel:
    """Measure the five outlines on the polar grid, from the world's own paint."""
    painted = prototypes([Subject("white", shape) for shape in SHAPES])
    marked = prototypes([Subject("white", shape, motion="spins") for shape in SHAPES])
    blurred = [[box_blur(box_blur(each.cover, blur), blur) for each in painted] for blur in _BLURS_PX]
    soft = [[np.clip(SHARPNESS * (cover - 0.5) + 0.5, 0, 1) for cover in row] for row in blurred]
    soft.append([_unmarked(each) for each in marked])
    return OutlineModel(np.stack([[_centred_cover(cover) for cover in row] for row in soft]))


def _unmarked(painted: Prototype) -> Floats:
    """Cover of a white prototype less its dark mark, which before some backgrounds cannot be told from them."""
    bright = painted.rgb.mean(-1) / np.float32(max(COLOURS["white"]))
    return painted.cover * np.clip((bright - _MARK_BRIGHT) / 0.1, 0, 1)


def soft_cover(track: SubjectTrack, pixels: Floats, index: int) -> Floats:
    """How much of each pixel (H, W) of frame `index` is the subject, in [0, 1], from its colour and that around it.

    a = d_b / (d_b + d_s), with d_b the distance of the pixel's colour to the median colour around the subject and d_s
    that to the line from 0.6 to 1.15 of the subject's colour (its shades); then 4 (a - 0.5) + 0.5, clamped, so that
    blur around notches and holes, which a mask fills, counts little.
    """
    mask = track.mask[index]
    near = grow(mask, 3)
    around = grow(mask, 7) & ~near
    frame = pixels[index]
    behind = np.median(frame[around], axis=0) if around.any() else np.zeros(3, np.float32)
    colour = track.rgb[index]
    along = np.clip(frame @ colour / max(float(colour @ colour), 1.0), 0.6, 1.15)
    to_subject = np.linalg.norm(frame - along[..., None] * colour, axis=-1)
    to_behind = np.linalg.norm(frame - behind, axis=-1)
    share = to_behind / np.maximum(to_behind + to_subject, 1e-3)
    return (np.clip(SHARPNESS * (share - 0.5) + 0.5, 0, 1) * near).astype(np.float32)


def _centred_cover(cover: Floats) -> Floats:
    area = float(cover.sum())
    rows, columns = np.indices(cover.shape) + 0.5
    centre = (float((cover * columns).sum() / area), float((cover * rows).sum() / area))
    return polar_cover(cover, centre, float(np.sqrt(area / np.pi)))


def classify_shape(track: SubjectTrack, pixels: Floats, model: OutlineModel) -> tuple[str, Floats]:
    """The shape of a subject, and its mean distance to each of the five (5,).

    Frames in which it is whole count (all, where it never is); "none" when it is far from all five. Where the upper
    half is nearer to a drawn face than to a plain ball of its colour, it is a face.
    """
    frames = np.nonzero(track.whole if track.whole.any() else track.present)[0]
    if not len(frames):
        return NO_SHAPE, np.full(len(SHAPES), np.nan, np.float32)
    per_frame = np.stack([model.distances(_centred_cover(soft_cover(track, pixels, i))) for i in frames.tolist()])
    distances = np.median(per_frame, axis=0)
    if distances.min() > FARTHEST:
        return NO_SHAPE, distances
    nearest = SHAPES[int(np.argmin(distances))]
    if nearest != "ring" and is_face(track, pixels, frames):
        return FACE, distances
    return nearest, distances


def _hulls(track: SubjectTrack, frames: np.ndarray) -> list[tuple[float, float, float]]:
    """Centre and radius, in px, of the filled mask in the given frames."""
    found = []
    for index in frames:
        filled = fill_holes(track.mask[index])
        area = float(filled.sum())
        ys, xs = np.nonzero(filled)
        found.append((float(xs.mean()) + 0.5, float(ys.mean()) + 0.5, float(np.sqrt(area / np.pi))))
    return found


def crops(track: SubjectTrack, pixels: Floats, frames: np.ndarray, reach: float = 1.0) -> Floats:
    """Pictures (n, 33, 33, 3) of the subject in the given frames, +- `reach` radii of its filled mask."""
    grid = np.linspace(-reach, reach, _CROP)
    pictures = []
    for index, (x, y, radius) in zip(frames, _hulls(track, frames), strict=True):
        columns, rows = np.meshgrid(x + radius * grid, y + radius * grid)
        pictures.append(sample(pixels[index], columns, rows))
    return np.stack(pictures)


def is_face(track: SubjectTrack, pixels: Floats, frames: np.ndarray) -> bool:
    """Whether eyes are there: upper halves, compared with a painted face and a painted ball of the same colour."""
    face, ball = (_prototype_crop(Subject(track.colour, shape)) for shape in (FACE, "ball"))
    y, x = np.meshgrid(np.linspace(-1, 1, _CROP), np.linspace(-1, 1, _CROP), indexing="ij")
    pictures = crops(track, pixels, frames)
    eyes = (x * x + y * y < 0.72) & (y < 0.1)
    gaps = []
    for template in (face, ball):
        gaps.append(np.median(np.abs(pictures[:, eyes] - template[eyes]).mean((1, 2))))
    contrast = pictures[:, eyes].mean(-1).std(1)
    plain = ball[eyes].mean(-1).std()
    return bool(gaps[0] < gaps[1] and np.median(contrast) > 1.3 * plain)


def _prototype_crop(subject: Subject) -> Floats:
    """Picture (33, 33, 3) of a prototype, +- 1 radius."""
    rgb = prototypes([subject])[0].rgb
    place = len(rgb) / 2 * (1 + RADIUS * np.linspace(-1, 1, _CROP))
    return sample(rgb, *np.meshgrid(place, place))


def turning(track: SubjectTrack, pixels: Floats) -> float:
    """How much the picture of a subject changes while its place and size are taken out.

    Mean over the crop of the standard deviation over time of its luma, in levels of [0, 255]: near 0 for a subject that
    keeps its attitude, 10 and more for one that spins.
    """
    frames = np.nonzero(track.whole if track.whole.sum() > 3 else track.present)[0]
    if len(frames) < 4:
        return 0.0
    return float(crops(track, pixels, frames, reach=1.15).mean(-1).std(0).mean())
