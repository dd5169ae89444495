"""Weights rounded once give what autocast makes of them at every call."""

from __future__ import annotations

import torch
from torch import nn

from vitascope.nn.precision import store_matrices


def test_rounding_once_equals_autocast_to_the_bit_and_leaves_the_rest_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.LayerNorm(72), nn.Linear(72, 5))
    x = torch.randn(4, 3, 5, 5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = net(x)
        store_matrices(net, torch.bfloat16)
        assert torch.equal(net(x), expected)
    dtypes = {name: parameter.dtype for name, parameter in net.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.bfloat16} == {
        "0.weight", "0.bias", "4.weight", "4.bias",
    }  # fmt: skip
    assert expected.std() > 0.1
