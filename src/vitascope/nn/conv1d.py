"""Layers on waveforms and 1-D latents: causal convolution, sub-pixel up-sampling, Snake, a norm over channels.

B batch, C channels, T steps; activations are (B, C, T), the layout in which 1-D convolutions are fastest on a CPU.
Every layer sees only the past, so that a `TailCache` makes chunks equal the whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitascope.core.errors import ShapeError
from vitascope.nn.causal_conv import TailCache


class CausalConv1d(nn.Conv1d):
    """1-D convolution whose output t has seen the inputs up to stride * (t + 1) - 1 and no later one.

    (B, C_in, T * stride) -> (B, C_out, T). Raises ShapeError when the length is not a multiple of the stride.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, dilation: int = 1, bias: bool = True
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride=stride, dilation=dilation, bias=bias)
        self.history = (kernel - 1) * dilation + 1 - stride
        if self.history < 0:
            raise ShapeError(f"a causal kernel must cover its stride: {kernel} taps, dilation {dilation}, {stride=}")

    def forward(self, input: Tensor, cache: TailCache | None = None) -> Tensor:
        step = self.stride[0]
        if input.shape[-1] % step:
            raise ShapeError(f"{input.shape[-1]} steps do not fit: they must be a multiple of the stride {step}")
        return super().forward(past_and_present(self, input, self.history, cache))


def past_and_present(layer: nn.Module, x: Tensor, history: int, cache: TailCache | None) -> Tensor:
    """`x` (B, C, T) with the `history` steps before it in front: what the cache holds for `layer`, zeros without."""
    if not history:
        return x
    if cache is None:
        return F.pad(x, (history, 0))
    return cache.extend(layer, x.transpose(1, 2), history).transpose(1, 2)


def depth_to_time(x: Tensor, factor: int) -> Tensor:
    """(B, C * factor, T) -> (B, C, T * factor): groups of channels become neighbours in time."""
    batch, channels, steps = x.shape
    if channels % factor:
        raise ShapeError(f"{channels} channels cannot be spread over {factor} steps of time")
    return x.reshape(batch, channels // factor, factor, steps).transpose(2, 3).reshape(batch, -1, steps * factor)


def time_to_depth(x: Tensor, factor: int) -> Tensor:
    """(B, C, T * factor) -> (B, C * factor, T): the inverse of `depth_to_time`."""
    batch, channels, steps = x.shape
    if steps % factor:
        raise ShapeError(f"{steps} steps do not fit: they must be a multiple of {factor}")
    return x.reshape(batch, channels, steps // factor, factor).transpose(2, 3).reshape(batch, -1, steps // factor)


class SubPixelUpsample(nn.Module):
    """Up-sampling by `stride`: a convolution makes `stride` outputs a step, laid side by side in time.

    (B, C_in, T) -> (B, C_out, T * stride). Each output is written once (no uneven overlap as in transposed convolution)
    and depends on the last `overlap` inputs; all `stride` phases start with the same weights, so that what is constant
    stays constant. Source: Shi et al. 2016, in one dimension; Aitken et al. 2017 for the start.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, overlap: int = 2) -> None:
        super().__init__()
        self.stride = stride
        self.conv = CausalConv1d(in_channels, out_channels * stride, overlap)
        with torch.no_grad():
            first = self.conv.weight.view(out_channels, stride, in_channels, overlap)[:, :1]
            self.conv.weight.copy_(first.expand(-1, stride, -1, -1).reshape_as(self.conv.weight))

    def forward(self, x: Tensor, cache: TailCache | None = None) -> Tensor:
        return depth_to_time(self.conv(x, cache), self.stride)


class Snake(nn.Module):
    """x + sin(a x)^2 / a with a frequency per channel: monotonous, and periodic where sound is.

    Source: Ziyin, Hartwig and Ueda 2020, equation 3. The logarithm of `a` is learnt; a starts at 1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_frequency = nn.Parameter(torch.zeros(channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        frequency = self.log_frequency.exp().to(x.dtype)
        return x + torch.sin(frequency * x).square() / frequency


class StepNorm(nn.Module):
    """Root-mean-square norm over the channels of each step, so that time does not mix. (B, C, T) -> the same shape."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean_square = x.float().square().mean(dim=1, keepdim=True)
        return x * torch.rsqrt(mean_square + self.eps).to(x.dtype) * self.weight.to(x.dtype)


class ResidualUnit1d(nn.Module):
    """norm, dilated causal convolution, Snake, pointwise convolution, around a skip. (B, C, T) -> the same shape.

    Source: the residual units of Encodec and DAC (Kumar et al. 2023), with a norm over channels in front.
    """

    def __init__(self, channels: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.norm = StepNorm(channels)
        self.conv = CausalConv1d(channels, channels, kernel, dilation=dilation)
        self.activation = Snake(channels)
        self.out = nn.Conv1d(channels, channels, 1)
        nn.init.normal_(self.out.weight, std=0.2 / channels**0.5)

    def forward(self, x: Tensor, cache: TailCache | None = None) -> Tensor:
        return x + self.out(self.activation(self.conv(self.norm(x), cache)))
