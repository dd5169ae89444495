"""Schedules fall from noise to nothing, and are those of diffusers for the models that it samples."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st

from vitascope.core.errors import InputError
from vitascope.diffusion.sampling_schedule import LISTS, SPACINGS, SamplingSchedule, ShiftBySize, read_levels
from vitascope.diffusion.schedules import shifted_levels


@given(
    spacing=st.sampled_from(SPACINGS),
    num_steps=st.integers(1, 100),
    shift=st.floats(0.2, 12.0),
    terminal=st.sampled_from([0.0, 0.1]),
    by_size=st.sampled_from([None, ShiftBySize()]),
    num_cells=st.integers(1, 100_000),
)
def test_levels_fall_from_noise_to_nothing(num_steps: int, num_cells: int, **options: Any) -> None:
    if options["spacing"] == "linear_quadratic":
        options |= {"shift": 1.0, "by_size": None}
    levels = SamplingSchedule(**options).levels(num_steps, num_cells)
    assert len(levels) == num_steps + 1
    assert (levels[0], levels[-1]) == (1.0, 0.0)
    assert all(after < before for before, after in pairwise(levels))
    if options["terminal"] and num_steps > 1:
        assert levels[-2] == pytest.approx(0.1)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_wan(shift: float, num_steps: int) -> None:
    theirs: Any = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    theirs.set_timesteps(num_steps)
    ours = SamplingSchedule(shift=shift, end=0.001, below_one=1e-6).levels(num_steps)
    assert ours == pytest.approx(theirs.sigmas.tolist(), abs=1e-7)


@pytest.mark.parametrize("num_cells", [100, 1024, 3000, 20_000])
def test_ltx(num_cells: int) -> None:
    sizes = {"base_image_seq_len": 1024, "max_image_seq_len": 4096, "base_shift": 0.95, "max_shift": 2.05}
    theirs: Any = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1, **sizes)
    shift = calculate_shift(num_cells, 1024, 4096, 0.95, 2.05)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 9, 9), mu=shift)
    ours = SamplingSchedule(by_size=ShiftBySize(), terminal=0.1).levels(9, num_cells)
    assert ours == pytest.approx(theirs.sigmas.tolist(), abs=1e-5)  # theirs are worked out in fp32


@pytest.mark.parametrize("num_steps", [2, 3, 9, 64])
def test_mochi(num_steps: int) -> None:
    ours = SamplingSchedule("linear_quadratic").levels(num_steps)
    assert ours == pytest.approx([*linear_quadratic_schedule(num_steps, 0.025), 0.0])


def test_plain_and_listed_schedules() -> None:
    assert SamplingSchedule(shift=3.0).levels(24) == pytest.approx(shifted_levels(24, 3.0))
    distilled = SamplingSchedule(listed=(1.0, 0.9, 0.4))
    assert distilled.num_steps == 3
    assert distilled.levels(3) == [1.0, 0.9, 0.4, 0.0]
    with pytest.raises(InputError, match="sampled in 3 steps, not 4"):
        distilled.levels(4)


@pytest.mark.parametrize(
    "options",
    [
        {"spacing": "cosine"}, {"shift": 0.0}, {"terminal": 1.0}, {"end": -0.1}, {"threshold": 1.5}, {"grid": -1},
        {"listed": (0.5, 0.7)}, {"below_one": 1.0},
    ],
)  # fmt: skip
def test_contradictions_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        SamplingSchedule(**options)
    with pytest.raises(InputError):
        SamplingSchedule().levels(0)
    with pytest.raises(InputError):
        ShiftBySize(100, 0.0, 100, 1.0)


def test_levels_are_read_by_name_or_number() -> None:
    assert read_levels("1,0.9,0.5") == read_levels("1,0.9,0.5,0") == (1.0, 0.9, 0.5)
    assert read_levels("ltx-distilled") == LISTS["ltx-distilled"]
    for name, levels in LISTS.items():
        assert SamplingSchedule(listed=levels).levels(len(levels)) == [*levels, 0.0], name
    for text, message in (
        ("distilled", "or one of ltx-distilled, ltx-distilled-second"),
        ("", "numbers such as"),
        ("1,1", "must fall"),
        ("0", "two or more"),
        ("1,nan", "between 0 and 1"),
    ):
        with pytest.raises(InputError, match=message):
            read_levels(text)


def test_listed_levels_stay_below_one_where_the_solver_needs_it() -> None:
    schedule = SamplingSchedule(listed=(1.0, 0.5), below_one=1e-6)
    assert schedule.levels(2) == [1 - 1e-6, 0.5, 0.0]
