"""Weights kept in the precision that they are used in."""

from __future__ import annotations

import torch
from torch import nn

MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weights and biases autocast rounds."""


def matrix_names(module: nn.Module) -> set[str]:
    """Names of the weights and biases that `store_matrices` rounds."""
    return {
        f"{place}.{name}" if place else name
        for place, part in module.named_modules()
        if isinstance(part, MATRICES)
        for name, _ in part.named_parameters(recurse=False)
    }


def store_matrices(module: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights and biases of linear maps and convolutions to `dtype` once, in place.

    Autocast rounds weights without gradients anew at every call; after this it finds nothing to do, and results under
    it are the same to the bit, but where a module adds up weights before it uses them. Without autocast the module then
    needs inputs of `dtype`.
    """
    for part in module.modules():
        if isinstance(part, MATRICES):
            part.to(dtype)
