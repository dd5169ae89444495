"""Position-wise feed-forward layers."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from vitascope.core.errors import choice

FeedForwardKind = Literal["gelu", "geglu"]
KINDS: tuple[FeedForwardKind, ...] = ("gelu", "geglu")


class FeedForward(nn.Module):
    """(..., width) -> (..., width) through `hidden` units: GELU (tanh form), or GEGLU (Shazeer 2020: a * gelu(b)).

    Raises InputError for an unknown kind.
    """

    def __init__(self, width: int, hidden: int, kind: FeedForwardKind = "gelu") -> None:
        super().__init__()
        self.kind = choice("feed-forward kind", kind, KINDS)
        self.rise = nn.Linear(width, 2 * hidden if kind == "geglu" else hidden)
        self.fall = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.rise(x)
        if self.kind == "geglu":
            value, gate = hidden.chunk(2, -1)
            return self.fall(value * F.gelu(gate, approximate="tanh"))
        return self.fall(F.gelu(hidden, approximate="tanh"))
