"""What is asked of `generate`: one dataclass, plain enough to be written into the file it makes.

T frames, H and W px, N samples. Times in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from torch import Tensor

from vitascope.caches.steps import StepCaching
from vitascope.core.errors import InputError, PromptError
from vitascope.core.shapes import ClipFormat
from vitascope.diffusion.guidance import Perturbation
from vitascope.diffusion.sampling_schedule import listed_levels
from vitascope.models.codecs.decoding import AS_IT_IS, Decoding
from vitascope.weights.config import config_to_dict


@dataclass(frozen=True)
class Keyframe:
    """A picture (3, H, W) uint8 that the clip shows at `time_s`; strength 1 is exactly, 0 not at all.

    `source` names the file it came from, for the recipe.
    """

    time_s: float
    picture: Tensor
    strength: float = 1.0
    source: str = ""

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength <= 1.0:
            raise InputError(f"the strength of a keyframe lies in [0, 1], got {self.strength}")
        if not 0.0 <= self.time_s < inf:
            raise InputError(f"the time of a keyframe is a number of seconds from 0 up, got {self.time_s}")


@dataclass(frozen=True)
class Shot:
    """Frames (1 + k * stride, 3, H, W) uint8 that the clip shows from `time_s` on; strength as of a keyframe."""

    time_s: float
    frames: Tensor
    strength: float = 1.0
    source: str = ""

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength <= 1.0:
            raise InputError(f"the strength of a shot lies in [0, 1], got {self.strength}")
        if not 0.0 <= self.time_s < inf:
            raise InputError(f"the time of a shot is a number of seconds from 0 up, got {self.time_s}")


@dataclass(frozen=True)
class Given:
    """What is known of the clip besides its prompt.

    keyframes: pictures at times (an image to start from is one at 0). shots: frames at times. audio: samples (N,) at
    the clip's rate, kept as they are; the video follows them. video: frames (T, 3, H, W) uint8 of the clip's own size
    and length, kept as they are; the sound follows them. past: frames (1 + k * stride, 3, H, W) uint8 that the clip
    begins with and goes on from. past_audio: samples (N,) that its sound begins with. camera: path (T, 7) of position
    (world units), yaw, pitch, roll (radians) and field of view (degrees) a frame. draft: latents (C, N, h, w) of the
    whole clip, which it is made anew from, at the level that the request's `levels` begin with.
    """

    keyframes: tuple[Keyframe, ...] = ()
    audio: Tensor | None = None
    video: Tensor | None = None
    past: Tensor | None = None
    past_audio: Tensor | None = None
    camera: Tensor | None = None
    draft: Tensor | None = None
    shots: tuple[Shot, ...] = ()

    def __post_init__(self) -> None:
        if self.video is not None and (self.keyframes or self.shots or self.past is not None):
            raise InputError(
                "a video whose sound is made is known whole: it goes with no keyframes, no shots and no past"
            )
        if self.audio is not None and (self.video is not None or self.past_audio is not None):
            raise InputError("a given audio is known whole: it goes with neither a given video nor a past of the audio")


SETTINGS = (
    "prompt", "negative_prompt", "seed", "num_inference_steps", "guidance_scale", "sampler", "levels",
    "guidance_rescale", "guidance_interval", "stg_scale", "stg_layers", "stg_by", "step_cache",
    "image_cond_noise_scale", "decode_timestep", "decode_noise_scale",
)  # fmt: skip
"""What `GenerateRequest.settings` writes under its own name: `config_from_dict` makes a request of it again."""


@dataclass(frozen=True)
class GenerateRequest:
    """One clip to make. None means the pipeline's own default; `guidance_scale` is w in uncond + w (cond - uncond).

    levels: what the sampler passes through, in place of a number of steps. guidance_rescale, guidance_interval: see
    `Guidance`. stg_scale, stg_layers, stg_by: of spatio-temporal guidance, `perturbed`, `perturbed_layers` and
    `perturbation` there. step_cache: None runs all blocks at every step. image_cond_noise_scale: of noise on known
    frames that the model is shown, times the square of the level (`known_noise.KnownNoise`); 0 shows them as they are.
    decode_timestep, decode_noise_scale: what a conditioned decoder is told; see `codecs.decoding.Decoding`.
    """

    prompt: str
    negative_prompt: str = ""
    format: ClipFormat = field(default_factory=ClipFormat)
    seed: int = 0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    levels: tuple[float, ...] | None = None
    guidance_rescale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    stg_scale: float | None = None
    stg_layers: tuple[int, ...] | None = None
    stg_by: Perturbation | None = None
    step_cache: StepCaching | None = None
    image_cond_noise_scale: float = 0.0
    decode_timestep: float | None = None
    decode_noise_scale: float | None = None
    given: Given = field(default_factory=Given)

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise PromptError("the prompt is empty; for example: a red ball bounces on a gray background")
        for prompt in (self.prompt, self.negative_prompt):
            if "\0" in prompt or prompt != prompt.encode("utf-8", "ignore").decode():
                raise PromptError(f"the prompt is not text: {prompt[:40]!a}")
        if self.num_inference_steps is not None and not 1 <= self.num_inference_steps <= 1000:
            raise InputError(f"the number of inference steps lies in 1..1000, got {self.num_inference_steps}")
        if self.guidance_scale is not None and not 0.0 <= self.guidance_scale <= 30.0:
            raise InputError(f"the guidance scale lies in [0, 30], got {self.guidance_scale}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"the seed lies in 0..2^63 - 1, got {self.seed}")
        if self.stg_scale is not None and not 0.0 <= self.stg_scale <= 30.0:
            raise InputError(f"the scale of spatio-temporal guidance lies in [0, 30], got {self.stg_scale}")
        if not 0.0 <= self.image_cond_noise_scale <= 1.0:
            raise InputError(f"the scale of noise on known frames lies in [0, 1], got {self.image_cond_noise_scale}")
        self.decoding(AS_IT_IS)
        if self.levels is not None:
            count = len(listed_levels(self.levels))
            if self.num_inference_steps not in (None, count):
                raise InputError(f"the levels are those of {count} steps, not of {self.num_inference_steps}")

    def decoding(self, own: Decoding) -> Decoding:
        """How the clip is decoded by a pipeline that decodes in its `own` way. Raises InputError."""
        return replace(own, timestep=self.decode_timestep, noise_scale=self.decode_noise_scale)

    def settings(self) -> dict[str, Any]:
        """The request without its tensors, as JSON values."""
        fmt = self.format
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "width": fmt.width_px,
            "height": fmt.height_px,
            "fps": fmt.fps,
            "num_frames": fmt.num_frames,
            **{name: _plain(getattr(self, name)) for name in SETTINGS if not name.endswith("prompt")},
        }


def is_number(text: str) -> bool:
    """Whether a part of an option such as FILE:SCALE is a number, infinities and nan included."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _plain(value: Any) -> Any:
    if isinstance(value, StepCaching):
        return config_to_dict(value)
    return list(value) if isinstance(value, tuple) else value
