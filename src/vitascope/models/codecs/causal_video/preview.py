"""A decoder for looking, not keeping: two small convolutions show a latent at a fraction of its size.

Activations are channels-last, (B, N, h, w, C).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vitascope.models.codecs.causal_video.config import CausalVideoConfig
from vitascope.nn.causal_conv import CausalConv3d
from vitascope.nn.resample import Block, depth_to_space


class PreviewDecoder(nn.Module):
    """Raw latents (B, N, h, w, C) to frames (B, N*time, h*preview_px, w*preview_px, 3)."""

    def __init__(self, config: CausalVideoConfig) -> None:
        super().__init__()
        self.block: Block = (config.strides.time, config.preview_px, config.preview_px)
        outputs = 3 * config.strides.time * config.preview_px**2
        self.conv1 = CausalConv3d(config.latent_channels, config.preview_channels, (2, 3, 3))
        self.conv2 = CausalConv3d(config.preview_channels, outputs, (1, 1, 1))

    def forward(self, latents: Tensor) -> Tensor:
        return depth_to_space(self.conv2(F.silu(self.conv1(latents))), self.block)
