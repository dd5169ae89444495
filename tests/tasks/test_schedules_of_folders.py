"""Scheduler configurations of folders against the schedulers of diffusers: the same levels, or a clear refusal."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from hypothesis import example, given
from hypothesis import strategies as st

from vitascope.core.errors import CheckpointError
from vitascope.core.tracks import Track
from vitascope.diffusion.guidance import GuidedDenoiser
from vitascope.diffusion.paths import RectifiedFlow
from vitascope.diffusion.sampling_schedule import SamplingSchedule
from vitascope.tasks.kinds import PIPELINES
from vitascope.weights.foreign import ForeignConfig

STEPS, CELLS = st.integers(2, 40), st.integers(1, 20_000)
TERMINALS = st.sampled_from([None, 0.1, 0.02])


def ours(pipeline: str, scheduler: Any, **changes: Any) -> SamplingSchedule:
    """Of a folder with this scheduler, as JSON brings it."""
    values = json.loads(
        json.dumps({**scheduler.config, "_class_name": type(scheduler).__name__, **changes}, default=list)
    )
    kind, theirs = PIPELINES[pipeline], ForeignConfig(values, "scheduler_config.json")
    schedule = kind.schedule(theirs, kind.defaults)
    theirs.done()
    return schedule


@given(STEPS, st.sampled_from([1.0, 3.0, 4.0, 5.0, 8.0, 16.0]), st.sampled_from(["linspace", "leading", "trailing"]))
@example(9, 1.0, "linspace")
@example(37, 1.0, "linspace")
@example(68, 4.0, "linspace")
def test_wan(steps: int, shift: float, spacing: Any) -> None:
    scheduler: Any = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, timestep_spacing=spacing
    )
    scheduler.set_timesteps(steps)
    schedule = ours("WanPipeline", scheduler)
    levels = schedule.levels(steps)
    assert levels == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)
    # what the model is told: integers, of levels that may lie on them, and that tracks have in single precision
    nothing: Any = None
    guided = GuidedDenoiser(nothing, RectifiedFlow(), nothing, level_grid=schedule.grid, levels=tuple(levels))
    track = Track(torch.zeros(1, 1, steps, 1, 1), torch.tensor(levels[:-1]).view(1, 1, -1, 1, 1), torch.zeros(steps))
    told = guided._told({"video": track})["video"].noise.flatten()
    assert [round(1000 * level) for level in told.tolist()] == scheduler.timesteps.tolist()


@given(STEPS, CELLS, st.floats(0.3, 20.0), st.booleans(), TERMINALS)
def test_ltx(steps: int, cells: int, shift: float, by_size: bool, terminal: Any) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(
        shift=shift, use_dynamic_shifting=by_size, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024,
        shift_terminal=terminal,
    )  # fmt: skip
    scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=calculate_shift(cells, 1024, 4096, 0.95, 2.05)
    )
    assert ours("LTXPipeline", scheduler).levels(steps, cells) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-5)


@given(STEPS, st.floats(0.3, 20.0))
def test_mochi(steps: int, shift: float) -> None:
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift, invert_sigmas=True)
    scheduler.set_timesteps(sigmas=[float(level) for level in linear_quadratic_schedule(steps, 0.025)])
    expected = (1 - scheduler.sigmas.double()).tolist()
    assert ours("MochiPipeline", scheduler).levels(steps) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("pipeline", "changes", "message"),
    [
        ("WanPipeline", {"num_train_timesteps": 500}, "num_train_timesteps is 500; only 1000"),
        ("WanPipeline", {"shift_terminal": 0.1}, "shift_terminal is 0.1; only None"),
        ("WanPipeline", {"solver_order": 1}, "solver_order is 1; only 2"),
        ("WanPipeline", {"use_karras_sigmas": True}, "use_karras_sigmas is True; only False"),
        ("WanPipeline", {"use_dynamic_shifting": True}, "use_dynamic_shifting is True; only False"),
        ("LTXPipeline", {"num_train_timesteps": 500}, "num_train_timesteps is 500; only 1000"),
        ("LTXPipeline", {"use_beta_sigmas": True}, "use_beta_sigmas is True; only False"),
        ("LTXPipeline", {"use_exponential_sigmas": True}, "use_exponential_sigmas is True; only False"),
        ("LTXPipeline", {"time_shift_type": "linear"}, "time_shift_type is 'linear'; only 'exponential'"),
        ("LTXPipeline", {"stochastic_sampling": True}, "stochastic_sampling is True; only False"),
        # where a pipeline lists the levels, diffusers steps along others than it tells the model
        ("LTXConditionPipeline", {"shift": 3.0}, r"shift is 3.0; only 1.0"),
        ("LTXConditionPipeline", {"shift_terminal": 0.1}, "shift_terminal is 0.1; only None"),
        ("MochiPipeline", {"invert_sigmas": False}, "invert_sigmas is False; only True"),
    ],
)
def test_other_schedulers_are_refused_by_key_and_value(pipeline: str, changes: dict[str, Any], message: str) -> None:
    wan = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    euler = FlowMatchEulerDiscreteScheduler(invert_sigmas=pipeline == "MochiPipeline")
    scheduler = wan if pipeline == "WanPipeline" else euler
    ours(pipeline, scheduler)
    with pytest.raises(CheckpointError, match=message):
        ours(pipeline, scheduler, **changes)
