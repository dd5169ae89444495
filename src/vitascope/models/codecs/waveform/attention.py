"""Causal windowed self-attention with rotary positions, exact over chunks.

B batch, C channels, T latents (K keys, the window's past included), N heads, D channels a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitascope.models.codecs.waveform.config import WaveAttention
from vitascope.nn.causal_conv import TailCache
from vitascope.nn.conv1d import StepNorm, past_and_present

_BASE = 10000.0


class WindowAttention(nn.Module):
    """norm, self-attention over the last `window` latents, around a skip. (B, C, T) -> the same shape."""

    def __init__(self, channels: int, config: WaveAttention) -> None:
        super().__init__()
        self.config = config
        self.norm = StepNorm(channels)
        self.query = nn.Conv1d(channels, channels, 1)
        self.key_value = nn.Conv1d(channels, 2 * channels, 1)
        self.out = nn.Conv1d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, cache: TailCache | None = None, position: int = 0) -> Tensor:
        """`position`: the index in its stream of the first latent of `x`; the cache holds keys and values before it."""
        normed, past = self.norm(x), self.config.window - 1
        steps = torch.arange(position - past, position + x.shape[-1], device=x.device)
        key_value = past_and_present(self, self.key_value(normed), past, cache)
        key, value = (self._heads(part) for part in key_value.chunk(2, dim=1))
        query = rotate(self._heads(self.query(normed)), steps[past:])
        distance = steps[past:, None] - steps
        visible = (distance >= 0) & (distance < self.config.window) & (steps >= 0)
        attended = F.scaled_dot_product_attention(query, rotate(key, steps), value, attn_mask=visible)
        return x + self.out(attended.transpose(2, 3).flatten(1, 2))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N*D, T) -> (B, N, T, D)."""
        return x.unflatten(1, (self.config.num_heads, -1)).transpose(2, 3)


def rotate(x: Tensor, steps: Tensor) -> Tensor:
    """Turn the pairs of channels of `x` (B, N, T, D) by angles that grow with `steps` (T,).

    Source: Su et al. 2021 (rotary position embedding), equation 15; the pairs are (d, d + D/2).
    """
    half = x.shape[-1] // 2
    rates = _BASE ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = steps[:, None].float() * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
