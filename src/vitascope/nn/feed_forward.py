"""Position-wise feed-forward layers."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitascope.core.errors import choice

FeedForwardKind = Literal["gelu", "geglu", "swiglu"]
KINDS: tuple[FeedForwardKind, ...] = ("gelu", "geglu", "swiglu")

ROWS, CPU_ROWS = 8192, 2048
"""Tokens, of all clips, at a time where no gradient is wanted: enough to keep the device busy, and the hidden units of
a long clip, four times its width, never stand in memory together."""


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
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._through(x)
        rows = CPU_ROWS if x.device.type == "cpu" else ROWS
        if x.shape[:-1].numel() <= rows:
            return self._through(x, alone=True)
        flat = x.flatten(0, -2)
        first = self._through(flat[:rows], alone=True)
        out = first.new_empty(len(flat), first.shape[-1])
        out[:rows] = first
        for start in range(rows, len(flat), rows):
            out[start : start + rows] = self._through(flat[start : start + rows], alone=True)
        return out.unflatten(0, x.shape[:-1])

    def _through(self, x: Tensor, alone: bool = False) -> Tensor:
        """alone: nobody else needs the hidden units, which may change in their place."""
        hidden = self.rise(x)
        if self.kind == "gelu":
            if alone:
                return self.fall(torch.ops.aten.gelu_(hidden, approximate="tanh"))
            return self.fall(F.gelu(hidden, approximate="tanh"))
        value, gate = hidden.chunk(2, -1)
        return self.fall(value * (F.gelu(gate, approximate="tanh") if self.kind == "geglu" else F.silu(gate)))
