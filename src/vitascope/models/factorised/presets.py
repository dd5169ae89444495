"""Denoisers by size. All read the latents of the pocket codecs; other codecs and texts: `dataclasses.replace`.

The pocket shares one modulation between its blocks: at its width the projections would be a quarter of its weights.
The largest does the same, for the same reason in memory.
"""

from __future__ import annotations

from vitascope.models.factorised.config import FactorisedConfig

# fmt: off
PRESETS: dict[str, FactorisedConfig] = {
    "pocket": FactorisedConfig(width=256, depth=6, num_heads=4, audio_width=128, audio_heads=2, text_width=192,
                               feed_forward_ratio=3.0, modulation="shared", local_channels=(64, 128),
                               local_blocks=(1, 2), strategies=("full", "causal")),
    "small": FactorisedConfig(width=512, depth=8, num_heads=8, audio_width=256, audio_heads=4, text_width=192,
                              base_grid=(8, 8)),
    "medium": FactorisedConfig(width=768, depth=12, num_heads=12, audio_width=384, audio_heads=6, text_width=768,
                               base_grid=(8, 8)),
    "large": FactorisedConfig(width=1024, depth=24, num_heads=16, audio_width=512, audio_heads=8, text_width=1024,
                              base_grid=(16, 16)),
    "xl": FactorisedConfig(width=1536, depth=28, num_heads=24, audio_width=768, audio_heads=12, text_width=2048,
                           base_grid=(16, 16), feed_forward="geglu", positions="rotary"),
    "10b": FactorisedConfig(width=3840, depth=32, num_heads=30, audio_width=1280, audio_heads=10, text_width=4096,
                            base_grid=(16, 16), positions="rotary", modulation="shared"),
}
# fmt: on
