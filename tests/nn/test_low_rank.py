"""Low-rank branches beside a linear map against the sum of the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vitascope.nn.low_rank import Branch, LowRankLinear
from vitascope.nn.precision import matrix_names, store_matrices


def make(bias: bool = True) -> tuple[nn.Linear, LowRankLinear, torch.Tensor]:
    """A linear map, the same with branches, and the weight that stands for all of it."""
    torch.manual_seed(0)
    base = nn.Linear(6, 9, bias=bias)
    branches = [
        Branch(slice(None), torch.randn(2, 6), torch.randn(9, 2)),
        Branch(slice(3, 6), torch.randn(1, 6), torch.randn(3, 1)),
        Branch(torch.tensor([0, 4, 8]), torch.randn(3, 6), torch.randn(3, 3)),
    ]
    weight = base.weight.detach().clone()
    for branch in branches:
        weight[branch.rows] += branch.up @ branch.down
    return base, LowRankLinear(base, branches), weight


@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_those_of_the_sum(bias: bool) -> None:
    base, wrapped, weight = make(bias)
    x = torch.randn(2, 5, 6, requires_grad=True)
    expected = nn.functional.linear(x, weight, base.bias)
    torch.testing.assert_close(wrapped(x), expected)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    (grad,) = torch.autograd.grad(wrapped(x).square().sum(), x)
    torch.testing.assert_close(grad, wanted)


def test_it_passes_for_the_linear_map_it_stands_for() -> None:
    base, wrapped, _ = make()
    assert wrapped.weight is base.weight
    assert wrapped.state_dict().keys() == base.state_dict().keys()
    assert matrix_names(nn.Sequential(wrapped)) == {"0.weight", "0.bias"}
    assert not LowRankLinear(base.eval(), [Branch(slice(0, 1), torch.ones(1, 6), torch.ones(1, 1))]).training


def test_factors_follow_the_dtype_of_the_weight() -> None:
    _, wrapped, weight = make()
    store_matrices(half := copy.deepcopy(wrapped), torch.bfloat16)
    x = torch.randn(4, 6)
    out = half(x.bfloat16())
    assert out.dtype == torch.bfloat16
    # three products and two sums of 8 bits
    torch.testing.assert_close(out.float(), nn.functional.linear(x, weight, wrapped.bias), rtol=0.05, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(wrapped(x).float(), out.float(), rtol=0.05, atol=0.1)
