"""AdaLN-Zero, feed-forward and norms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitascope.core.errors import InputError
from vitascope.nn import feed_forward as feed_forward_module
from vitascope.nn import resnet
from vitascope.nn.feed_forward import KINDS, FeedForward, FeedForwardKind
from vitascope.nn.modulation import (
    ModulationProjection,
    OffsetModulation,
    OwnModulation,
    modulate,
    modulated_layer_norm,
)
from vitascope.nn.norms import RMSNorm, layer_norm


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_all_modulations_start_as_identity_with_closed_gates() -> None:
    x, condition = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 1, 6)
    projected = ModulationProjection(6, 8, 12)(condition)
    for vectors in (OwnModulation(6, 8, 9)(condition), OffsetModulation(8, 9)(projected)):
        assert len(vectors) == 9
        assert all(vector.shape == (2, 3, 1, 8) and not vector.any() for vector in vectors)
        assert torch.equal(modulate(x, vectors[0], vectors[1]), x)


def test_vectors_are_read_in_order_and_offsets_are_added() -> None:
    own = OwnModulation(4, 3, 2)
    nn.init.normal_(own.projection.linear.weight)
    condition = torch.randn(5, 4)
    shift, scale = own(condition)
    assert torch.equal(torch.cat([shift, scale], -1), own.projection.linear(F.silu(condition)))
    torch.testing.assert_close(modulate(torch.full((5, 3), 2.0), shift, scale), 2 + 2 * scale + shift)
    offset = OffsetModulation(3, 2)
    with torch.no_grad():
        offset.offset.copy_(torch.arange(6.0))
    first, second = offset(torch.arange(9.0).expand(2, 9))  # a projection for three vectors; the block takes two
    assert first.tolist() == [[0.0, 2.0, 4.0]] * 2
    assert second.tolist() == [[6.0, 8.0, 10.0]] * 2


@pytest.mark.parametrize("vectors", [1, 5])
@pytest.mark.parametrize("num_clips", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_the_norm_and_its_modulation_are_one(
    num_clips: int, vectors: int, dtype: torch.dtype, tolerance: float
) -> None:
    # bf16: both round once, from fp32 values that differ in their last bits: one step of bf16 at most
    x = (torch.randn(num_clips, 5, 16) * 3 + 1).to(dtype)
    shift, scale = torch.randn(2, num_clips, vectors, 16)
    expected = modulate(layer_norm(x, 1e-4), shift, scale).to(dtype)
    found = modulated_layer_norm(x, shift, scale, 1e-4)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_long_clips_pass_the_feed_forward_in_parts(kind: FeedForwardKind, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, seen = FeedForward(6, 10, kind), torch.randn(2, 11, 6), []
    layer.fall.register_forward_hook(lambda module, given, out: seen.append(out.shape[:-1].numel()))
    whole = layer(x)
    monkeypatch.setattr(feed_forward_module, "CPU_ROWS", 8)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), whole)
    torch.testing.assert_close(layer(x), whole)  # not where gradients are wanted
    assert seen == [22, 8, 8, 6, 22]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_feed_forward_kinds(kind: FeedForwardKind, bias: bool) -> None:
    layer = FeedForward(6, 10, kind, bias=bias)
    assert (layer.rise.bias is None) == (layer.fall.bias is None) == (not bias)
    x = torch.randn(2, 3, 6)
    hidden = layer.rise(x)
    assert hidden.shape[-1] == (10 if kind == "gelu" else 20)
    if kind == "gelu":
        hidden = F.gelu(hidden, approximate="tanh")
    else:
        gate = hidden[..., 10:]
        hidden = hidden[..., :10] * (F.gelu(gate, approximate="tanh") if kind == "geglu" else F.silu(gate))
    torch.testing.assert_close(layer(x), layer.fall(hidden))


def test_an_unknown_feed_forward_is_refused() -> None:
    with pytest.raises(InputError, match="valid values: gelu, geglu, swiglu"):
        FeedForward(6, 10, "reglu")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_gives_unit_mean_square_times_its_weight(dtype: torch.dtype) -> None:
    norm = RMSNorm(64)
    x = (torch.randn(3, 64) * torch.tensor([[0.01], [1.0], [300.0]])).to(dtype)
    out = norm(x)
    assert out.dtype == dtype
    # 0.01^2 beside the epsilon of 1e-6: 0.5% too small; bf16 rounds by up to 0.4%
    torch.testing.assert_close(out.float().square().mean(-1), torch.ones(3), rtol=0.012, atol=0)
    with torch.no_grad():
        norm.weight.fill_(2.0)
    torch.testing.assert_close(norm(x).float(), 2 * out.float(), rtol=0.01, atol=0.01)


def test_layer_norm_gives_mean_0_and_variance_1_in_float32() -> None:
    out = layer_norm((torch.randn(4, 32) * 5 + 3).bfloat16())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.mean(-1), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.var(-1, correction=0), torch.ones(4), rtol=1e-4, atol=0)


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_a_channel_norm_in_parts_is_that_of_all_at_once(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitascope.ops.parts.CPU_VALUES", 40)
    norm, x = resnet.ChannelNorm(4), torch.randn(1, 2, rows, 5, 4)
    nn.init.normal_(norm.weight)
    expected = norm(x)
    with torch.no_grad():
        assert torch.equal(norm(x), expected)  # the same operations, on slices
