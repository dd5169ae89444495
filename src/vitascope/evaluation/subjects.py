"""Finding the subjects of a clip and following them.

T frames, H and W rows and columns. Places are in half frame heights from the middle of the frame (x right, y down), the
units in which the world speaks of its frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vitascope.evaluation.colours import ColourModel
from vitascope.evaluation.footage import Floats, Mask
from vitascope.evaluation.regions import box_blur, grow, label, shrink
from vitascope.world.scene import BACKGROUNDS, COLOURS

SMALLEST_RADIUS = 0.09
"""Smaller blobs (half frame heights, radius of the disc of equal area) are taken for stars, moons and noise."""
LONGEST = 1.6
"""Longer blobs (ratio of principal deviations) are clouds and the like: every shape is as wide as high."""
_MAX_FALSE_COLOURS = 3
NO_BACKGROUND = "none"
LEAST_SCORE = -9.5
"""Mean log density below which a picture shows none of the backgrounds; the world's own clips with the largest subjects
and a pass through the codec stay above -8.5, noise and other pictures below -11."""
SECOND_SHARE = 0.12
"""Least area of a second subject as a share of the first's."""
PRESENT_SHARE = 0.5
"""A second subject must be seen in this share of the frames."""


@dataclass(frozen=True)
class SubjectTrack:
    """One subject through the clip.

    mask (T, H, W); present (T,): seen in this frame; whole (T,): and clear of the frame's edge; centre (T, 2), radius
    (T,) of the disc of equal area and bottom (T,) in half frame heights, nan where absent; rgb (T, 3) median colour.
    """

    colour: str
    mask: Mask
    present: Mask
    whole: Mask
    centre: Floats
    radius: Floats
    bottom: Floats
    rgb: Floats


def find_background(pixels: Floats, model: ColourModel) -> str:
    """The likeliest background of pixels (T, H, W, 3), by colour alone: the highest mean log density. "none" where
    that is too low for any of them."""
    scores = model.background_scores(pixels)
    return BACKGROUNDS[int(np.argmax(scores))] if scores.max() >= LEAST_SCORE else NO_BACKGROUND


def find_subjects(pixels: Floats, background: str, model: ColourModel) -> list[SubjectTrack]:
    """The one or two subjects in pixels (T, H, W, 3) before `background`; largest first, none if nothing stands out.

    Blobs of pixels that are likelier paint than background vote for a palette colour; the two colours with the most
    pixels over the clip are followed, each as the largest blob of its colour in every frame. Two blobs of one colour
    are followed as two subjects where they stay apart.
    """
    if background == NO_BACKGROUND:
        return []
    height = pixels.shape[1]
    smallest_px = np.pi * (SMALLEST_RADIUS * height / 2) ** 2
    soft = box_blur(model.foreground(pixels, background).clip(-8, 8), 1 if height >= 64 else 0)
    mask = _opened(soft > 0, max(1, round(height / 128)))
    blobs, count = label(mask)
    area = np.bincount(blobs.ravel(), minlength=count + 1)
    area[0] = 0
    large = np.nonzero(area >= smallest_px)[0]
    if not len(large):
        return []
    kept = np.isin(blobs, large)
    likeliest = model.likeliest_colour(pixels)
    first_guess = tracks = _tracks_by_colour(pixels, kept, likeliest, smallest_px, model)
    for _ in range(_MAX_FALSE_COLOURS):
        false = [list(COLOURS).index(track.colour) for track in tracks if _elongation(track.mask) > LONGEST]
        if not false or not tracks:
            break
        kept = _opened(kept & ~np.isin(likeliest, false), 1)
        tracks = _tracks_by_colour(pixels, kept, likeliest, smallest_px, model) if kept.any() else []
    tracks = tracks or first_guess
    return sorted(tracks, key=lambda track: -track.mask.sum())


def _tracks_by_colour(
    pixels: Floats, kept: Mask, likeliest: np.ndarray, smallest_px: float, model: ColourModel
) -> list[SubjectTrack]:
    names = list(COLOURS)
    votes = _votes_per_frame(likeliest, kept)
    first = int(np.argmax(votes.sum(0)))
    partner = _second_colour(votes, _blob_areas(likeliest, kept), first, smallest_px)
    if partner is None:
        return [follow(part, names[first], pixels) for part in _largest_blobs(kept, smallest_px)]
    nearer = box_blur(model.colour_odds(pixels, first, partner).clip(-6, 6), 2) > 0
    tracks = []
    for colour, own in ((first, kept & nearer), (partner, kept & ~nearer)):
        for part in _largest_blobs(_opened(own, 1), smallest_px)[:1]:
            tracks.append(follow(part, names[colour], pixels))
    return tracks


def _elongation(mask: Mask) -> float:
    """Median over frames of the ratio of the two principal deviations of a mask (T, H, W): 1 for every shape."""
    ratios = []
    for frame in mask:
        ys, xs = np.nonzero(frame)
        if len(xs) > 2:
            low, high = np.linalg.eigvalsh(np.cov(np.stack([xs, ys])))
            ratios.append(np.sqrt(high / max(low, 1e-3)))
    return float(np.median(ratios)) if ratios else float("inf")


def _opened(mask: Mask, radius: int) -> Mask:
    """Without specks thinner than 2 radius + 1 px."""
    return grow(shrink(mask, radius), radius)


