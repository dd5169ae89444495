"""AdaLN-Zero: a condition sets shift, scale and gate of every branch; all start at zero.

Source: Peebles and Xie 2023 (DiT), figure 3; the shared form with offsets per block: Chen et al. 2023 (PixArt-alpha),
section 2.3. The condition may be of any shape that broadcasts against the tokens: one vector per frame where all cells
of a frame have one noise level, one per token where they differ. It is projected at its own, smaller shape.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitascope.nn.norms import layer_norm, rms_norm, widened
from vitascope.ops.parts import in_parts


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return x * (1 + scale) + shift


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """`layer_norm` of x (B, L, D), then `modulate`, in fp32, returned in the dtype of x.

    shift, scale: (B, 1|L, D) in fp32. One pass over the tokens where all of a clip's have the same vectors: they are
    then the norm's own scale and shift.
    """
    if scale.shape[1] != 1:
        return in_parts(
            lambda part, shift, scale: modulate(layer_norm(part, eps), shift, scale).to(x.dtype), x, shift, scale
        )
    each = zip(widened(x), shift, scale, strict=True)
    clips = [F.layer_norm(clip, clip.shape[-1:], 1 + own[0], offset[0], eps) for clip, offset, own in each]
    return (clips[0].unsqueeze(0) if len(clips) == 1 else torch.stack(clips)).to(x.dtype)


def modulated_rms_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """As `modulated_layer_norm`, with `norms.rms_norm`; vectors of any floating dtype."""
    return rms_norm(x, eps, 1 + scale.float(), shift.float())


def add_gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate y in fp32, returned in the dtype of x; x, y: (B, L, D), gate: (B, 1|L, D)."""
    return in_parts(lambda part, own, other: torch.addcmul(part.float(), own.float(), other).to(x.dtype), x, gate, y)


class ModulationProjection(nn.Module):
    """A condition (..., condition_width) to `num` vectors side by side, (..., num * width); starts at zero."""

    def __init__(self, condition_width: int, width: int, num: int) -> None:
        super().__init__()
        self.linear = nn.Linear(condition_width, num * width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, condition: Tensor) -> Tensor:
        return self.linear(F.silu(condition))


class OwnModulation(nn.Module):
    """A block's own projection: condition (..., condition_width) to `num` vectors of `width`."""

    def __init__(self, condition_width: int, width: int, num: int) -> None:
        super().__init__()
        self.num = num
        self.projection = ModulationProjection(condition_width, width, num)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return self.projection(condition).chunk(self.num, -1)


class OffsetModulation(nn.Module):
    """A block's learned offsets to what one shared projection gives: (..., >= num * width) to `num` vectors of `width`.

    A block that needs fewer vectors than the projection has takes the first ones.
    """

    def __init__(self, width: int, num: int) -> None:
        super().__init__()
        self.num = num
        self.offset = nn.Parameter(torch.zeros(num * width))

    def forward(self, projected: Tensor) -> tuple[Tensor, ...]:
        return (projected[..., : self.offset.shape[0]] + self.offset).chunk(self.num, -1)
