"""Bytes counted on tensors without values against what was derived by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitascope.nn.footprint import footprint, hollow, without_values

MB = 1 << 20


def zeros(mb: int) -> Tensor:
    return torch.zeros(mb * MB // 4)


def test_the_peak_is_what_was_alive_together() -> None:
    def run() -> Tensor:
        a = zeros(8)
        b = a + 1  # 16
        del a  # 8
        c = b.view(2, -1)[1]  # a view: nothing new
        d = c * 2  # 8 + 4
        del b, c
        return d

    with without_values():
        found = footprint(run)
    assert found.peak == 16 * MB
    assert found.kept == 4 * MB


def test_what_was_there_and_its_views_are_not_counted() -> None:
    with without_values():
        before = zeros(8)
        assert footprint(lambda: before.view(2, -1)[0].unsqueeze(0)).peak == 0
        assert footprint(lambda: before[: MB // 4].clone()).peak == MB
        assert footprint(lambda: before.mul_(2)).peak == 0


def test_layers_have_the_dtypes_asked_for_and_no_values() -> None:
    like = nn.Linear(1024, 2048).state_dict()
    like["weight"] = like["weight"].bfloat16()
    with without_values(), torch.autocast("cpu", torch.bfloat16):
        layer = hollow(lambda: nn.Linear(1024, 2048), like)
        assert layer.weight.dtype == torch.bfloat16
        assert layer.bias.dtype == torch.float32
        x = torch.zeros(512, 1024)
        found = footprint(lambda: layer(x))
    # autocast's copies of the input (1 MB) and of the bias (4 KB) beside the result (2 MB)
    assert found.kept == 2 * MB
    assert found.peak == 3 * MB + 4096


def test_attention_does_not_hold_its_scores() -> None:
    with without_values():
        q = torch.zeros(1, 4, 8192, 64)
        found = footprint(lambda: nn.functional.scaled_dot_product_attention(q, q, q))
    scores = 4 * 8192 * 8192 * 4
    assert found.peak < scores / 50


def test_what_convolutions_take_for_themselves_is_counted_where_a_cpu_does_them() -> None:
    with without_values():
        layer = nn.Conv3d(16, 32, (3, 3, 3), padding=(0, 1, 1))
        # torch takes its own kernel where channels, frames and rows make 20,480 at most
        small, large = (torch.zeros(1, 16, 6, rows, 64) for rows in (64, 256))
        kept = 32 * 4 * 64 * 64 * 4
        patches = 16 * 27 * 4 * 64 * 64 * 4
        assert footprint(lambda: layer(small)).peak == patches + 16 * 6 * 64 * 64 * 4 + 2 * kept
        assert footprint(lambda: layer(large)).peak == 4 * kept + 2 * 32 * 16 * 27 * 4
        assert footprint(lambda: layer(small), "cuda").peak == kept
