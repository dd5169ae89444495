from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vitascope.core.errors import TrainingError
from vitascope.training.optimizers import build_optimizers, learning_rate_factor
from vitascope.training.recipe import OptimizerRecipe, ScheduleRecipe

CPU = torch.device("cpu")


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["trapezoid", "cosine", "linear"]),
    st.integers(0, 20),
    st.integers(30, 200),
    st.floats(0.0, 0.5),
)
def test_schedules_rise_then_fall_to_the_final_fraction(kind: str, warmup: int, num_steps: int, final: float) -> None:
    schedule = ScheduleRecipe(kind, warmup, 0.4, final)  # type: ignore[arg-type]
    factors = [learning_rate_factor(step, num_steps, schedule) for step in range(num_steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[: warmup + 1] == sorted(factors[: warmup + 1])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert max(factors) == pytest.approx(1.0)
    assert learning_rate_factor(num_steps, num_steps, schedule) == pytest.approx(final)


def test_trapezoid_plateau_and_constant() -> None:
    schedule = ScheduleRecipe("trapezoid", warmup_steps=4, decay_fraction=0.2)
    assert [learning_rate_factor(step, 100, schedule) for step in (0, 4, 80, 90)] == pytest.approx([0.2, 1, 1, 0.5])
    # an extended run is back on its plateau
    assert learning_rate_factor(99, 1000, schedule) == 1.0
    assert learning_rate_factor(10_000, 10, ScheduleRecipe("constant")) == 1.0


def model() -> nn.ModuleDict:
    return nn.ModuleDict(
        {"embed": nn.Embedding(5, 4), "hidden": nn.Linear(4, 4), "conv": nn.Conv1d(4, 4, 3), "head": nn.Linear(4, 2)}
    )


def test_muon_takes_the_hidden_matrices_alone() -> None:
    net = model()
    optimizers = build_optimizers(net, OptimizerRecipe("muon"), CPU)
    hidden, kernel = optimizers.parts["muon"].param_groups[0]["params"]
    assert hidden is net.get_parameter("hidden.weight")
    # a kernel goes as the matrix of its output channels by the rest, in the same memory
    weight = net.get_parameter("conv.weight")
    assert kernel.shape == (4, 12)
    assert kernel.data_ptr() == weight.data_ptr()
    (plain,) = optimizers.parts["adamw"].param_groups
    assert len(plain["params"]) == 5
    assert plain["weight_decay"] == 0
    total = sum(p.numel() for part in optimizers.parts.values() for g in part.param_groups for p in g["params"])
    assert total == sum(p.numel() for p in net.parameters())


def test_a_kernel_moves_through_its_matrix_and_keeps_no_gradient_there() -> None:
    net = nn.Conv1d(4, 4, 3)
    before = net.weight.detach().clone()
    optimizers = build_optimizers(net, OptimizerRecipe("muon", weight_decay=0.0, muon_learning_rate=0.1), CPU)
    net(torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    optimizers.step()
    step = (net.weight - before).flatten(1)
    # Muon's update is the gradient's with all its singular values near one size: 0.2 sqrt(longer side) x rate each
    singular = torch.linalg.svdvals(step.detach()) / (0.1 * 0.2 * 12**0.5)
    assert ((singular > 0.6) & (singular < 1.3)).all()
    assert optimizers.parts["muon"].param_groups[0]["params"][0].grad is None


def test_states_come_from_a_checkpoint_and_settings_from_the_recipe() -> None:
    old, new = (
        build_optimizers(model(), OptimizerRecipe("muon", weight_decay=decay, betas=betas), CPU)
        for decay, betas in ((0.01, (0.9, 0.95)), (0.5, (0.5, 0.6)))
    )
    settings = [{**group, "params": None} for part in new.parts.values() for group in part.param_groups]
    new.load_state_dict(old.state_dict())
    assert [{**group, "params": None} for part in new.parts.values() for group in part.param_groups] == settings
    assert any(group["weight_decay"] == 0.5 for group in settings)


def test_factor_scales_each_peak_and_frozen_parameters_are_left_out() -> None:
    net = model()
    net["embed"].requires_grad_(False)
    optimizers = build_optimizers(net, OptimizerRecipe("muon", learning_rate=0.1, muon_learning_rate=0.4), CPU)
    optimizers.set_factor(0.5)
    optimizers.set_factor(0.25)
    assert [group["lr"] for group in optimizers.parts["muon"].param_groups] == [0.1]
    assert {group["lr"] for group in optimizers.parts["adamw"].param_groups} == {0.025}
    assert all(p.requires_grad for part in optimizers.parts.values() for g in part.param_groups for p in g["params"])
    with pytest.raises(TrainingError, match="no trainable"):
        build_optimizers(nn.Identity(), OptimizerRecipe(), CPU)
    with pytest.raises(TrainingError, match="optimisers"):
        optimizers.load_state_dict({"adamw": {}})
