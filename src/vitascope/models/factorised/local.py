"""Convolutions around the layers: what is near is worked out near, before and after the tokens.

A token covers many latents; where it alone paints them, every shape has to be learned once for every place it may take
inside a token, and edges show between tokens. Here the latents of each frame also run down a few levels of convolutions
to the tokens, and the tokens run up again beside them. Source of the arrangement: Hoogeboom et al. 2023 (simple
diffusion), section 3 (U-ViT); frames are kept apart, so every temporal strategy holds.

B clips, T latent frames, H x W latents, h x w tokens a frame, C channels of a level, D width of the tokens.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from vitascope.nn.modulation import OwnModulation, modulate
from vitascope.nn.norms import layer_norm

LOCAL_VECTORS = 3
"""Modulation vectors of a block: shift, scale, gate."""

Factor = tuple[int, int]


def gather(x_BTHWC: Tensor, factor: Factor) -> Tensor:
    """Space to depth: (B, T, H, W, C) to (B, T, H / fh, W / fw, fh fw C)."""
    (fh, fw), (batch, frames, rows, columns, channels) = factor, x_BTHWC.shape
    cut = x_BTHWC.reshape(batch, frames, rows // fh, fh, columns // fw, fw, channels)
    return cut.permute(0, 1, 2, 4, 3, 5, 6).flatten(4)


def scatter(x_BTHWC: Tensor, factor: Factor) -> Tensor:
    """Depth to space, the inverse of `gather`."""
    (fh, fw), (batch, frames, rows, columns, channels) = factor, x_BTHWC.shape
    cut = x_BTHWC.reshape(batch, frames, rows, columns, fh, fw, channels // (fh * fw))
    return cut.permute(0, 1, 2, 4, 3, 5, 6).reshape(batch, frames, rows * fh, columns * fw, -1)


def convolve(convolution: nn.Conv2d, x_BTHWC: Tensor) -> Tensor:
    """A 2-D convolution of every frame, channels last."""
    frames_NCHW = x_BTHWC.flatten(0, 1).permute(0, 3, 1, 2)
    return convolution(frames_NCHW).permute(0, 2, 3, 1).unflatten(0, x_BTHWC.shape[:2])


class LocalBlock(nn.Module):
    """Norm, modulation, two 3 x 3 convolutions, gate."""

    def __init__(self, condition_width: int, channels: int) -> None:
        super().__init__()
        self.modulation = OwnModulation(condition_width, channels, LOCAL_VECTORS)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BTHWC: Tensor, condition_BTHWD: Tensor) -> Tensor:
        """condition: (B, 1|T, 1|h, 1|w, D), one for a whole frame or one for each token."""
        vectors = self.modulation(condition_BTHWD)
        if condition_BTHWD.shape[2:4] != (1, 1):
            repeats = [x_BTHWC.shape[axis] // condition_BTHWD.shape[axis] for axis in (2, 3)]
            vectors = tuple(v.repeat_interleave(repeats[0], 2).repeat_interleave(repeats[1], 3) for v in vectors)
        shift, scale, gate = vectors
        y = convolve(self.first, modulate(layer_norm(x_BTHWC), shift, scale))
        return x_BTHWC + gate * convolve(self.second, F.silu(y))


class LocalBlocks(nn.ModuleList):
    """The blocks of a level, one after the other."""

    def __init__(self, condition_width: int, channels: int, count: int) -> None:
        super().__init__(LocalBlock(condition_width, channels) for _ in range(count))

    def forward(self, x_BTHWC: Tensor, condition_BTHWD: Tensor) -> Tensor:
        for block in self:
            x_BTHWC = block(x_BTHWC, condition_BTHWD)
        return x_BTHWC


class LocalDown(nn.Module):
    """Latents to tokens, some blocks a level; each level has half the rows and columns of the one before."""

    def __init__(self, latent_channels: int, channels: tuple[int, ...], blocks: int, patch: Factor, width: int) -> None:
        super().__init__()
        self.factor = last_factor(channels, patch)
        self.enter = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList(LocalBlocks(width, count, blocks) for count in channels)
        self.narrow = nn.ModuleList(nn.Linear(4 * above, below) for above, below in pairwise(channels))
        self.leave = nn.Linear(channels[-1] * self.factor[0] * self.factor[1], width)

    def forward(self, values_BCTHW: Tensor, condition_BTHWD: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What is added to the tokens, (B, T, N, D), and every level's features for `LocalUp`."""
        x = convolve(self.enter, values_BCTHW.permute(0, 2, 3, 4, 1))
        levels = []
        for index, blocks in enumerate(self.blocks):
            x = blocks(self.narrow[index - 1](gather(x, (2, 2))) if index else x, condition_BTHWD)
            levels.append(x)
        return self.leave(gather(x, self.factor)).flatten(2, 3), levels


class LocalUp(nn.Module):
    """Tokens to latents, each level added to what `LocalDown` left there; starts at zero."""

    def __init__(self, latent_channels: int, channels: tuple[int, ...], blocks: int, patch: Factor, width: int) -> None:
        super().__init__()
        self.factor = last_factor(channels, patch)
        self.enter = nn.Linear(width, channels[-1] * self.factor[0] * self.factor[1])
        self.blocks = nn.ModuleList(LocalBlocks(width, count, blocks) for count in channels)
        self.widen = nn.ModuleList(nn.Linear(below, 4 * above) for above, below in pairwise(channels))
        self.leave = nn.Conv2d(channels[0], latent_channels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        assert self.leave.bias is not None
        nn.init.zeros_(self.leave.bias)

    def forward(self, x_BTND: Tensor, levels: list[Tensor], condition_BTHWD: Tensor) -> Tensor:
        """What is added to the prediction, (B, C, T, H, W)."""
        rows, columns = (levels[-1].shape[axis + 2] // self.factor[axis] for axis in (0, 1))
        x = levels[-1] + scatter(self.enter(layer_norm(x_BTND)).unflatten(2, (rows, columns)), self.factor)
        for index in reversed(range(len(levels))):
            x = self.blocks[index](x, condition_BTHWD)
            if index:
                x = levels[index - 1] + scatter(self.widen[index - 1](x), (2, 2))
        return convolve(self.leave, F.silu(layer_norm(x))).permute(0, 4, 1, 2, 3)


def last_factor(channels: tuple[int, ...], patch: Factor) -> Factor:
    """Rows and columns of the last level that a token covers."""
    halvings = 2 ** (len(channels) - 1)
    return patch[0] // halvings, patch[1] // halvings
