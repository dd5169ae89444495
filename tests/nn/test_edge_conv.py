"""Group norm of frames against double precision, where the values of a group lie close together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vitascope.nn.edge_conv import FrameGroupNorm


def made(channels: int, groups: int) -> FrameGroupNorm:
    norm = FrameGroupNorm(groups, channels)
    for index, parameter in enumerate(norm.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
    return norm.eval()


def exact(norm: FrameGroupNorm, x_BTHWC: Tensor) -> Tensor:
    frames = x_BTHWC.detach().double().flatten(0, 1).movedim(-1, 1).contiguous()
    weight, bias = norm.weight.detach().double(), norm.bias.detach().double()
    out = torch.nn.functional.group_norm(frames, norm.num_groups, weight, bias, norm.eps)
    return out.movedim(1, -1).unflatten(0, x_BTHWC.shape[:2])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(2, 3, 1, 2), (1, 2, 6, 5), (1, 1, 700, 30)])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_frames_are_normalised_to_the_last_bits(offset: float, size: tuple[int, ...], training: bool) -> None:
    """Mean of squares less square of mean, in fp32, would be wrong by 1e-3 and more at a mean of 30 spreads."""
    norm = made(16, 8)
    x = torch.randn(*size, 16, generator=torch.Generator().manual_seed(5)) + offset
    with torch.set_grad_enabled(training):
        out = norm(x)
    assert out.requires_grad is training
    expected = exact(norm, x)
    # fp32 knows a mean of 30 to 2e-6, and a group of few cells may spread over less than 1
    assert float((out.detach().double() - expected).norm() / expected.norm()) < 2e-5
    if training:
        out.sum().backward()
        assert norm.weight.grad is not None


def test_what_is_given_stays_as_it_is() -> None:
    x = torch.randn(1, 2, 3, 4, 8, generator=torch.Generator().manual_seed(5))
    for dtype in (torch.float32, torch.bfloat16):
        given = x.to(dtype)
        with torch.no_grad():
            out = made(8, 4)(given)
        assert out.dtype == dtype
        assert torch.equal(given, x.to(dtype))
