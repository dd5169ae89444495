"""Level lists fall from start to 0; densities and weights have their known values."""

from __future__ import annotations

from itertools import pairwise
from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitascope.core.errors import InputError
from vitascope.core.protocols import Prediction
from vitascope.diffusion.paths import Path, RectifiedFlow, VariancePreserving
from vitascope.diffusion.schedules import (
    LevelDistribution,
    check_levels,
    karras_levels,
    min_snr_weight,
    resolution_shift,
    shift_level,
    shifted_levels,
    uniform_levels,
    x0_weight,
)

PATHS: list[Path] = [RectifiedFlow(), VariancePreserving("cosine"), VariancePreserving("scaled_linear")]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["uniform", "shifted", "karras"]),
    num_steps=st.integers(1, 60),
    path=st.sampled_from(PATHS),
    start=st.floats(0.2, 1.0),
    shift=st.floats(0.2, 12.0),
)
def test_lists_fall_strictly_from_start_to_zero(
    name: str, num_steps: int, path: Path, start: float, shift: float
) -> None:
    lists = {
        "uniform": lambda: uniform_levels(num_steps, start),
        "shifted": lambda: shifted_levels(num_steps, shift, start),
        "karras": lambda: karras_levels(num_steps, path, start),
    }
    levels = lists[name]()
    assert len(levels) == num_steps + 1
    assert (levels[0], levels[-1]) == (start, 0.0)
    assert all(after < before for before, after in pairwise(levels))
    assert all(type(level) is float for level in levels)


def test_known_lists() -> None:
    assert uniform_levels(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert uniform_levels(2, start=0.5) == [0.5, 0.25, 0.0]
    assert shifted_levels(2, 3.0) == pytest.approx([1.0, 0.75, 0.0])
    assert shifted_levels(3, 1.0) == pytest.approx(uniform_levels(3))
    flow = karras_levels(3, RectifiedFlow(), ratio_max=80.0, ratio_min=0.02)
    middle = ((80 ** (1 / 7) + 0.02 ** (1 / 7)) / 2) ** 7
    assert flow == pytest.approx([1.0, middle / (1 + middle), 0.02 / 1.02, 0.0])


def test_shift_is_undone_and_keeps_the_ends() -> None:
    level = torch.linspace(0, 1, 11, dtype=torch.float64)
    moved = shift_level(level, 3.0)
    assert (moved[0].item(), moved[-1].item()) == (0.0, 1.0)
    torch.testing.assert_close(shift_level(moved, 1 / 3.0), level)
    ratio = (1 - moved[5]) / moved[5]
    assert ratio.item() == pytest.approx((1 / 3.0) * (0.5 / 0.5))
    assert resolution_shift(400, 100) == 2.0


@pytest.mark.parametrize("levels", [[1.0], [], [1.0, 1.0], [0.2, 0.5], [1.5, 0.0], [1.0, float("nan")], [0.5, -0.1]])
def test_what_is_no_schedule_is_refused(levels: list[float]) -> None:
    with pytest.raises(InputError, match="schedule"):
        check_levels(levels)


def test_bad_options_are_refused() -> None:
    for call in (
        lambda: uniform_levels(0),
        lambda: uniform_levels(4, start=0.0),
        lambda: shifted_levels(4, 0.0),
        lambda: karras_levels(4, RectifiedFlow(), ratio_min=0.0),
        lambda: resolution_shift(0, 4),
        lambda: LevelDistribution(std=0.0),
        lambda: LevelDistribution(low=0.5, high=0.5),
        lambda: LevelDistribution("normal"),  # type: ignore[arg-type]
        lambda: min_snr_weight(RectifiedFlow(), torch.ones(1), gamma=0.0),
    ):
        with pytest.raises(InputError):
            call()


def test_level_densities() -> None:
    def draw(distribution: LevelDistribution) -> torch.Tensor:
        return distribution.sample((20_000,), torch.Generator().manual_seed(1))

    uniform = draw(LevelDistribution("uniform"))
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert uniform.std().item() == pytest.approx(1 / sqrt(12), abs=0.01)
    normal = draw(LevelDistribution("logit_normal", mean=0.5, std=0.8)).logit()
    assert normal.mean().item() == pytest.approx(0.5, abs=0.02)
    assert normal.std().item() == pytest.approx(0.8, abs=0.02)
    shifted = draw(LevelDistribution("logit_normal", shift=3.0))
    assert shifted.median().item() == pytest.approx(0.75, abs=0.01)
    cut = draw(LevelDistribution("uniform", low=0.2, high=0.4))
    assert 0.2 <= cut.min() < 0.201
    assert 0.399 < cut.max() <= 0.4
    assert torch.equal(shifted, draw(LevelDistribution("logit_normal", shift=3.0)))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["velocity", "v", "noise", "x0"])
def test_x0_weight_turns_one_error_into_the_other(path: Path, kind: Prediction) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, noise, wrong = torch.randn(3, 4, 1, 6, generator=generator, dtype=torch.float64)
    level = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64).reshape(4, 1, 1)
    x = path.add_noise(x0, noise, level)
    error = (path.from_x0(kind, wrong, x, level) - path.target(kind, x0, noise, level)) ** 2
    weighted = x0_weight(path, level, kind) * (wrong - x0) ** 2
    torch.testing.assert_close(error, weighted, rtol=1e-5, atol=1e-7)


def test_velocity_weight_on_rectified_flow_is_one_over_the_square_of_the_level() -> None:
    weight = x0_weight(RectifiedFlow(), torch.tensor([0.0, 0.05, 0.5, 1.0]), min_level=0.1)
    torch.testing.assert_close(weight, torch.tensor([100.0, 100.0, 4.0, 1.0]))


def test_min_snr_golden_values() -> None:
    """On rectified flow the SNR is ((1 - t) / t)^2: 81, 9, 1, 1/9, 0 here; gamma 5."""
    level = torch.tensor([0.1, 0.25, 0.5, 0.75, 1.0])
    flow = RectifiedFlow()
    x0 = torch.tensor([5.0, 5.0, 1.0, 1 / 9, 0.0])
    torch.testing.assert_close(min_snr_weight(flow, level), x0)
    noise = torch.tensor([5 / 81, 5 / 9, 1.0, 1.0, 1.0])
    torch.testing.assert_close(min_snr_weight(flow, level, "noise"), noise)
    torch.testing.assert_close(min_snr_weight(flow, level, "velocity"), x0 * level**2)
    cosine = VariancePreserving("cosine")
    snr = cosine.log_snr(level[:4]).exp().float()
    expected = snr.clamp(max=5.0) / (snr + 1)
    torch.testing.assert_close(min_snr_weight(cosine, level[:4], "v"), expected, rtol=1e-5, atol=1e-6)
