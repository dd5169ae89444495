"""What a model is sampled at, as the files of other projects say it: written from a `SamplingSchedule`.

Reading is in `published` and `original`, beside what each family allows.
"""

from __future__ import annotations

from math import log
from typing import Any

from vitascope.core.errors import CheckpointError
from vitascope.diffusion.sampling_schedule import SamplingSchedule, ShiftBySize
from vitascope.tasks.discover import Found
from vitascope.tasks.kinds import PIPELINES, read_schedule
from vitascope.tasks.original import original_defaults


def schedule_of(found: Found) -> SamplingSchedule:
    """The levels that belong to a model that was found."""
    kind = PIPELINES[found.pipeline]
    if found.kind == "diffusers":
        return read_schedule(found.path, kind)
    return original_defaults(found, kind.defaults).schedule


def write_scheduler(found: Found) -> dict[str, Any]:
    """The `scheduler_config.json` of diffusers with the model's levels.

    Levels that a distilled model lists have no place there (`lost_in_diffusers`).
    """
    schedule = schedule_of(found)
    if found.pipeline.startswith("Wan"):
        return {
            "_class_name": "UniPCMultistepScheduler",
            "flow_shift": schedule.shift,
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
        }
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


def lost_in_diffusers(found: Found) -> list[str]:
    """What of a model's sampling the configurations of diffusers cannot say, in words for people: a distilled model
    lists its levels, which diffusers is given at every call."""
    if not found.pipeline:
        return []
    kind = PIPELINES[found.pipeline]
    listed = schedule_of(found).listed
    if not listed or found.kind == "diffusers":
        return []
    levels = ",".join(f"{level:g}" for level in listed)
    timesteps = ", ".join(f"{1000 * level:g}" for level in listed)
    scale = original_defaults(found, kind.defaults).guidance.scale
    return [
        f"the levels that the model lists ({levels}) and its guidance scale {scale:g} have no place in the layout of "
        f"diffusers: give --levels {levels} --guidance-scale {scale:g} with it (in diffusers timesteps=[{timesteps}], "
        f"guidance_scale={scale:g})"
    ]


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
