"""How models in the files of their authors are sampled: what diffusers keeps in a scheduler's configuration.

Sources: the command lines and configurations that the authors publish beside the weights (Wan 2.1, LTX-Video, Mochi 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import exp
from typing import Any

from vitascope.core.errors import CheckpointError, InputError, choice
from vitascope.diffusion.sampling_schedule import SamplingSchedule, ShiftBySize, Spacing
from vitascope.models.parts import reading_config
from vitascope.tasks.discover import DENOISER, Found
from vitascope.tasks.pipeline import Defaults
from vitascope.weights.foreign import ForeignConfig

WAN_SHIFTS = {"text": (5.0, 50), "picture": (3.0, 40), "two pictures": (16.0, 50)}
"""Shift and steps by what a clip starts from; pictures at 480 rows (at 720 the authors shift by 5)."""
WAN_SCHEDULE = SamplingSchedule(end=0.001, below_one=1e-6, grid=1000)
"""Levels as integer timesteps of 1000; one short of 1 keeps log(alpha) finite."""
LTX_SPACINGS: dict[str, Spacing] = {"Uniform": "equal", "LinearQuadratic": "linear_quadratic", "Constant": "equal"}


def original_defaults(found: Found, own: Defaults) -> Defaults:
    """`own`, of the family's pipeline, with the steps and levels that belong to the files.

    Raises CheckpointError for a sampler in their notes that is not known.
    """
    denoiser = found.parts[DENOISER]
    if denoiser.family == "wan":
        config: Any = denoiser.config
        kind = "text" if not config.image_width else "two pictures" if config.image_positions else "picture"
        shift, steps = WAN_SHIFTS[kind]
        return replace(own, num_inference_steps=steps, schedule=replace(WAN_SCHEDULE, shift=shift))
    if denoiser.family == "ltx":
        return _ltx_defaults(found.notes, own)
    return own


def _ltx_defaults(notes: Mapping[str, Any], own: Defaults) -> Defaults:
    """A distilled model lists the levels that it knows, and is sampled at those without guidance."""
    theirs = ForeignConfig(notes.get("scheduler") or {}, "the scheduler of the LTX file")
    theirs.ignore("num_train_timesteps", "base_resolution")
    spacing = choice("sampler", theirs.take("sampler", "Uniform"), LTX_SPACINGS)
    shifting, terminal = theirs.take("shifting", None), theirs.number("target_shift_terminal")
    if shifting not in (None, "SD3"):
        raise CheckpointError(f"shifting {shifting!r} of the LTX file is not known; valid: SD3, or none")
    shift = theirs.number("shift")
    theirs.done()
    with reading_config(theirs.label):
        schedule = SamplingSchedule(
            LTX_SPACINGS[spacing],
            shift=exp(shift) if spacing == "Constant" and shift is not None else 1.0,
            by_size=ShiftBySize() if shifting else None,
            terminal=terminal or 0.0 if shifting else 0.0,
        )
    listed = notes.get("allowed_inference_steps")
    if not listed:
        return replace(own, schedule=schedule)
    try:
        levels = tuple(sorted((float(level) for level in listed), reverse=True))
        distilled = SamplingSchedule(listed=levels)
    except (TypeError, ValueError, InputError) as error:
        raise CheckpointError(f"the LTX file lists levels that cannot be sampled: {listed!r}") from error
    return replace(own, schedule=distilled, guidance=replace(own.guidance, scale=1.0), num_inference_steps=len(levels))
