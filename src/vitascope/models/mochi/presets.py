"""Dual-stream denoisers by size. They read the latents of the pocket codecs; other codecs and texts are overrides."""

from __future__ import annotations

from vitascope.models.mochi.config import MochiConfig

# 4 x 4 tokens a frame, as the pocket has; an area of as many leaves positions as they are counted.
PRESETS: dict[str, MochiConfig] = {
    "pocket": MochiConfig(
        width=256, stream_width=128, depth=8, num_heads=4, video_channels=16, text_width=192, patch=4, area=16.0
    ),
}
