"""Work on rows of values, a few at a time, so that what lies between its passes stays in a processor's cache.

A norm or a rotation is some ten passes over its input, in fp32. On a CPU a long clip's tokens do not fit the caches,
and every pass waits for memory; on any device the passes' temporaries are several times the input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CPU_VALUES = 2**18
"""Of a part: a megabyte in fp32, which the caches of one core hold."""
GPU_VALUES = 2**23
"""Of a part elsewhere: enough for a launch to be worth it."""


def part_size(x: Tensor, dim: int) -> int:
    """Of `x` along `dim`, how much there is in a part that caches hold; all of it with gradients."""
    if torch.is_grad_enabled():
        return max(1, x.shape[dim])
    values = CPU_VALUES if x.device.type == "cpu" else GPU_VALUES
    return max(1, values * x.shape[dim] // max(1, x.numel()))


def in_parts(work: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Tensor:
    """`work(x, *others)`, which keeps the shape and dtype of `x` and treats every row (last axis) by itself.

    others: broadcastable against `x` in all axes but the last, whose axes are counted from the last. Parts are taken
    along the longest of the other axes. With gradients, or while compiling, the whole is one part.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.ndim < 2:
        return work(x, *others)
    size, negated = max((size, -index) for index, size in enumerate(x.shape[:-1]))
    dim, rows = -negated - x.ndim, part_size(x, -negated)
    if rows >= size:
        return work(x, *others)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for start in range(0, size, rows):
        num = min(rows, size - start)
        beside = (
            other if other.ndim < -dim or other.shape[dim] == 1 else other.narrow(dim, start, num) for other in others
        )
        out.narrow(dim, start, num).copy_(work(x.narrow(dim, start, num), *beside))
    return out
