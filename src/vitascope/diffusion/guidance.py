"""Guidance, with one meaning everywhere: uncond + w (cond - uncond). w = 1 is the conditional model itself.

For a track, in x0 (the four predictions are affine in x0, so guidance is the same in each of them):

    x0 = uncond + w (cond - uncond) + (m - 1) (cond - isolated)

w is the track's text scale (Ho & Salimans 2022), m its cross-modal scale, and `isolated` the conditional prediction in
which the other tracks are replaced by pure noise, so that they tell this one nothing (as in LTX-2).
B clips, S text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from vitascope.core.errors import InputError
from vitascope.core.protocols import FULL, Denoiser, TemporalStrategy
from vitascope.core.random import generator
from vitascope.core.tracks import TextContext, Track, Tracks
from vitascope.diffusion.paths import Path


@dataclass(frozen=True)
class Guidance:
    """How strongly to guide.

    scale: text scale w of tracks not named in `scales`.  scales: w by track.
    cross_modal: cross-modal scale m by track, 1 where not named; each m other than 1 costs one more evaluation.
    rescale: share in [0, 1] of the guided x0 whose spread is set back to that of the conditional one.
    interval: guide only while the highest level of any cell lies within (low, high)  (Kynkäänniemi et al. 2024).
    """

    scale: float = 1.0
    scales: Mapping[str, float] = field(default_factory=dict)
    cross_modal: Mapping[str, float] = field(default_factory=dict)
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if not 0 <= self.rescale <= 1:
            raise InputError(f"guidance rescale must lie between 0 and 1, got {self.rescale}")
        if not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise InputError(f"a guidance interval needs 0 <= low <= high <= 1, got {self.interval}")

    def text_scale(self, track: str) -> float:
        return self.scales.get(track, self.scale)

    def cross_modal_scale(self, track: str) -> float:
        return self.cross_modal.get(track, 1.0)


@dataclass(frozen=True)
class GuidedDenoiser:
    """A denoiser with everything it is conditioned on, as the `tracks -> x0` that samplers call.

    cond, uncond: text of batch B or 1. `uncond` is needed where a text scale is not 1.
    seed: of the noise that stands for the other tracks in cross-modal guidance; the same at every step.
    max_clips: most clips in one call of the model; None puts all branches into one call.
    level_grid: if above 0, the model is told levels rounded down to multiples of 1 / level_grid.
    """

    denoiser: Denoiser
    path: Path
    cond: TextContext
    uncond: TextContext | None = None
    guidance: Guidance = field(default_factory=Guidance)
    camera: Tensor | None = None
    strategy: TemporalStrategy = FULL
    max_clips: int | None = None
    seed: int = 0
    level_grid: int = 0

    def __call__(self, tracks: Tracks) -> dict[str, Tensor]:
        """x0 of every track, in float32 or the values' wider type."""
        names = tuple(tracks)
        active = self._active(tracks)
        guided = [name for name in names if active and self.guidance.text_scale(name) != 1]
        bound = [name for name in names if active and len(names) > 1 and self.guidance.cross_modal_scale(name) != 1]
        branches: list[tuple[Tracks, TextContext]] = [(tracks, self.cond)]
        if guided:
            if self.uncond is None:
                raise InputError("guidance scales other than 1 need an unconditional text")
            branches.append((tracks, self.uncond))
        branches.extend((_isolate(tracks, name, self.seed), self.cond) for name in bound)
        results = self._predict(branches)
        cond, rest = results[0], results[1:]
        uncond = rest.pop(0) if guided else cond
        isolated = {name: result[name] for name, result in zip(bound, rest, strict=True)}
        x0: dict[str, Tensor] = {}
        for name in names:
            x0[name] = cond[name]
            if name in guided:
                x0[name] = guide(cond[name], uncond[name], self.guidance.text_scale(name))
            if name in isolated:
                x0[name] = x0[name] + (self.guidance.cross_modal_scale(name) - 1) * (cond[name] - isolated[name])
            if name in guided or name in isolated:
                x0[name] = rescale(x0[name], cond[name], self.guidance.rescale)
        return x0

    def _active(self, tracks: Tracks) -> bool:
        low, high = self.guidance.interval
        if (low, high) == (0.0, 1.0):
            return True
        level = max(float(track.noise.max()) for track in tracks.values())
        return low - 1e-6 <= level <= high + 1e-6

    def _predict(self, branches: list[tuple[Tracks, TextContext]]) -> list[dict[str, Tensor]]:
        """x0 of every branch, as many branches to a call of the model as `max_clips` lets in."""
        num_clips = next(iter(branches[0][0].values())).values.shape[0]
        together = len(branches) if self.max_clips is None else max(1, self.max_clips // num_clips)
        results: list[dict[str, Tensor]] = []
        for first in range(0, len(branches), together):
            results.extend(self._call(branches[first : first + together], num_clips))
        return results

    def _call(self, branches: list[tuple[Tracks, TextContext]], num_clips: int) -> list[dict[str, Tensor]]:
        batch = join_tracks([tracks for tracks, _ in branches])
        text = join_texts([_expand(text, num_clips) for _, text in branches])
        camera = self.camera
        if camera is not None:
            camera = camera.expand(num_clips, *camera.shape[1:]).repeat(len(branches), *[1] * (camera.ndim - 1))
        predictions = self.denoiser(self._told(batch), text, camera, self.strategy)
        kind = self.denoiser.capabilities.prediction
        x0 = {
            name: self.path.to_x0(kind, predictions[name], track.values, track.noise).split(num_clips)
            for name, track in batch.items()
        }
        return [{name: parts[i] for name, parts in x0.items()} for i in range(len(branches))]

    def _told(self, batch: dict[str, Track]) -> dict[str, Track]:
        """The tracks with levels as the model is told them; levels within 1e-4 of a step count as on it."""
        if not self.level_grid:
            return batch
        steps = {name: (track.noise * self.level_grid + 1e-4).floor() for name, track in batch.items()}
        return {name: track.with_values(track.values, steps[name] / self.level_grid) for name, track in batch.items()}


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """uncond + scale (cond - uncond)."""
    return uncond + scale * (cond - uncond)


def rescale(guided: Tensor, cond: Tensor, share: float) -> Tensor:
    """Give `share` of `guided` (B, ...) the standard deviation of `cond`, clip by clip.

    Source: Lin et al. 2023, "Common diffusion noise schedules and sample steps are flawed", eq. 15-16, here on x0.
    """
    if share == 0:
        return guided
    axes = tuple(range(1, guided.ndim))
    spread = guided.std(dim=axes, keepdim=True)
    factor = cond.std(dim=axes, keepdim=True) / spread.clamp(min=1e-8)
    return guided * (share * factor + (1 - share))


def join_tracks(items: list[Tracks]) -> dict[str, Track]:
    """Tracks of equal shapes one after the other along the batch; noise levels of batch 1 are spread first."""
    if len(items) == 1:
        return dict(items[0])
    joined: dict[str, Track] = {}
    for name, track in items[0].items():
        values = torch.cat([item[name].values for item in items])
        noise = [item[name].noise for item in items]
        shape = torch.broadcast_shapes(*(level.shape[1:] for level in noise))
        sizes = [item[name].values.shape[0] for item in items]
        levels = [level.expand(size, *shape) for level, size in zip(noise, sizes, strict=True)]
        conditions = [item[name].condition for item in items]
        given = [condition for condition in conditions if condition is not None]
        if given and len(given) != len(items):
            raise InputError("clips with and without a condition cannot be joined")
        joined[name] = Track(values, torch.cat(levels), track.times_s, torch.cat(given) if given else None)
    return joined


def join_texts(texts: list[TextContext]) -> TextContext:
    """Texts one after the other along the batch, padded with masked zeros to the longest.

    Raises InputError where some of them have an image, or were prepared, and others not.
    """
    if len(texts) == 1:
        return texts[0]
    if len({(text.image is None, len(text.prepared)) for text in texts}) > 1:
        raise InputError("texts with and without an image, or prepared and not, cannot be joined")
    images = [text.image for text in texts if text.image is not None]
    return TextContext(
        _stack([text.embeddings for text in texts]),
        _stack([text.mask for text in texts]),
        _stack(images) if images else None,
        tuple(_stack(list(parts)) for parts in zip(*(text.prepared for text in texts), strict=True)),
    )


def _stack(parts: list[Tensor]) -> Tensor:
    """Tensors (B, S, ...) one after the other, padded with zeros (False) to the longest S."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([functional.pad(part, (0, 0) * (part.ndim - 2) + (0, longest - part.shape[1])) for part in parts])


def _expand(text: TextContext, num_clips: int) -> TextContext:
    if text.mask.shape[0] not in (1, num_clips):
        raise InputError(f"{text.mask.shape[0]} texts do not fit {num_clips} clips: give one, or one for each")

    def expand(part: Tensor) -> Tensor:
        return part.expand(num_clips, *part.shape[1:])

    image = None if text.image is None else expand(text.image)
    return TextContext(expand(text.embeddings), expand(text.mask), image, tuple(map(expand, text.prepared)))


def _isolate(tracks: Tracks, name: str, seed: int) -> Tracks:
    """`tracks` with all but `name` replaced by pure noise at level 1."""
    isolated: dict[str, Track] = {}
    for other, track in tracks.items():
        if other == name:
            isolated[other] = track
            continue
        source = generator(seed, "cross-modal", other)
        # The same for every clip, so that a clip does not depend on the others of its batch.
        noise = torch.randn(track.values.shape[1:], generator=source).to(track.values)
        isolated[other] = track.with_values(noise.expand_as(track.values), torch.ones_like(track.noise))
    return isolated
