"""Normalisations without mean-and-variance state, of the last axis, in fp32, returned in the dtype of their input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitascope.ops.parts import in_parts


class RMSNorm(nn.Module):
    """x / rms(x) * weight. Zhang and Sennrich 2019."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps, self.weight)


def rms_norm(x: Tensor, eps: float = 1e-6, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x / rms(x), times `weight` if there is one, plus `bias` if there is one too.

    weight, bias: (D,), or as modulation has them, (B, 1|L, D) for x (B, L, D).
    """
    if weight is None:
        return in_parts(lambda part: _scaled(part, eps).to(x.dtype), x)
    if bias is None:
        return in_parts(lambda part, scale: (_scaled(part, eps) * scale).to(x.dtype), x, weight)
    return in_parts(lambda part, scale, shift: (_scaled(part, eps) * scale + shift).to(x.dtype), x, weight, bias)


def _scaled(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def layer_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Mean 0 and variance 1 over the last axis, in fp32 (so returned, too); the rest is left to modulation."""
    return F.layer_norm(x.float(), (x.shape[-1],), eps=eps)


def widened(x: Tensor) -> Tensor:
    """What torch's layer norm takes to work in fp32: on a CPU its kernel widens bf16 as it goes."""
    return x if x.device.type == "cpu" and x.dtype == torch.bfloat16 else x.float()


class LayerNorm(nn.Module):
    """Mean 0 and variance 1, with a learned scale and shift."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(widened(x), self.weight.shape, weight, bias, self.eps).to(x.dtype)