def _votes_per_frame(votes: np.ndarray, kept: Mask) -> Floats:
    """Pixels of each palette colour in each frame, (T, 9), away from edges, where blends lie."""
    core = shrink(kept, 2)
    core = np.where(core.any((1, 2), keepdims=True), core, kept)
    return np.stack([((votes == index) & core).sum((1, 2)) for index in range(len(COLOURS))], 1).astype(np.float32)


def _blob_areas(likeliest: np.ndarray, kept: Mask) -> Floats:
    """Area in px of the blobs of each frame by the colour that most of a blob's inner pixels have, (T, 9)."""
    blobs, count = label(kept)
    inner = np.where(shrink(kept, 1), blobs, 0)
    votes = np.zeros((count + 1, len(COLOURS)), np.int64)
    np.add.at(votes, (inner.ravel(), likeliest.ravel()), 1)
    area = np.bincount(blobs.ravel(), minlength=count + 1)
    result = np.zeros((len(kept), len(COLOURS)), np.float32)
    for frame, labels in enumerate(blobs):
        for number in np.unique(labels):
            if number:
                result[frame, int(votes[number].argmax())] += area[number]
    return result


def _second_colour(votes: Floats, areas: Floats, first: int, smallest_px: float) -> int | None:
    """The colour beside `first` that most frames have: as a blob of its own, or with enough pixels in a common one."""
    enough = np.maximum(0.35 * smallest_px, 0.12 * votes[:, first])[:, None]
    shown = ((areas >= smallest_px) | (votes > enough)).mean(0)
    shown[first] = 0
    second = int(np.lexsort((votes.sum(0), shown))[-1])
    return second if shown[second] >= PRESENT_SHARE else None


def _largest_blobs(mask: Mask, smallest_px: float) -> list[Mask]:
    """The largest blob of every frame, and a second one if there is one of an eighth of its size in most frames.

    Blobs of successive frames are joined by the shorter of the two ways to pair them.
    """
    blobs, count = label(mask)
    area = np.bincount(blobs.ravel(), minlength=count + 1)
    area[0] = 0
    chosen: list[list[int]] = []
    for frame in blobs:
        present = np.unique(frame)
        ranked = sorted((int(i) for i in present if i), key=lambda i: -area[i])
        ranked = [i for i in ranked if area[i] >= max(SECOND_SHARE * area[ranked[0]], smallest_px)]
        chosen.append(ranked[:2])
    if not any(chosen):
        return []
    if np.mean([len(row) == 2 for row in chosen]) < PRESENT_SHARE:
        return [blobs == np.array([row[0] if row else -1 for row in chosen])[:, None, None]]
    return _paired(blobs, chosen)


def _paired(blobs: np.ndarray, chosen: list[list[int]]) -> list[Mask]:
    masks = [np.zeros(blobs.shape, np.bool_) for _ in range(2)]
    last: list[np.ndarray | None] = [None, None]
    for index, (frame, row) in enumerate(zip(blobs, chosen, strict=True)):
        places = [np.argwhere(frame == i).mean(0) for i in row]
        if len(row) == 2 and last[0] is not None and last[1] is not None:
            straight = np.linalg.norm(places[0] - last[0]) + np.linalg.norm(places[1] - last[1])
            crossed = np.linalg.norm(places[1] - last[0]) + np.linalg.norm(places[0] - last[1])
            if crossed < straight:
                row, places = row[::-1], places[::-1]
        if len(row) < 2:
            continue
        for slot in range(2):
            masks[slot][index] = frame == row[slot]
            last[slot] = places[slot]
    return masks


def follow(mask: Mask, colour: str, pixels: Floats) -> SubjectTrack:
    """Measure a subject whose pixels are `mask` (T, H, W) in every frame."""
    frames, height, width = mask.shape
    unit = 2 / height
    area = mask.sum((1, 2))
    present = area > 0
    safe = np.maximum(area, 1)
    x = (np.arange(width) + 0.5) * unit - width / height
    y = (np.arange(height) + 0.5) * unit - 1
    rows, columns = mask.sum(2), mask.sum(1)
    centre = np.stack([columns @ x / safe, rows @ y / safe], 1)
    radius = np.sqrt(area / np.pi) * unit
    bottom = np.array([_quantile_row(row, 0.96) for row in rows]) * unit - 1
    edge = mask[:, 0].any(1) | mask[:, -1].any(1) | mask[:, :, 0].any(1) | mask[:, :, -1].any(1)
    rgb = np.zeros((frames, 3), np.float32)
    core = shrink(mask, 2)
    for index in np.nonzero(present)[0]:
        chosen = core[index] if core[index].sum() >= 12 else mask[index]
        rgb[index] = np.median(pixels[index][chosen], axis=0)
    for values in (centre, radius, bottom):
        values[~present] = np.nan
    return SubjectTrack(
        colour,
        mask,
        present,
        present & ~edge,
        centre.astype(np.float32),
        radius.astype(np.float32),
        bottom.astype(np.float32),
        rgb,
    )


def _quantile_row(counts: np.ndarray, share: float) -> float:
    """Row, in px and between rows, above which `share` of the pixels lie."""
    total = np.cumsum(counts)
    if total[-1] == 0:
        return 0.0
    return float(np.interp(share * total[-1], np.concatenate([[0], total]), np.arange(len(total) + 1)))
