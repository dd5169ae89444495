"""Denoisers of the LTX design by size. They read the latents of the pocket codecs; other codecs and texts are
overrides."""

from __future__ import annotations

from vitascope.models.ltx.config import LTXConfig

# A token is one latent: at the pocket's size 16 times as many as its own denoiser has, so there is less of the rest.
PRESETS: dict[str, LTXConfig] = {
    "pocket": LTXConfig(
        width=192, depth=4, num_heads=4, in_channels=16, out_channels=16, text_width=192, spatial_px=8,
        base=(5.0, 256.0, 256.0),
    ),
}  # fmt: skip
