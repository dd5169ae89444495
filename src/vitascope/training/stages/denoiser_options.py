"""The section [denoiser] of a recipe, and what of it a model can take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import vitascope
from vitascope.core.errors import CapabilityError, InputError
from vitascope.core.protocols import FULL, Capabilities, TemporalStrategy
from vitascope.core.shapes import ClipFormat
from vitascope.core.tracks import VIDEO
from vitascope.models.text.bytes.config import BytesConfig
from vitascope.training.objectives.denoising import NoiseLevels, check_tasks, tasks_of
from vitascope.training.recipe import free
from vitascope.training.stages.denoiser_validation import ValidationOptions
from vitascope.world.casting import SceneMix

POCKET = "pocket"
"""In place of a path: the file that ships with the package."""

TASK_WEIGHTS = {
    "text": 0.45,
    "image": 0.12,
    "keyframes": 0.06,
    "still": 0.06,
    "extend": 0.08,
    "audio_to_video": 0.06,
    "audio_and_image": 0.03,
    "video_to_audio": 0.09,
    "one_track": 0.05,
}


@dataclass(frozen=True)
class PoolOptions:
    """The clips to train on: how many, of what, and where they are kept. num_workers: processes that encode them."""

    num_clips: int = 8192
    shard_clips: int = 256
    seed: int = 0
    mix: SceneMix = field(default_factory=SceneMix)
    folder: str = free("pools")
    num_workers: int = free(1)


@dataclass(frozen=True)
class ConditionOptions:
    """empty_share: clips whose caption is left out. camera_share: clips whose camera path is given.

    causal, window: shares of batches with that temporal strategy; the others see all frames. window_frames and
    anchor_every: of the window strategy, in latent frames.
    """

    empty_share: float = 0.1
    camera_share: float = 0.3
    causal: float = 0.2
    window: float = 0.0
    window_frames: int = 3
    anchor_every: int = 4

    def __post_init__(self) -> None:
        for name in ("empty_share", "camera_share", "causal", "window"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.causal + self.window > 1 + 1e-9:
            raise InputError(f"causal and window are shares of one whole, got {self.causal} and {self.window}")
        if min(self.window_frames, self.anchor_every) < 1:
            raise InputError("window_frames and anchor_every must be positive")

    def strategies(self) -> dict[TemporalStrategy, float]:
        """Strategies and their shares."""
        window = TemporalStrategy("window", self.window_frames, self.anchor_every)
        full = max(0.0, 1 - self.causal - self.window)
        return {FULL: full, TemporalStrategy("causal"): self.causal, window: self.window}


@dataclass(frozen=True)
class DenoiserOptions:
    """What is trained, on what, and how it is marked.

    family: of the denoiser, one of `models.DENOISERS`; preset: one of that family's, `model` the fields of its
    configuration that differ; `text` the shape of its text encoder.
    video_codec, audio_codec: files, or "pocket" for those in the package. text_encoder: a file to start from, denoiser
    likewise; empty starts afresh. num_words: every caption is padded to it. min_level: see `velocity_weighted_error`.
    focus: how much more the cells of a medium subject count in the loss than others, see `subject_focus`; 0 not at all.
    tasks: weights by name; the usual ones are left to those that the model can be given.
    """

    batch_size: int = 64
    family: str = "factorised"
    preset: str = "pocket"
    model: dict[str, Any] = field(default_factory=dict)
    text: BytesConfig = field(default_factory=BytesConfig)
    num_words: int = 40
    text_encoder: str = ""
    denoiser: str = ""
    video_codec: str = POCKET
    audio_codec: str = POCKET
    clip: ClipFormat = field(default_factory=ClipFormat)
    pool: PoolOptions = field(default_factory=PoolOptions)
    tasks: dict[str, float] = field(default_factory=lambda: dict(TASK_WEIGHTS))
    noise: NoiseLevels = field(default_factory=NoiseLevels)
    condition: ConditionOptions = field(default_factory=ConditionOptions)
    min_level: float = 0.05
    video_weight: float = 1.0
    audio_weight: float = 0.5
    focus: float = 0.0
    validation: ValidationOptions = field(default_factory=ValidationOptions)

    def __post_init__(self) -> None:
        self.text.check_words(self.num_words)


def packaged(name: str, file: str) -> Path:
    """The path that a recipe names; "pocket" is `file` in the package."""
    return Path(vitascope.__path__[0]) / "pocket" / file if name == POCKET else Path(name)


def fitted(options: DenoiserOptions, can: Capabilities, beside: int) -> DenoiserOptions:
    """The options as a model can take them: the usual mixture of tasks without those that it cannot be given, one level
    for a clip where it takes no more, and no camera where it takes none.

    beside: channels that hold a known frame, see `tasks.condition`. Raises InputError, naming what is valid, for a task
    or a strategy that the model does not have, CapabilityError for a model that makes no video or reads another number
    of channels beside its latents.
    """
    if VIDEO not in can.tracks:
        raise CapabilityError(f"a denoiser that is trained here has a video track; got {', '.join(can.tracks)}")
    if can.condition_channels not in (0, beside):
        raise CapabilityError(
            f"the model reads {can.condition_channels} channels beside its latents; with this codec these are {beside} "
            "(a mask of frames, and latents) for one that starts from a picture, or none: change model.in_channels"
        )
    for strategy, share in options.condition.strategies().items():
        if share > 0 and strategy.kind not in can.strategies:
            advice = "let the shares of the others be 1 together" if strategy == FULL else f"set {strategy.kind} = 0"
            raise InputError(
                f"the model has the strategies {', '.join(can.strategies)}, not {strategy.kind}: {advice} in "
                "[denoiser.condition]"
            )
    valid = tasks_of(can)
    tasks: Mapping[str, float] = options.tasks
    if tasks == TASK_WEIGHTS:
        tasks = {name: tasks.get(name, 1.0) for name in valid}
    check_tasks(tasks, valid)
    noise = options.noise if can.noise != "clip" else replace(options.noise, per_frame_share=0.0)
    condition = options.condition if can.camera else replace(options.condition, camera_share=0.0)
    return replace(options, tasks=dict(tasks), noise=noise, condition=condition)
