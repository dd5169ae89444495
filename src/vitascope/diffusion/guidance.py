"""Guidance, with one meaning everywhere: uncond + w (cond - uncond). w = 1 is the conditional model itself.

For a track, in x0 (the four predictions are affine in x0, so guidance is the same in each of them):

    x0 = uncond + w (cond - uncond) + s (cond - perturbed) + (m - 1) (cond - isolated)

w is the track's text scale (Ho & Salimans 2022); s the scale of spatio-temporal guidance and `perturbed` the
conditional prediction of the model with some layers disabled (Hyung et al. 2024, STG; skip-layer guidance); m the
track's cross-modal scale and `isolated` the conditional prediction in which the other tracks are replaced by pure
noise, so that they tell this one nothing (as in LTX-2). B clips, S text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from vitascope.caches.steps import StepCache
from vitascope.core.errors import CapabilityError, InputError, choice
from vitascope.core.protocols import FULL, Denoiser, InBlocks, Passage, TemporalStrategy
from vitascope.core.random import generator
from vitascope.core.tracks import TextContext, Track, Tracks
from vitascope.diffusion.joining import join_texts, join_tracks
from vitascope.diffusion.paths import Path, precise

Perturbation = Literal["attention", "block"]
PERTURBATIONS: tuple[Perturbation, ...] = ("attention", "block")
RescaleOn = Literal["x0", "velocity"]
RESCALE_ON: tuple[RescaleOn, ...] = ("x0", "velocity")
BUSY_VALUES = 2**17
"""Values of latents from which one branch is work enough for a CPU: more branches in a call only take more memory."""


@dataclass(frozen=True)
class Guidance:
    """How strongly to guide.

    scale: text scale w of tracks not named in `scales`.  scales: w by track.
    cross_modal: cross-modal scale m by track, 1 where not named; each m other than 1 costs one more evaluation.
    rescale: share in [0, 1] of the guided answer whose spread is set back to that of the conditional one. rescale_on:
    whether the answer is x0 or, as in diffusers, the velocity.
    interval: guide only while the highest level of any cell lies within (low, high)  (Kynkäänniemi et al. 2024).
    perturbed: scale s of spatio-temporal guidance; other than 0, it costs one more evaluation. perturbed_layers: which
    layers are disabled for it, counted from 0. perturbation: how: "attention" lets every token read itself alone (STG-A
    of the paper), "block" leaves the block out (STG-R).
    """

    scale: float = 1.0
    scales: Mapping[str, float] = field(default_factory=dict)
    cross_modal: Mapping[str, float] = field(default_factory=dict)
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    perturbed: float = 0.0
    perturbed_layers: tuple[int, ...] = ()
    perturbation: Perturbation = "attention"
    rescale_on: RescaleOn = "x0"

    def __post_init__(self) -> None:
        choice("answer to rescale", self.rescale_on, RESCALE_ON)
        choice("perturbation", self.perturbation, PERTURBATIONS)
        if self.perturbed and not self.perturbed_layers:
            raise InputError("spatio-temporal guidance needs the layers to disable, for example 19 of LTX-Video's 28")
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
    busy_values: values of latents from which branches go one by one all the same; None for no such limit.
    level_grid: if above 0, the model is told levels rounded down to multiples of 1 / level_grid.
    levels: of the schedule, in double precision: what lies within 1e-6 of one is rounded as that one is.
    steps: skips blocks where little changes from step to step; it serves one run of a sampler.
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
    levels: tuple[float, ...] = ()
    steps: StepCache | None = None
    busy_values: int | None = None
    _joined: dict[tuple[object, ...], TextContext] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, tracks: Tracks) -> dict[str, Tensor]:
        """x0 of every track, in float32 or the values' wider type."""
        names = tuple(tracks)
        active = self._active(tracks)
        guided = [name for name in names if active and self.guidance.text_scale(name) != 1]
        bound = [name for name in names if active and len(names) > 1 and self.guidance.cross_modal_scale(name) != 1]
        branches = [Branch("cond", tracks, self.cond)]
        if guided:
            if self.uncond is None:
                raise InputError("guidance scales other than 1 need an unconditional text")
            branches.append(Branch("uncond", tracks, self.uncond))
        branches.extend(Branch(f"isolated {name}", _isolate(tracks, name, self.seed), self.cond) for name in bound)
        if active and self.guidance.perturbed:
            branches.append(Branch("perturbed", tracks, self.cond, perturbed=True))
        results = self._predict(branches)
        answers = {
            name: self._combine(name, {branch: result[name] for branch, result in results.items()}) for name in names
        }
        if not self._on_velocity:
            return answers
        return {
            name: self.path.to_x0("velocity", v, tracks[name].values, tracks[name].noise) for name, v in answers.items()
        }

    def _combine(self, name: str, results: dict[str, Tensor]) -> Tensor:
        """The guided answer for a track from that of every branch."""
        cond, isolated, own = results["cond"], f"isolated {name}", self.guidance
        guided, scale = cond, own.text_scale(name)
        if "uncond" in results and scale != 1:
            guided = guide(cond, results["uncond"], scale)
        if isolated in results:
            guided = guided + (own.cross_modal_scale(name) - 1) * (cond - results[isolated])
        if "perturbed" in results:
            guided = guided + own.perturbed * (cond - results["perturbed"])
        return guided if guided is cond else rescale(guided, cond, own.rescale)

    @property
    def _on_velocity(self) -> bool:
        """Whether branches are combined as velocities: rescaling asks for it, all else is the same either way."""
        return self.guidance.rescale > 0 and self.guidance.rescale_on == "velocity"

    def _active(self, tracks: Tracks) -> bool:
        low, high = self.guidance.interval
        if (low, high) == (0.0, 1.0):
            return True
        return low - 1e-6 <= _highest(tracks) <= high + 1e-6

    def _predict(self, branches: list[Branch]) -> dict[str, dict[str, Tensor]]:
        """The answer of every branch, as many branches to a call of the model as `max_clips` lets in; a perturbed one
        is a call of its own."""
        values = [track.values for track in branches[0].tracks.values()]
        num_clips = values[0].shape[0]
        together = len(branches) if self.max_clips is None else max(1, self.max_clips // num_clips)
        if self.busy_values is not None and sum(value.numel() for value in values) >= self.busy_values:
            together = 1
        if self.steps is not None:
            self.steps.begin(tuple(branch.name for branch in branches))
        results: dict[str, dict[str, Tensor]] = {}
        level = partial(_highest, branches[0].tracks)  # that of the clip: other branches may have noise for a track
        for kind in (False, True):
            alike = [branch for branch in branches if branch.perturbed is kind]
            for first in range(0, len(alike), together):
                results |= self._call(alike[first : first + together], num_clips, level)
        return results

    def _call(self, branches: list[Branch], num_clips: int, level: Callable[[], float]) -> dict[str, dict[str, Tensor]]:
        batch = join_tracks([branch.tracks for branch in branches])
        text = self._texts(branches, num_clips)
        camera = self.camera
        if camera is not None:
            camera = camera.expand(num_clips, *camera.shape[1:]).repeat(len(branches), *[1] * (camera.ndim - 1))
        predictions = self._evaluate(branches, batch, text, camera, level)
        answers = {name: self._answer(predictions[name], track).split(num_clips) for name, track in batch.items()}
        return {branch.name: {name: parts[i] for name, parts in answers.items()} for i, branch in enumerate(branches)}

    def _texts(self, branches: list[Branch], num_clips: int) -> TextContext:
        """The texts of some branches, with all that was prepared of them, joined once for all steps."""
        key = (num_clips, *(branch.name for branch in branches))
        if key not in self._joined:
            self._joined[key] = join_texts([_expand(branch.text, num_clips) for branch in branches])
        return self._joined[key]

    def _answer(self, prediction: Tensor, track: Track) -> Tensor:
        """A prediction as x0, or as the velocity where that is rescaled."""
        kind, path = self.denoiser.capabilities.prediction, self.path
        if self._on_velocity and kind == "velocity":
            return prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        x0 = path.to_x0(kind, prediction, track.values, track.noise)
        return path.from_x0("velocity", x0, track.values, track.noise) if self._on_velocity else x0

    def _evaluate(
        self,
        branches: list[Branch],
        batch: dict[str, Track],
        text: TextContext,
        camera: Tensor | None,
        level: Callable[[], float],
    ) -> dict[str, Tensor]:
        """What the model predicts: by its own call, or with its blocks disabled or skipped in part."""
        told, perturbed = self._told(batch), branches[0].perturbed
        if self.steps is None and not perturbed:
            return self.denoiser(told, text, camera, self.strategy)
        if not isinstance(self.denoiser, InBlocks):
            raise CapabilityError("this model cannot be run block by block, as a step cache or perturbed layers need")
        state, passage = self.denoiser.enter(told, text, camera, self.strategy)
        if perturbed:
            passage = disable(passage, self.guidance.perturbed_layers, self.guidance.perturbation)
        if self.steps is not None:
            key = tuple(branch.name for branch in branches)
            leading = next(iter(batch.values())).values.shape[0] // len(branches) if key[0] == "cond" else 0
            return passage.finish(self.steps.run(key, level, state, passage, leading))
        return passage.run(state)

    def _told(self, batch: dict[str, Track]) -> dict[str, Track]:
        """The tracks with levels as the model is told them."""
        if not self.level_grid:
            return batch
        return {name: track.with_values(track.values, self._rounded(track.noise)) for name, track in batch.items()}

    def _rounded(self, noise: Tensor) -> Tensor:
        """Down to the grid. Levels that are not of the schedule count as on a step within 1e-4 of it: single precision
        may have put them below."""
        exact, grid = precise(noise), self.level_grid
        steps = exact * grid + 1e-4
        if self.levels:
            own = exact.new_tensor(self.levels)
            distance, index = (exact.unsqueeze(-1) - own).abs().min(-1)
            steps = torch.where(distance < 1e-6, own[index] * grid, steps)
        return (steps.floor() / grid).to(noise.dtype)


def busy_values(device: torch.device) -> int | None:
    """From how many values of latents on one branch of guidance keeps a device busy; None where that is not known."""
    return BUSY_VALUES if device.type == "cpu" else None


@dataclass(frozen=True)
class Branch:
    """One of the predictions that guidance is made of."""

    name: str
    tracks: Tracks
    text: TextContext
    perturbed: bool = False


def disable(passage: Passage, layers: Sequence[int], how: Perturbation) -> Passage:
    """The passage with some of its layers disabled. Raises InputError for layers that there are not, or where none is
    left."""
    count, chosen = len(passage.layers), set(layers)
    if not chosen <= set(range(count)) or (how == "block" and len(chosen) == count):
        raise InputError(f"the layers to disable are some of 0..{count - 1}, not all; got {tuple(layers)}")
    if how == "block":
        return replace(passage, layers=tuple(layer for i, layer in enumerate(passage.layers) if i not in chosen))
    return replace(
        passage,
        layers=tuple(partial(layer, alone=True) if i in chosen else layer for i, layer in enumerate(passage.layers)),
    )


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


def _highest(tracks: Tracks) -> float:
    """The highest level of any cell."""
    return max(float(track.noise.max()) for track in tracks.values())


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
