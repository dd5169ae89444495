"""What the loop expects of a stage, and the stages there are.

A stage owns a model, its data, its loss and its validation; the loop owns optimisers, schedule, precision, EMA,
checkpoints and metrics. Everything random follows from (seed, index), so that any step can be taken again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vitascope.core.errors import choice
from vitascope.training.recipe import Recipe

Batch = Mapping[str, Any]
"""Tensors whose first axis is the batch (moved to the device by the loop), and plain values (passed on as they are)."""


class Stage(Protocol):
    """One thing to train. The first entry of a batch must have a length: the number of samples in it."""

    @property
    def model(self) -> nn.Module:
        """All trainable parameters, and no others, in one module. The loop moves it to the device."""
        ...

    def batch(self, index: int) -> Batch:
        """Micro-batch number `index`: a pure function of the recipe and `index`, on the CPU.

        May run in a loader process forked from this one: it must not touch the model or the accelerator. With
        `loop.accumulation` n, optimiser step s uses the indices s * n to s * n + n - 1.
        """
        ...

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss with its graph, and named scalars to log (detached, left on the device).

        Runs under autocast if the recipe says so. `generator` lives on the device and is seeded from (seed, index).
        If the recipe says `loop.compile`, the stage compiles the tensor part of this itself, when it is built.
        """
        ...

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Measure `model` (a copy of `self.model` with averaged weights, in eval mode), write pictures to `folder`."""
        ...

    def export(self, model: nn.Module, folder: Path) -> list[Path]:
        """Write `model` (as in `validate`) to `folder` as the files that ship; return them."""
        ...


@runtime_checkable
class HasInputs(Protocol):
    """A stage that reads files made elsewhere: content hashes by name, checked when a run is resumed."""

    @property
    def inputs(self) -> dict[str, str]: ...


@runtime_checkable
class NeedsPreparation(Protocol):
    """A stage with work to do before its first batch; the loop calls `prepare` once, telling `say` how it goes."""

    def prepare(self, say: Callable[[str], None]) -> None: ...


@dataclass(frozen=True)
class StageKind:
    """How a stage is made: the dataclass of its recipe section, and the factory."""

    options: type[Any]
    build: Callable[[Recipe, torch.device], Stage]


def _video_codec() -> StageKind:
    from vitascope.training.stages import video_codec

    return StageKind(video_codec.VideoCodecOptions, video_codec.build)


def _audio_codec() -> StageKind:
    from vitascope.training.stages import audio_codec

    return StageKind(audio_codec.AudioCodecOptions, audio_codec.build)


def _text_encoder() -> StageKind:
    from vitascope.training.stages import text_encoder

    return StageKind(text_encoder.TextEncoderOptions, text_encoder.build)


def _denoiser() -> StageKind:
    from vitascope.training.stages import denoiser

    return StageKind(denoiser.DenoiserOptions, denoiser.build)


STAGES: dict[str, Callable[[], StageKind]] = {
    "video_codec": _video_codec,
    "audio_codec": _audio_codec,
    "text_encoder": _text_encoder,
    "denoiser": _denoiser,
}
"""Stages by name; a stage's modules are imported when it is asked for."""


def stage_kind(name: str) -> StageKind:
    """The stage of that name. Raises InputError naming the valid ones."""
    return STAGES[choice("stage", name, STAGES)]()
