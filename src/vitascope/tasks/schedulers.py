"""What a model is sampled at, as the files of other projects say it: written from a `SamplingSchedule`.

Reading is in `published` and `original`, beside what each family allows.
"""

from __future__ import annotations

from dataclasses import replace
from math import isclose, log
from typing import Any

from vitascope.core.errors import CheckpointError, choice
from vitascope.diffusion.sampling_schedule import SamplingSchedule, ShiftBySize
from vitascope.models.parts import Layout
from vitascope.tasks.discover import DENOISER, Found
from vitascope.tasks.kinds import PIPELINES, PublishedPipeline, as_indexed, read_schedule, schedule_from
from vitascope.tasks.original import original_defaults
from vitascope.tasks.pipeline import Defaults


def schedule_of(found: Found) -> SamplingSchedule:
    """The levels that belong to a model that was found. Raises InputError for a class of pipelines that is not known,
    CheckpointError for a scheduler that is not."""
    return defaults_of(found).schedule


def defaults_of(found: Found) -> Defaults:
    """How a model that was found is sampled. Raises as `schedule_of`."""
    kind = _kind(found)
    if found.kind == "diffusers":
        return replace(kind.defaults, schedule=read_schedule(found.path, kind))
    return original_defaults(found, kind.defaults)


def defaults_written(found: Found, layout: Layout) -> Defaults:
    """How a model will be sampled once it is written in a layout: what reading it back gives. Raises as `schedule_of`,
    and CheckpointError for levels that the authors' file cannot say."""
    kind = _kind(found)
    if found.kind == layout:
        return defaults_of(found)
    if layout == "diffusers":
        written = schedule_from(write_scheduler(found), f"the scheduler of {found.path}", kind)
        return replace(kind.defaults, schedule=written)
    notes = {"scheduler": write_ltx_scheduler(found)} if found.parts[DENOISER].family == "ltx" else {}
    return original_defaults(replace(found, kind="original", notes=notes), kind.defaults)


def _kind(found: Found) -> PublishedPipeline:
    return PIPELINES[choice("kind of pipeline", found.pipeline, PIPELINES)]


def write_scheduler(found: Found) -> dict[str, Any]:
    """The `scheduler_config.json` of diffusers with the model's levels, as far as it can say them (`lost_levels`).

    How levels are spaced is the pipeline's there. LTXConditionPipeline lists them itself, so that its scheduler must
    not shift them: diffusers would step along others than it tells the model, or stop for want of a size.
    """
    schedule = schedule_of(found)
    if found.pipeline.startswith("Wan"):
        return {
            "_class_name": "UniPCMultistepScheduler",
            "flow_shift": schedule.shift,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
        }
    if found.pipeline == "LTXConditionPipeline":
        schedule = SamplingSchedule("linear_quadratic")
    values: dict[str, Any] = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "invert_sigmas": found.pipeline == "MochiPipeline",
        "shift": schedule.shift,
        "shift_terminal": schedule.terminal or None,
        "use_dynamic_shifting": schedule.by_size is not None,
    }
    if schedule.by_size is not None:
        size = schedule.by_size
        values |= {"base_image_seq_len": size.cells_low, "base_shift": size.log_low}
        values |= {"max_image_seq_len": size.cells_high, "max_shift": size.log_high}
    return values


def lost_levels(found: Found, layout: Layout) -> list[str]:
    """What of a model's sampling a layout cannot say, in words for people. Raises as `defaults_written`."""
    before, after = defaults_of(found), defaults_written(found, layout)
    if before.schedule.listed and not after.schedule.listed:
        return [_lost_list(before)]
    notes = []
    if not _same(before.schedule, after.schedule):
        notes.append(
            f"the model's levels ({_words(before.schedule)}) have no place in that layout, where it is sampled at "
            f"others ({_words(after.schedule)}): give the levels themselves with --levels"
        )
    if before.num_inference_steps != after.num_inference_steps:
        steps = before.num_inference_steps
        notes.append(
            f"the model's {steps} steps have no place in that layout, where it takes {after.num_inference_steps}: give "
            f"--num-inference-steps {steps}"
        )
    kind = _kind(found)
    if (found.kind, layout) == ("diffusers", "original") and as_indexed(found.path, kind).text != kind.text:
        notes.append("that layout cannot say that the empty prompt is encoded, as the index of the folder does")
    return notes


def _lost_list(own: Defaults) -> str:
    """Of a distilled model, which lists the levels that diffusers is given at every call."""
    scale = own.guidance.scale
    levels = ",".join(f"{level:g}" for level in own.schedule.listed)
    timesteps = ", ".join(f"{1000 * level:g}" for level in own.schedule.listed)
    return (
        f"the levels that the model lists ({levels}) and its guidance scale {scale:g} have no place in the layout of "
        f"diffusers: give --levels {levels} --guidance-scale {scale:g} with it (in diffusers timesteps=[{timesteps}], "
        f"guidance_scale={scale:g})"
    )


def _same(one: SamplingSchedule, other: SamplingSchedule) -> bool:
    """But for the last bits of a shift, which the authors' files have as its logarithm."""
    return replace(one, shift=other.shift) == other and isclose(one.shift, other.shift, rel_tol=1e-9)


def _words(schedule: SamplingSchedule) -> str:
    words = ["evenly spaced" if schedule.spacing == "equal" else "linear-quadratic"]
    if schedule.by_size is not None:
        words.append("shifted by the size of the clip")
    elif schedule.shift != 1:
        words.append(f"shifted by {schedule.shift:g}")
    if schedule.terminal:
        words.append(f"down to {schedule.terminal:g}")
    return ", ".join(words)


def write_ltx_scheduler(found: Found) -> dict[str, Any]:
    """ "scheduler" of the metadata of LTX-Video's authors. Raises CheckpointError for levels that it cannot say."""
    schedule, plain = schedule_of(found), SamplingSchedule()
    names = {"equal": "Uniform", "linear_quadratic": "LinearQuadratic"}
    constant = schedule.shift != 1.0 and schedule.by_size is None
    if constant and schedule.spacing != "equal":
        raise CheckpointError("the authors' files cannot say a constant shift of levels that are not evenly spaced")
    shifts = (None, ShiftBySize())
    same = (schedule.end, schedule.grid, schedule.listed) == (plain.end, plain.grid, plain.listed)
    if not same or schedule.by_size not in shifts or (schedule.terminal and schedule.by_size is None):
        raise CheckpointError("the authors' files cannot say these levels")
    return {
        "_class_name": "RectifiedFlowScheduler",
        "num_train_timesteps": 1000,
        "sampler": "Constant" if constant else names[schedule.spacing],
        "shift": log(schedule.shift) if constant else None,
        "shifting": "SD3" if schedule.by_size is not None else None,
        "target_shift_terminal": schedule.terminal or None,
    }
