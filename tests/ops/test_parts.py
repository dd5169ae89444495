"""Work in parts gives what the whole gives, whatever the shapes, and says what it was given."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitascope.nn.modulation import add_gated, modulate, modulated_layer_norm, modulated_rms_norm
from vitascope.nn.norms import layer_norm, rms_norm
from vitascope.ops import parts
from vitascope.ops.parts import in_parts
from vitascope.ops.rope import rotate


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(
    shape=st.lists(st.integers(1, 7), min_size=2, max_size=4),
    beside=st.lists(st.booleans(), min_size=3, max_size=3),
    values=st.integers(1, 40),
)
def test_every_row_is_worked_on_once_with_what_belongs_to_it(shape: list[int], beside: list[bool], values: int) -> None:
    """beside: whether an axis of what stands beside is that of x or 1."""
    x = draw(*shape)
    sizes = [size if own else 1 for size, own in zip(shape[:-1], beside, strict=False)]
    other, vector = draw(*sizes[-2:], shape[-1], seed=1), draw(shape[-1], seed=2)
    rows: list[int] = []

    def work(x: Tensor, other: Tensor, vector: Tensor) -> Tensor:
        rows.append(x[..., 0].numel())
        return x * other + vector

    with torch.no_grad(), patch.object(parts, "CPU_VALUES", values):
        out = in_parts(work, x, other, vector)
    assert torch.equal(out, x * other + vector)
    assert sum(rows) == x[..., 0].numel()
    longest = max(shape[:-1])
    assert max(rows) * shape[-1] <= max(values, x.numel() // longest)


def test_nothing_is_divided_where_gradients_are_wanted_or_there_is_nothing() -> None:
    calls: list[torch.Size] = []

    def work(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return x * 2

    with patch.object(parts, "CPU_VALUES", 4):
        in_parts(work, draw(6, 4))
        with torch.no_grad():
            assert in_parts(work, draw(0, 4)).shape == (0, 4)
            in_parts(work, draw(40))
            assert calls == [(6, 4), (0, 4), (40,)]
            in_parts(work, draw(6, 4))
    assert calls[3:] == [(1, 4)] * 6


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_gates_in_parts_are_those_of_the_whole(tokens: int, dtype: torch.dtype) -> None:
    """The same operations in fp32, rounded once; a sum over a row may be formed in another order (1e-6), which can turn
    a rounding to 8 bits."""
    x, y = draw(2, 9, 16).to(dtype), draw(2, 9, 16, seed=1).to(dtype)
    shift, scale = draw(2, tokens, 16, seed=2), draw(2, tokens, 16, seed=3)
    plain = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    expected = {
        "norm": plain,
        "scaled norm": plain * scale,
        "modulated norm": modulate(plain, shift, scale),
        "modulated layer norm": modulate(layer_norm(x), shift, scale),
        "gated": x.float() + scale * y.float(),
    }
    with torch.no_grad(), patch.object(parts, "CPU_VALUES", 40):
        found = {
            "norm": rms_norm(x),
            "scaled norm": rms_norm(x, weight=scale),
            "modulated norm": modulated_rms_norm(x, shift, scale),
            "modulated layer norm": modulated_layer_norm(x, shift, scale),
            "gated": add_gated(x, scale, y),
        }
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    for name, wanted in expected.items():
        assert found[name].dtype == dtype
        torch.testing.assert_close(found[name].float(), wanted, rtol=tolerance, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("neighbours", [False, True])
def test_rotations_in_parts_and_as_complex_products_are_the_plain_ones(
    neighbours: bool, per_head: bool, dtype: torch.dtype
) -> None:
    x = draw(2, 7, 9, 8).to(dtype)[:, :, 3:6]  # as queries lie among keys and values
    angles = draw(7, 3, 4, seed=1) if per_head else draw(7, 4, seed=1)
    table = angles.cos(), angles.sin()
    with torch.enable_grad():
        plain = rotate(x, table, neighbours=neighbours, per_head=per_head)
    with torch.no_grad(), patch.object(parts, "CPU_VALUES", 40):
        found = rotate(x, table, neighbours=neighbours, per_head=per_head)
    assert found.dtype == dtype
    # a product and a sum may be rounded once instead of twice; that can turn a rounding to 8 bits
    torch.testing.assert_close(found, plain, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-6)
