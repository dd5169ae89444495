"""Position-wise feed-forward layers."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitascope.core.errors import choice

FeedForwardKind = Literal["gelu", "geglu", "swiglu"]
KINDS: tuple[FeedForwardKind, ...] = ("gelu", "geglu", "swiglu")

ROWS = 4096
"""Tokens of a clip at a time where no gradient is wanted: enough to keep any device busy, and the hidden units of a
long clip, four times its width, never stand in memory together."""


class FeedForward(nn.Module):
    """(..., width) -> (..., width) through `hidden` units: GELU (tanh form), or gated, a * gelu(b) and a * silu(b)
    (GEGLU and SwiGLU: Shazeer 2020).

    Raises InputError for an unknown kind.
    """

    def __init__(self, width: int, hidden: int, kind: FeedForwardKind = "gelu", *, bias: bool = True) -> None:
        super().__init__()
        self.kind = choice("feed-forward kind", kind, KINDS)
        self.rise = nn.Linear(width, hidden if kind == "gelu" else 2 * hidden, bias=bias)
        self.fall = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[-2] if x.ndim > 1 else 1
        if tokens <= ROWS or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._through(x)
        return torch.cat([self._through(part) for part in x.split(ROWS, -2)], -2)

    def _through(self, x: Tensor) -> Tensor:
        hidden = self.rise(x)
        if self.kind == "gelu":
            return self.fall(F.gelu(hidden, approximate="tanh"))
        value, gate = hidden.chunk(2, -1)
        return self.fall(value * (F.gelu(gate, approximate="tanh") if self.kind == "geglu" else F.silu(gate)))
