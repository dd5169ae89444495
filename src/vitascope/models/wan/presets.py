"""Denoisers of the Wan design by size. They read the latents of the pocket codecs; other codecs and texts are
overrides."""

from __future__ import annotations

from vitascope.models.wan.config import WanConfig

PRESETS: dict[str, WanConfig] = {
    "pocket": WanConfig(
        width=256, depth=6, num_heads=4, hidden=768, text_width=192, patch=(1, 4, 4), noise="frame", masked_text=True
    ),
}
