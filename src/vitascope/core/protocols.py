"""What the floors expect of each other. Models are structural: whatever has these methods fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from vitascope.core.errors import CapabilityError
from vitascope.core.shapes import VideoStrides
from vitascope.core.tracks import TextContext, Tracks

Prediction = Literal["velocity", "v", "noise", "x0"]
NoiseGranularity = Literal["clip", "frame", "cell"]


@dataclass(frozen=True)
class TemporalStrategy:
    """Which latent frames a latent frame may attend to.

    kind: "full" (all), "causal" (itself and the past) or "window" (itself, the `window` - 1 frames before it, and the
    anchors: frame 0 and every `anchor_every`-th frame of the past).
    """

    kind: Literal["full", "causal", "window"] = "full"
    window: int = 16
    anchor_every: int = 32


FULL = TemporalStrategy("full")
CAUSAL = TemporalStrategy("causal")


@dataclass(frozen=True)
class Capabilities:
    """What a denoiser can take; a task that needs more is refused with CapabilityError.

    condition_channels: of `Track.condition`, which such a model always reads.
    """

    tracks: tuple[str, ...]
    prediction: Prediction
    noise: NoiseGranularity
    strategies: tuple[str, ...] = ("full",)
    camera: bool = False
    condition_channels: int = 0


def check_call(
    can: Capabilities, tracks: Tracks, camera: Tensor | None = None, strategy: TemporalStrategy = FULL
) -> None:
    """Raise CapabilityError for a call that the capabilities do not cover."""
    if not tracks or not set(tracks) <= set(can.tracks):
        raise CapabilityError(f"the model has the tracks {', '.join(can.tracks)}; got {', '.join(tracks) or 'none'}")
    if strategy.kind not in can.strategies:
        raise CapabilityError(f"the model has the strategies {', '.join(can.strategies)}, not {strategy.kind}")
    if camera is not None and not can.camera:
        raise CapabilityError("the model takes no camera path")
    for track in tracks.values():
        given = 0 if track.condition is None else track.condition.shape[1]
        if given != can.condition_channels:
            raise CapabilityError(f"the model reads {can.condition_channels} channels beside the latents, got {given}")


class Denoiser(Protocol):
    """Predicts, for every track, the quantity named by `capabilities.prediction`, in the shape of its values."""

    @property
    def capabilities(self) -> Capabilities: ...

    def __call__(
        self,
        tracks: Tracks,
        text: TextContext,
        camera: Tensor | None = None,
        strategy: TemporalStrategy = FULL,
    ) -> dict[str, Tensor]: ...


@runtime_checkable
class Prepares(Protocol):
    """A denoiser that can do its work on a text once for a clip: the result goes in place of the text."""

    def prepare(self, text: TextContext) -> TextContext: ...


@runtime_checkable
class Begins(Protocol):
    """A denoiser whose fresh weights are not those to train from: they are for weights to be loaded over."""

    def begin(self) -> None:
        """Set what must start at a value of its own: the head at zero, positions at what tells places apart."""
        ...


State = tuple[Tensor | None, ...]
"""What goes from block to block: tokens (B, ...) of every stream, None for one that a call is without."""


class Layer(Protocol):
    """One block in one call, with all it is given bound to it but the state.

    alone: every token reads itself alone in self-attention, so that its result is the projected values; nothing else
    of the block changes.
    """

    def __call__(self, state: State, alone: bool = False) -> State: ...


@dataclass(frozen=True)
class Passage:
    """A call of a denoiser that has been entered: its blocks, and what is predicted of the state that leaves them.

    signal: of the state that enters the blocks, what shows best how much they will change it (Liu et al. 2024,
    TeaCache): the modulated input of the first block or the embedded level, (B, ...).
    """

    layers: tuple[Layer, ...]
    finish: Callable[[State], dict[str, Tensor]]
    signal: Callable[[State], Tensor]

    def run(self, state: State) -> dict[str, Tensor]:
        """The rest of the call: all blocks, one after the other, and what is predicted."""
        for layer in self.layers:
            state = layer(state)
        return self.finish(state)


@runtime_checkable
class InBlocks(Protocol):
    """A denoiser whose blocks somebody else may run: all of them, one after the other, is what calling it does."""

    def enter(
        self,
        tracks: Tracks,
        text: TextContext,
        camera: Tensor | None = None,
        strategy: TemporalStrategy = FULL,
    ) -> tuple[State, Passage]:
        """The state that goes into the blocks, and the rest of the call. Raises what calling raises."""
        ...


class VideoCodec(Protocol):
    """Frames (B, 3, 1 + k*t, H, W) in [-1, 1] to latents (B, C, 1 + k, H/h, W/w) of unit scale, and back."""

    @property
    def strides(self) -> VideoStrides: ...
    @property
    def latent_channels(self) -> int: ...
    def encode(self, frames: Tensor) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...


@runtime_checkable
class Normalises(Protocol):
    """A video codec whose latents have a scale of their own, `raw`, which an up-sampler was trained on."""

    def normalise(self, raw: Tensor) -> Tensor: ...
    def denormalise(self, latents: Tensor) -> Tensor: ...


class AudioCodec(Protocol):
    """Samples (B, 1, N * hop) in [-1, 1] to latents (B, C, N) of unit scale, and back."""

    @property
    def sample_rate_hz(self) -> int: ...
    @property
    def hop(self) -> int: ...
    @property
    def latent_channels(self) -> int: ...
    def encode(self, samples: Tensor) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...


@runtime_checkable
class KeepsTexts(Protocol):
    """A text encoder that keeps what it made: told of all prompts of a job at first, it is loaded once for them.

    missing: those of some prompts that it would have to be loaded for.
    """

    def fill(self, prompts: Sequence[str]) -> None: ...
    def missing(self, prompts: Sequence[str]) -> list[str]: ...


class ImageEncoder(Protocol):
    """Pictures (B, 3, H, W) in [-1, 1] to tokens (B, I, W) for `TextContext.image`."""

    def __call__(self, pictures: Tensor) -> Tensor: ...


class TextEncoder(Protocol):
    """Prompts to embeddings. The empty string is the unconditional prompt."""

    def __call__(self, prompts: Sequence[str]) -> TextContext: ...
