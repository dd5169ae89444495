"""Key table of the latent up-sampler: diffusers' layout, which is that of the authors' files."""

from __future__ import annotations

from vitascope.models.ltx_upsampler.config import LTXUpsamplerConfig
from vitascope.weights.keys import KeyTable, renamed_layers

ENDS = {"initial_conv": "enter", "initial_norm": "norm", "upsampler.0": "grow", "final_conv": "leave"}
STAGES = {"res_blocks": "before", "post_upsample_res_blocks": "after"}


def diffusers_keys(config: LTXUpsamplerConfig) -> KeyTable:
    """Names of `LTXLatentUpsamplerModel`, alike for all configurations."""
    del config
    parts = ("conv1", "norm1", "conv2", "norm2")
    blocks = {
        f"{theirs}.{{layer}}.{part}": f"{ours}.{{layer}}.{part}" for theirs, ours in STAGES.items() for part in parts
    }
    return tuple(renamed_layers({**ENDS, **blocks}))
