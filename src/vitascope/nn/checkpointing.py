"""Layers whose inner values are worked out again on the way back instead of being kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

P = ParamSpec("P")
R = TypeVar("R")


def run_layer(saving: bool, layer: Callable[P, R], *inputs: P.args, **named: P.kwargs) -> R:
    """`layer(*inputs)`; when `saving`, and gradients are asked for, at the price of a second forward pass."""
    if saving and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False, **named)
    return layer(*inputs, **named)
