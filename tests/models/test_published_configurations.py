"""Configurations as published folders have them, key by key: accepted, and at full size the tables of diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo
from diffusers.models.autoencoders.autoencoder_kl_mochi import AutoencoderKLMochi
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from diffusers.models.transformers.transformer_mochi import MochiTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.ltx.modeling_latent_upsampler import LTXLatentUpsamplerModel

from vitascope.models import FAMILIES, named
from vitascope.models.codecs.mochi.config import LATENT_MEAN as MOCHI_MEAN
from vitascope.models.codecs.mochi.config import LATENT_STD as MOCHI_STD
from vitascope.models.codecs.wan.config import LATENT_MEAN, LATENT_STD
from vitascope.models.original import ORIGINALS
from vitascope.models.published import PUBLISHED
from vitascope.weights.config import config_to_dict
from vitascope.weights.keys import convert

CLASSES: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        WanTransformer3DModel, LTXVideoTransformer3DModel, MochiTransformer3DModel, LTXLatentUpsamplerModel,
        AutoencoderKLWan, AutoencoderKLLTXVideo, AutoencoderKLMochi,
    )
}  # fmt: skip
WAN: dict[str, Any] = {
    "_class_name": "WanTransformer3DModel", "_diffusers_version": "0.33.0.dev0", "added_kv_proj_dim": None,
    "attention_head_dim": 128, "cross_attn_norm": True, "eps": 1e-06, "ffn_dim": 13824, "freq_dim": 256,
    "image_dim": None, "in_channels": 16, "num_attention_heads": 40, "num_layers": 40, "out_channels": 16,
    "patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024, "text_dim": 4096,
}  # fmt: skip
WAN_IMAGE = {**WAN, "added_kv_proj_dim": 5120, "image_dim": 1280, "in_channels": 36}
LTX: dict[str, Any] = {
    "_class_name": "LTXVideoTransformer3DModel", "_diffusers_version": "0.32.0.dev0",
    "activation_fn": "gelu-approximate", "attention_bias": True, "attention_head_dim": 64, "attention_out_bias": True,
    "caption_channels": 4096, "cross_attention_dim": 2048, "in_channels": 128, "norm_elementwise_affine": False,
    "norm_eps": 1e-06, "num_attention_heads": 32, "num_layers": 28, "out_channels": 128, "patch_size": 1,
    "patch_size_t": 1, "qk_norm": "rms_norm_across_heads",
}  # fmt: skip
LTX_CODEC: dict[str, Any] = {
    "_class_name": "AutoencoderKLLTXVideo", "_diffusers_version": "0.32.0.dev0",
    "block_out_channels": [128, 256, 512, 512], "decoder_block_out_channels": [128, 256, 512, 512],
    "decoder_causal": False, "decoder_inject_noise": [False] * 5, "decoder_layers_per_block": [4, 3, 3, 3, 4],
    "decoder_spatio_temporal_scaling": [True, True, True, False], "encoder_causal": True, "in_channels": 3,
    "latent_channels": 128, "layers_per_block": [4, 3, 3, 3, 4], "out_channels": 3, "patch_size": 4, "patch_size_t": 1,
    "resnet_norm_eps": 1e-06, "scaling_factor": 1.0, "spatio_temporal_scaling": [True, True, True, False],
    "timestep_conditioning": False, "upsample_factor": [1, 1, 1, 1], "upsample_residual": [False] * 4,
}  # fmt: skip
LTX_CODEC_091 = {
    **LTX_CODEC, "decoder_block_out_channels": [256, 512, 1024], "decoder_inject_noise": [True, True, True, False],
    "decoder_layers_per_block": [5, 6, 7, 8], "decoder_spatio_temporal_scaling": [True] * 3,
    "timestep_conditioning": True, "upsample_factor": [2, 2, 2], "upsample_residual": [True] * 3,
}  # fmt: skip
LTX_CODEC_095 = {
    **LTX_CODEC_091, "block_out_channels": [128, 256, 512, 1024, 2048], "decoder_inject_noise": [False] * 4,
    "decoder_layers_per_block": [5, 5, 5, 5], "down_block_types": ["LTXVideo095DownBlock3D"] * 4,
    "downsample_type": ["spatial", "temporal", "spatiotemporal", "spatiotemporal"], "layers_per_block": [4, 6, 6, 2, 2],
    "spatial_compression_ratio": 32, "spatio_temporal_scaling": [True] * 4, "temporal_compression_ratio": 8,
}  # fmt: skip
PUBLISHED_CONFIGS: dict[str, dict[str, Any]] = {
    "Wan 2.1 T2V 1.3B": {**WAN, "ffn_dim": 8960, "num_attention_heads": 12, "num_layers": 30},
    "Wan 2.1 T2V 14B": WAN,
    "Wan 2.1 I2V 14B": WAN_IMAGE,
    "Wan 2.1 FLF2V 14B": {**WAN_IMAGE, "pos_embed_seq_len": 514},
    "Wan 2.1 codec": {
        "_class_name": "AutoencoderKLWan", "_diffusers_version": "0.33.0.dev0", "attn_scales": [], "base_dim": 96,
        "dim_mult": [1, 2, 4, 4], "dropout": 0.0, "latents_mean": list(LATENT_MEAN), "latents_std": list(LATENT_STD),
        "num_res_blocks": 2, "temperal_downsample": [False, True, True], "z_dim": 16,
    },
    "LTX-Video 2B": LTX,
    "LTX-Video 13B": {**LTX, "attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48},
    "LTX-Video 0.9.0 codec": LTX_CODEC,
    "LTX-Video 0.9.1 codec": LTX_CODEC_091,
    "LTX-Video 0.9.5 codec": LTX_CODEC_095,
    "LTX-Video 0.9.7 up-sampler": {
        "_class_name": "LTXLatentUpsamplerModel", "_diffusers_version": "0.34.0.dev0", "dims": 3, "in_channels": 128,
        "mid_channels": 512, "num_blocks_per_stage": 4, "spatial_upsample": True, "temporal_upsample": False,
    },
    "Mochi 1 preview": {
        "_class_name": "MochiTransformer3DModel", "_diffusers_version": "0.32.0.dev0", "activation_fn": "swiglu",
        "attention_head_dim": 128, "in_channels": 12, "max_sequence_length": 256, "num_attention_heads": 24,
        "num_layers": 48, "out_channels": None, "patch_size": 2, "pooled_projection_dim": 1536, "qk_norm": "rms_norm",
        "text_embed_dim": 4096, "time_embed_dim": 256,
    },
    "Mochi 1 codec": {
        "_class_name": "AutoencoderKLMochi", "_diffusers_version": "0.32.0.dev0", "act_fn": "silu",
        "add_attention_block": [False, True, True, True, True], "decoder_block_out_channels": [128, 256, 512, 768],
        "encoder_block_out_channels": [64, 128, 256, 384], "in_channels": 15, "latent_channels": 12,
        "latents_mean": list(MOCHI_MEAN), "latents_std": list(MOCHI_STD), "layers_per_block": [3, 3, 4, 6, 3],
        "out_channels": 3, "scaling_factor": 1.0, "spatial_expansions": [2, 2, 2], "temporal_expansions": [1, 2, 3],
    },
}  # fmt: skip
"""Sources: the folders of Wan-AI, Lightricks and genmo; I2V at 480 and 720 rows have one configuration, and so have
LTX-Video 0.9.0 to 0.9.6 and 0.9.8 distilled (2B), 0.9.7 and 0.9.8 (13B)."""


@pytest.mark.parametrize("name", PUBLISHED_CONFIGS)
def test_a_published_configuration_is_read_and_has_the_tables_of_diffusers(name: str) -> None:
    values = PUBLISHED_CONFIGS[name]
    part = PUBLISHED[values["_class_name"]]
    config = named(part.config)(values)
    assert named(part.config)(named(part.write)(config)) == config
    with torch.device("meta"):
        theirs = CLASSES[values["_class_name"]].from_config(values).state_dict()
        ours = FAMILIES[part.family].build(config_to_dict(config)).state_dict()
    table = named(part.keys)(config)
    # published files of image to video hold norms that nothing reads, which diffusers passes over as well
    idle = {"blocks.3.attn2.norm_added_q.weight": torch.empty(5120, device="meta")} if values.get("image_dim") else {}
    read = convert(table, theirs | idle)
    assert {key: value.shape for key, value in read.items()} == {key: value.shape for key, value in ours.items()}
    written = convert(table, ours, writing=True)
    assert {key: value.shape for key, value in written.items()} == {key: value.shape for key, value in theirs.items()}
    if part.family in ORIGINALS:
        original = ORIGINALS[part.family].keys(config)
        back = convert(original, convert(original, ours, writing=True))
        assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in ours.items()}
