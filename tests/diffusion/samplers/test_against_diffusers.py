"""The same model through diffusers' schedulers and through our samplers, on their own time steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from vitascope.core.protocols import Prediction
from vitascope.core.tracks import Track
from vitascope.diffusion.paths import Path, RectifiedFlow, VariancePreserving
from vitascope.diffusion.samplers import SAMPLERS

SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def model(x: Tensor, level: Tensor | float) -> Tensor:
    """Some smooth prediction, nothing like the truth."""
    return 0.8 * torch.tanh(x) + 0.1 * x + 0.2 * torch.as_tensor(level).double().cos()


def ours(name: str, path: Path, kind: Prediction, x: Tensor, levels: list[float]) -> Tensor:
    def denoise(tracks: dict[str, Track]) -> dict[str, Tensor]:
        track = tracks["audio"]
        return {"audio": path.to_x0(kind, model(track.values, track.noise), track.values, track.noise)}

    track = Track(x, torch.full((x.shape[0], 1, x.shape[2]), levels[0], dtype=x.dtype), torch.arange(x.shape[2]))
    *_, last = SAMPLERS[name](denoise, {"audio": track}, levels, path=path)
    return last.tracks["audio"].values


def theirs(scheduler: Any, x: Tensor, level_of: Any) -> Tensor:
    for time in scheduler.timesteps:
        x = scheduler.step(model(x, level_of(time)), time, x, return_dict=False)[0]
    return x


@pytest.fixture
def start() -> Tensor:
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("kind", "their_kind"), [("noise", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
@pytest.mark.parametrize(
    ("name", "scheduler_class", "options", "tolerance"),
    [
        ("euler", DDIMScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}, 1e-5),
        ("dpmpp_2m", DPMSolverMultistepScheduler, {"final_sigmas_type": "zero"}, 1e-4),
        ("unipc", UniPCMultistepScheduler, {"final_sigmas_type": "zero"}, 1e-4),
    ],
)
@pytest.mark.parametrize("num_steps", [1, 2, 4, 10, 20])  # divisors of 1000: DDIMScheduler steps by 1000 // n
def test_scaled_linear(
    name: str,
    scheduler_class: Any,
    options: dict[str, Any],
    tolerance: float,
    kind: Prediction,
    their_kind: str,
    num_steps: int,
    start: Tensor,
) -> None:
    scheduler = scheduler_class(**SCALED_LINEAR, **options, prediction_type=their_kind)
    scheduler.set_timesteps(num_steps)
    levels = [(int(time) + 1) / 1000 for time in scheduler.timesteps] + [0.0]
    expected = theirs(scheduler, start, lambda time: (int(time) + 1) / 1000)
    mine = ours(name, VariancePreserving("scaled_linear"), kind, start, levels)
    torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "scheduler_class"), [("euler", FlowMatchEulerDiscreteScheduler), ("heun", FlowMatchHeunDiscreteScheduler)]
)
def test_rectified_flow(name: str, scheduler_class: Any, start: Tensor) -> None:
    scheduler = scheduler_class(shift=3.0)
    scheduler.set_timesteps(8)
    levels = list(dict.fromkeys(scheduler.sigmas.double().tolist()))
    expected = theirs(scheduler, start.float(), lambda time: float(time) / 1000)
    mine = ours(name, RectifiedFlow(), "velocity", start.float(), levels)
    torch.testing.assert_close(mine.double(), expected.double(), rtol=1e-5, atol=1e-5)
