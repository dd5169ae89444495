"""How to sample, as the command line says it: texts to the fields of a request, and clips in one pass or two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vitascope.core.errors import InputError

if TYPE_CHECKING:
    from vitascope.cli.sources import Sources
    from vitascope.diffusion.samplers import Step
    from vitascope.models.ltx_upsampler.model import LTXUpsampler
    from vitascope.tasks.generate import Generated
    from vitascope.tasks.pipeline import Pipeline
    from vitascope.tasks.request import GenerateRequest
    from vitascope.tasks.two_passes import TwoPasses


@dataclass(frozen=True)
class Sampling:
    """Options of the command line beside steps, guidance scale and sampler; empty where nothing is said."""

    levels: str = ""
    guidance_rescale: float | None = None
    guidance_interval: str = ""
    stg_scale: float | None = None
    stg_layers: str = ""
    stg_by: str = ""
    step_cache: str = ""
    image_cond_noise_scale: float = 0.0
    decode_timestep: float | None = None
    decode_noise_scale: float | None = None

    def fields(self) -> dict[str, Any]:
        """Of a `GenerateRequest`. Raises InputError for texts that cannot be read."""
        from vitascope.caches.steps import StepCaching
        from vitascope.diffusion.sampling_schedule import read_levels

        layers = _layers(self.stg_layers) if self.stg_layers else None
        if self.stg_scale is None and (layers or self.stg_by):
            raise InputError("--stg-layers and --stg-by go with --stg-scale, such as --stg-scale 1")
        return {
            "levels": read_levels(self.levels) if self.levels else None,
            "guidance_rescale": self.guidance_rescale,
            "guidance_interval": _interval(self.guidance_interval) if self.guidance_interval else None,
            "stg_scale": self.stg_scale,
            "stg_layers": layers,
            "stg_by": self.stg_by or None,
            "step_cache": StepCaching.parse(self.step_cache) if self.step_cache else None,
            "image_cond_noise_scale": self.image_cond_noise_scale,
            "decode_timestep": self.decode_timestep,
            "decode_noise_scale": self.decode_noise_scale,
        }


def _interval(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"a guidance interval is LOW,HIGH, such as 0.2,0.9; got {text!r}") from error
    return low, high


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"layers are numbers from 0 with commas between them, such as 19; got {text!r}") from error


@dataclass(frozen=True)
class SecondPass:
    """What the command line says of a second pass; no upsampler, no second pass."""

    upsampler: str = ""
    levels: str = ""
    adain: float = 1.0
    tone_map: float = 0.0

    def check(self, sources: Sources) -> None:
        """Raise InputError for values that cannot be, and for sources that do not go with a second pass."""
        if self.upsampler and sources.extend:
            raise InputError("--extend goes on from a clip in one pass: leave --upsampler away")
        if self.upsampler:
            self.passes()
        elif self != SecondPass():
            raise InputError("--second-levels, --adain and --tone-map go with --upsampler")

    def passes(self) -> TwoPasses:
        """How the second pass follows the first. Raises InputError."""
        from vitascope.diffusion.sampling_schedule import read_levels
        from vitascope.tasks.two_passes import TwoPasses

        more: dict[str, Any] = {"levels": read_levels(self.levels)} if self.levels else {}
        return TwoPasses(adain=self.adain, tone_map=self.tone_map, **more)

    def load(self, pipeline: Pipeline) -> LTXUpsampler | None:
        """The up-sampler, if there is to be a second pass. Raises CheckpointError."""
        if not self.upsampler:
            return None
        from vitascope.tasks.two_passes import load_upsampler

        return load_upsampler(self.upsampler, pipeline.device, memory=pipeline.memory)


def make_clip(
    pipeline: Pipeline,
    request: GenerateRequest,
    second: SecondPass,
    upsampler: LTXUpsampler | None,
    report: Callable[[Step], None],
) -> Generated:
    """A clip in one pass of any length, or in two."""
    from vitascope.tasks.long import generate_any_length
    from vitascope.tasks.two_passes import generate_in_two_passes

    if upsampler is None:
        return generate_any_length(pipeline, request, report)
    return generate_in_two_passes(pipeline, upsampler, request, second.passes(), report)
