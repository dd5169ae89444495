"""The latent up-sampler of LTX-Video: latents of a small clip to those of one with twice the rows and columns.

B clips, C channels, N latent frames, h and w latent rows and columns, W channels inside. Latents are the codec's own,
without its normalisation. Source: LTX-Video 0.9.7 and later, as released with diffusers.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vitascope.core.errors import ShapeError
from vitascope.models.ltx_upsampler.config import GROUPS, LTXUpsamplerConfig

KERNELS: dict[int, type[nn.Conv2d | nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}


class Block(nn.Module):
    """Convolution and norm, twice, around a skip; SiLU after each."""

    def __init__(self, width: int, dims: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = KERNELS[dims](width, width, 3, padding=1), nn.GroupNorm(GROUPS, width)
        self.conv2, self.norm2 = KERNELS[dims](width, width, 3, padding=1), nn.GroupNorm(GROUPS, width)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm1(self.conv1(x)))
        return F.silu(self.norm2(self.conv2(h)) + x)


class LTXUpsampler(nn.Module):
    """Latents (B, C, N, h, w) to (B, C, N, 2h, 2w), and to 2N - 1 latent frames where it enlarges time."""

    def __init__(self, config: LTXUpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        dims, width = config.dims, config.width
        self.enter, self.norm = KERNELS[dims](config.channels, width, 3, padding=1), nn.GroupNorm(GROUPS, width)
        self.before = nn.ModuleList(Block(width, dims) for _ in range(config.num_blocks))
        self.factors = (2,) * (config.time + 2 * config.space)
        self.grow = KERNELS[3 if config.time else 2](width, width * 2 ** len(self.factors), 3, padding=1)
        self.after = nn.ModuleList(Block(width, dims) for _ in range(config.num_blocks))
        self.leave = KERNELS[dims](width, config.channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Raises ShapeError for latents of another kind."""
        if latents.ndim != 5 or latents.shape[1] != self.config.channels:
            raise ShapeError(f"latents are (B, {self.config.channels}, N, h, w), got {tuple(latents.shape)}")
        num_clips, flat = len(latents), self.config.dims == 2
        x = F.silu(self.norm(self.enter(_frames(latents) if flat else latents)))
        for block in self.before:
            x = block(x)
        if flat or self.config.time:
            x = _unfold(self.grow(x), self.factors)
        else:
            x = _clips(_unfold(self.grow(_frames(x)), self.factors), num_clips)
        if self.config.time:
            x = x[:, :, 1:]  # the first latent frame is one frame and stays so
        for block in self.after:
            x = block(x)
        x = self.leave(x)
        return _clips(x, num_clips) if flat else x


def _unfold(x: Tensor, factors: tuple[int, ...]) -> Tensor:
    """(B, C * product, s...) to (B, C, s * factor...), over the first axes of space-time where there are fewer factors
    than axes."""
    num, sizes = len(factors), x.shape[2:]
    x = x.unflatten(1, (-1, *factors))
    order = [axis for i in range(num) for axis in (2 + num + i, 2 + i)]
    rest = range(2 + 2 * num, x.ndim)
    grown = [size * factor for size, factor in zip(sizes, factors, strict=False)]
    return x.permute(0, 1, *order, *rest).reshape(*x.shape[:2], *grown, *sizes[num:])


def _frames(x: Tensor) -> Tensor:
    """(B, C, N, h, w) to (B N, C, h, w)."""
    return x.transpose(1, 2).flatten(0, 1)


def _clips(x: Tensor, num_clips: int) -> Tensor:
    """(B N, C, h, w) to (B, C, N, h, w)."""
    return x.unflatten(0, (num_clips, -1)).transpose(1, 2)
