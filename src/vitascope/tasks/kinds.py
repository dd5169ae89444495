"""The kinds of pipelines that diffusers has of public models: their parts, how they read prompts, and how they are
sampled, which is as their authors and diffusers do it. Nothing that a folder names is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from vitascope.core.shapes import ClipFormat
from vitascope.diffusion.guidance import Guidance
from vitascope.diffusion.sampling_schedule import SamplingSchedule, ShiftBySize
from vitascope.models.parts import reading_config
from vitascope.models.text.t5.options import T5_OPTIONS, T5Options
from vitascope.tasks.discover import INDEX
from vitascope.tasks.pipeline import Defaults
from vitascope.weights.foreign import ForeignConfig, read_object

_NOTES = ("timestep_spacing", "steps_offset", "trained_betas", "beta_start", "beta_end")


@dataclass(frozen=True)
class PublishedPipeline:
    """A class of pipelines of diffusers: the classes of its parts, how it reads prompts, its defaults, and what its
    scheduler means beside them."""

    denoiser: str
    codec: str
    text: T5Options
    defaults: Defaults
    schedule: Callable[[ForeignConfig, Defaults], SamplingSchedule]


def _wan_schedule(theirs: ForeignConfig, own: Defaults) -> SamplingSchedule:
    theirs.only(_class_name="UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True)
    theirs.only(solver_order=2, solver_type="bh2", predict_x0=True, lower_order_final=True, final_sigmas_type="zero")
    theirs.only(use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False, thresholding=False)
    theirs.only(disable_corrector=(), solver_p=None, rescale_betas_zero_snr=False, use_dynamic_shifting=False)
    theirs.only(num_train_timesteps=1000)
    theirs.ignore(*_NOTES, "beta_schedule", "dynamic_thresholding_ratio", "sample_max_value", "time_shift_type")
    theirs.ignore("sigma_min", "sigma_max")
    theirs.only(shift_terminal=None)
    shift = theirs.take("flow_shift", 1.0)
    # levels as integer timesteps of 1000; one short of 1 keeps log(alpha) finite
    return replace(own.schedule, shift=shift, end=0.001, below_one=1e-6, grid=1000)


def _euler_schedule(theirs: ForeignConfig, own: Defaults, inverted: bool = False) -> SamplingSchedule:
    """inverted: the scheduler counts from data to noise, as Mochi's does; ours does not, so nothing follows from it."""
    theirs.only(_class_name="FlowMatchEulerDiscreteScheduler", stochastic_sampling=False, time_shift_type="exponential")
    theirs.only(use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False)
    theirs.only(num_train_timesteps=1000, invert_sigmas=inverted)
    theirs.ignore(*_NOTES)
    by_size = None
    if theirs.take("use_dynamic_shifting", False):
        by_size = ShiftBySize(
            theirs.take("base_image_seq_len", 256),
            theirs.take("base_shift", 0.5),
            theirs.take("max_image_seq_len", 4096),
            theirs.take("max_shift", 1.15),
        )
    theirs.ignore("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    terminal = theirs.number("shift_terminal") or 0.0
    return replace(own.schedule, shift=theirs.take("shift", 1.0), by_size=by_size, terminal=terminal)


def _condition_schedule(theirs: ForeignConfig, own: Defaults) -> SamplingSchedule:
    """Levels that the pipeline gives: diffusers would step along those that a constant shift makes of them, and tell
    the model those before. By size it cannot shift them; folders made of the authors' files say so all the same."""
    if not theirs.take("use_dynamic_shifting", False):
        theirs.only(shift=1.0, shift_terminal=None)
    return _euler_schedule(theirs, own)


_WAN = PublishedPipeline(
    "WanTransformer3DModel",
    "AutoencoderKLWan",
    T5_OPTIONS["wan"],
    Defaults(ClipFormat(832, 480, 16.0, 81), 50, Guidance(5.0, rescale_on="velocity"), "unipc"),
    _wan_schedule,
)
"""Whether it starts from pictures is the transformer's to say."""
_LTX = PublishedPipeline(
    "LTXVideoTransformer3DModel",
    "AutoencoderKLLTXVideo",
    T5_OPTIONS["ltx"],
    Defaults(ClipFormat(704, 512, 25.0, 161), 50, Guidance(3.0, rescale_on="velocity"), "euler", frame_times="begin"),
    _euler_schedule,
)
"""The same parts, saved by either of two classes: a picture is a known latent frame."""
PIPELINES: dict[str, PublishedPipeline] = {
    "WanPipeline": _WAN,
    "WanImageToVideoPipeline": _WAN,
    "LTXPipeline": _LTX,
    "LTXImageToVideoPipeline": _LTX,
    "LTXConditionPipeline": PublishedPipeline(
        "LTXVideoTransformer3DModel",
        "AutoencoderKLLTXVideo",
        replace(T5_OPTIONS["ltx"], max_tokens=256, attention="words"),
        Defaults(
            ClipFormat(704, 512, 25.0, 161),
            50,
            Guidance(3.0, rescale_on="velocity"),
            "euler",
            SamplingSchedule("linear_quadratic"),
            frame_times="begin_causal",
            keyframes="beside",
        ),
        _condition_schedule,
    ),
    "MochiPipeline": PublishedPipeline(
        "MochiTransformer3DModel",
        "AutoencoderKLMochi",
        T5_OPTIONS["mochi"],
        Defaults(
            ClipFormat(848, 480, 30.0, 163),
            64,
            Guidance(4.5, rescale_on="velocity"),
            "euler",
            SamplingSchedule("linear_quadratic"),
        ),
        partial(_euler_schedule, inverted=True),
    ),
}
"""By class name, as `_class_name` in model_index.json has it."""


def as_indexed(folder: Path, kind: PublishedPipeline) -> PublishedPipeline:
    """The kind of pipeline, with what the folder's index says of it beside its parts, which `discover` has checked.
    Raises CheckpointError for settings that no such pipeline has."""
    values = read_object(folder / INDEX)
    theirs = ForeignConfig({k: v for k, v in values.items() if not isinstance(v, list)}, str(folder / INDEX))
    theirs.ignore("boundary_ratio", "expand_timesteps")
    masked = theirs.take("force_zeros_for_empty_prompt", False)
    theirs.done()
    if kind.text.empty == "encoded":
        return kind
    return replace(kind, text=replace(kind.text, empty="masked" if masked else "encoded"))


def read_schedule(folder: Path, kind: PublishedPipeline) -> SamplingSchedule:
    """The levels that the folder's scheduler stands for. Raises CheckpointError for a scheduler that is not known."""
    path = folder / "scheduler" / "scheduler_config.json"
    return schedule_from(read_object(path), str(path), kind)


def schedule_from(values: Mapping[str, Any], label: str, kind: PublishedPipeline) -> SamplingSchedule:
    """The levels that the values of a `scheduler_config.json` stand for. label: where they are from. Raises
    CheckpointError for a scheduler that is not known."""
    theirs = ForeignConfig(values, label)
    with reading_config(theirs.label):
        schedule = kind.schedule(theirs, kind.defaults)
    theirs.done()
    return schedule
