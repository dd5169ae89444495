"""Matrices kept in fewer bits than they are used in: rounded once, widened whenever their layer runs.

bf16 keeps values as they are rounded. fp8 (e4m3: 3 bits of fraction, up to 448) keeps a row (an output) divided by its
largest absolute value / 448, and that scale in fp32. Source: Micikevicius et al. 2022, FP8 formats for deep learning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from vitascope.core.errors import choice

Storage = Literal["as_is", "bf16", "fp8"]
STORAGES: tuple[Storage, ...] = get_args(Storage)
FP8_LARGEST = 448.0


@dataclass(frozen=True)
class Narrow:
    """Values (N, ...) in few bits and, for fp8, what each of the N rows was divided by, (N, 1, ...) in fp32."""

    values: Tensor
    scales: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Of values and scales."""
        parts = [self.values] if self.scales is None else [self.values, self.scales]
        return sum(part.numel() * part.element_size() for part in parts)

    def widen(self, into: Tensor) -> None:
        """Write the values into a tensor of their shape, in its dtype and on its device."""
        narrower = self.values.dtype != into.dtype  # then fewer bytes go to the device, and are widened there
        values = self.values.to(into.device, non_blocking=True) if narrower else self.values
        into.copy_(values, non_blocking=True)
        if self.scales is not None:
            into.mul_(self.scales.to(into.device, into.dtype, non_blocking=True))


def narrow(tensor: Tensor, storage: Storage) -> Narrow:
    """A tensor as `storage` keeps it; what has fewer than 2 axes (biases, norms) is little, and stays as it is. Raises
    InputError for another storage."""
    choice("storage", storage, STORAGES)
    if storage == "as_is" or not tensor.is_floating_point() or tensor.ndim < 2:
        return Narrow(tensor)
    if storage == "bf16":
        return Narrow(tensor.to(torch.bfloat16))
    wide = tensor.float()
    scales = wide.abs().amax(tuple(range(1, wide.ndim)), keepdim=True).clamp_min_(1e-30) / FP8_LARGEST
    return Narrow((wide / scales).clamp_(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn), scales)


def stored_bytes(shape: tuple[int, ...], dtype: torch.dtype, storage: Storage) -> int:
    """`narrow(...).num_bytes` of a tensor of this shape and dtype."""
    with torch.device("meta"):
        return narrow(torch.empty(shape, dtype=dtype), storage).num_bytes
