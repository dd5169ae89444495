"""Causal layers in one and three dimensions: nothing from the future, and chunks equal the whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vitascope.core.errors import ShapeError
from vitascope.nn import causal_conv
from vitascope.nn.causal_conv import CausalConv3d, TailCache
from vitascope.nn.conv1d import (
    CausalConv1d,
    ResidualUnit1d,
    Snake,
    StepNorm,
    SubPixelUpsample,
    depth_to_time,
    time_to_depth,
)
from vitascope.nn.resample import depth_to_space, space_to_depth
from vitascope.nn.resnet import ChannelNorm, ResidualBlock


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def filled(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer.requires_grad_(False)


def in_chunks(layer: nn.Module, x: Tensor, chunks: tuple[int, ...], axis: int) -> Tensor:
    cache = TailCache()
    return torch.cat([layer(part, cache) for part in x.split(chunks, axis)], axis)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (2, 1, 1), (4, 3, 1)])
@pytest.mark.parametrize("make", [lambda kernel: CausalConv3d(3, 3, kernel), lambda kernel: ResidualBlock(3, kernel)])
@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1, 1), (4, 2), (1, 5)])
@pytest.mark.parametrize("band_bytes", [1, 900, 4 << 20])
def test_video_chunks_equal_the_whole_and_see_no_future(make, kernel, chunks, band_bytes, monkeypatch) -> None:
    """Also where the rows of a chunk are read one at a time, or three of the four and then the last."""
    monkeypatch.setattr(causal_conv, "CPU_BAND_BYTES", band_bytes)
    layer = filled(make(kernel))
    x = torch.randn(2, 6, 4, 5, 3)
    whole = layer(x)
    assert whole.shape == x.shape
    for wanted in (True, False):
        with torch.set_grad_enabled(wanted):
            torch.testing.assert_close(in_chunks(layer, x, chunks, 1), whole, rtol=1e-5, atol=1e-5)
    later = x.clone()
    later[:, 3:] += 1
    assert torch.equal(layer(later)[:, :3], whole[:, :3])


def test_a_causal_convolution_is_one_with_zeros_before_the_first_frame() -> None:
    layer = filled(CausalConv3d(2, 4))
    x = torch.randn(1, 5, 4, 4, 2)
    padded = torch.cat([torch.zeros(1, 2, 4, 4, 2), x], 1).movedim(-1, 1)
    assert isinstance(layer, CausalConv3d)
    expected = nn.functional.conv3d(padded, layer.weight, layer.bias, padding=(0, 1, 1))
    torch.testing.assert_close(layer(x), expected.movedim(1, -1), rtol=1e-5, atol=1e-5)


def test_rows_are_read_in_bands_of_a_size_and_histories_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, cache = filled(CausalConv3d(2, 2)), TailCache()
    frames = torch.randn(2, 4, 7, 3, 2)
    monkeypatch.setattr(causal_conv, "CPU_BAND_BYTES", 3 * 2 * 3 * 3 * 2 * 4)  # three rows of three frames of two clips
    read = []
    for frame in frames.split(1, 1):
        if cache.is_fresh(layer):
            layer(frame, cache)  # with gradients: its tail holds what there is and no more
            continue
        with torch.no_grad():
            read.append([(rows.start, rows.stop, band.shape) for rows, band in cache.bands(layer, frame, 2, 1)])
    assert [rows[:2] for rows in read[0]] == [(0, 4), (4, 7)]  # one frame before it: more rows in a band
    assert [rows[:2] for rows in read[2]] == [(0, 3), (3, 6), (6, 7)]
    assert read[2][0][2] == (2, 3, 5, 3, 2)
    assert torch.equal(cache.follow(layer, frames[:, :0], 2), frames[:, 2:])


def test_a_cache_holds_the_tails_alone_and_keeps_streams_apart() -> None:
    layer = CausalConv3d(2, 2, (3, 1, 1))
    one, other = TailCache(), TailCache()
    x = torch.randn(1, 6, 2, 2, 2)
    first = one.extend(layer, x, 2)
    assert torch.equal(first[:, 2:], x)
    assert not first[:, :2].any()
    assert torch.equal(one.extend(layer, x[:, :1], 2)[:, :2], x[:, -2:])
    assert not other.extend(layer, x, 2)[:, :2].any()
    assert one.num_bytes() == other.num_bytes() == 2 * 2 * 2 * 2 * 4


def test_residual_blocks_start_as_identity() -> None:
    x = torch.randn(1, 3, 4, 4, 6)
    block = ResidualBlock(6)
    assert block.conv2.bias is not None
    torch.testing.assert_close(block(x), x + block.conv2.bias)


def test_channel_norms_mix_no_cells() -> None:
    x = torch.randn(2, 3, 4, 4, 16) * torch.rand(2, 3, 4, 4, 1).mul(5).add(0.5)
    torch.testing.assert_close(ChannelNorm(16)(x).square().mean(-1), torch.ones(2, 3, 4, 4), rtol=1e-4, atol=0)
    steps = torch.randn(2, 16, 9) * torch.rand(2, 1, 9).mul(5).add(0.5)
    torch.testing.assert_close(StepNorm(16)(steps).square().mean(1), torch.ones(2, 9), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("layer", "unit"),
    [
        (CausalConv1d(3, 4, 7), 1),
        (CausalConv1d(3, 4, 3, dilation=9), 1),
        (CausalConv1d(3, 4, 8, stride=4), 4),
        (CausalConv1d(3, 4, 4, stride=4), 4),
        (SubPixelUpsample(3, 4, 5, overlap=3), 1),
        (ResidualUnit1d(3, 7, 3), 1),
    ],
    ids=["plain", "dilated", "strided", "patches", "upsample", "residual"],
)
@pytest.mark.parametrize("parts", [(1, 1, 1, 1, 1, 1, 1, 1), (3, 5), (7, 1)])
def test_sound_chunks_equal_the_whole_and_see_no_future(layer: nn.Module, unit: int, parts: tuple[int, ...]) -> None:
    layer = filled(layer)
    x = torch.randn(2, 3, 8 * unit)
    whole = layer(x)
    torch.testing.assert_close(
        in_chunks(layer, x, tuple(part * unit for part in parts), 2), whole, rtol=1e-5, atol=1e-5
    )
    later = x.clone()
    later[..., 5 * unit :] += 1
    known = whole.shape[-1] * 5 // 8
    assert torch.equal(layer(later)[..., :known], whole[..., :known])
    assert not torch.allclose(layer(later)[..., known:], whole[..., known:])


def test_a_strided_output_has_seen_its_own_stride_to_the_end() -> None:
    layer = filled(CausalConv1d(1, 1, 8, stride=4))
    x = torch.zeros(1, 1, 12)
    x[..., 7] = 1.0
    assert layer(x)[0, 0, 0] == layer(torch.zeros_like(x))[0, 0, 0]
    assert layer(x)[0, 0, 1] != layer(torch.zeros_like(x))[0, 0, 1]


def test_lengths_and_kernels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match="multiple of the stride 4"):
        CausalConv1d(1, 1, 8, stride=4)(torch.zeros(1, 1, 6))
    with pytest.raises(ShapeError, match="must cover its stride"):
        CausalConv1d(1, 1, 3, stride=4)
    with pytest.raises(ShapeError, match="5 channels cannot be spread over 2"):
        depth_to_time(torch.zeros(1, 5, 3), 2)
    with pytest.raises(ShapeError, match="multiple of 2"):
        time_to_depth(torch.zeros(1, 5, 3), 2)


def test_upsampling_starts_with_equal_phases() -> None:
    layer = SubPixelUpsample(3, 2, 4)
    assert layer.conv.bias is not None
    nn.init.zeros_(layer.conv.bias)
    out = layer(torch.randn(1, 3, 6)).view(1, 2, 6, 4)
    torch.testing.assert_close(out, out[..., :1].expand_as(out))


def test_snake_is_x_plus_sin_squared_over_the_frequency_and_never_falls() -> None:
    snake = Snake(2)
    with torch.no_grad():
        snake.log_frequency.copy_(torch.tensor([[0.0], [1.0]]))
    x = torch.linspace(-4, 4, 400).expand(1, 2, -1)
    a = torch.tensor([1.0, torch.e])[:, None]
    torch.testing.assert_close(snake(x)[0], x[0] + (a * x[0]).sin().square() / a)
    assert snake(x).diff().min() > -1e-5


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
def test_time_and_depth_are_inverse(batch: int, channels: int, factor: int, steps: int) -> None:
    x = torch.arange(float(batch * channels * factor * steps)).view(batch, channels, steps * factor)
    deep = time_to_depth(x, factor)
    assert deep.shape == (batch, channels * factor, steps)
    assert torch.equal(deep[0, :factor, 0], x[0, 0, :factor])
    assert torch.equal(depth_to_time(deep, factor), x)


@given(st.tuples(*[st.integers(1, 3)] * 3), st.tuples(*[st.integers(1, 3)] * 3), st.integers(1, 3))
def test_space_and_depth_are_inverse(block: tuple[int, int, int], grid: tuple[int, int, int], channels: int) -> None:
    sizes = [step * count for step, count in zip(block, grid, strict=True)]
    x = torch.randn(2, *sizes, channels)
    deep = space_to_depth(x, block)
    assert deep.shape == (2, *grid, block[0] * block[1] * block[2] * channels)
    assert torch.equal(deep[0, 0, 0, 0], x[0, : block[0], : block[1], : block[2]].flatten())
    assert torch.equal(depth_to_space(deep, block), x)
