"""Key tables of Wan: diffusers' layout and the authors' own."""

from __future__ import annotations

from vitascope.models.wan.config import WanConfig
from vitascope.weights.keys import Drop, Flatten, KeyTable, Rename, Rule, Squeeze, fused_layers, renamed_layers


def diffusers_keys(config: WanConfig) -> KeyTable:
    """Names of `WanTransformer3DModel`."""
    block = "blocks.{layer}"
    rules: list[Rule] = [
        *renamed_layers({
            "condition_embedder.time_embedder.linear_1": "level_in",
            "condition_embedder.time_embedder.linear_2": "level_out",
            "condition_embedder.time_proj": "vectors",
            "condition_embedder.text_embedder.linear_1": "text_in",
            "condition_embedder.text_embedder.linear_2": "text_out",
            "proj_out": "head",
            f"{block}.attn1.to_out.0": f"{block}.attention.out",
            f"{block}.attn2.to_q": f"{block}.cross.q",
            f"{block}.attn2.to_out.0": f"{block}.cross.out",
            f"{block}.ffn.net.0.proj": f"{block}.feed_forward.rise",
            f"{block}.ffn.net.2": f"{block}.feed_forward.fall",
        }),
        *fused_layers({
            f"{block}.attention.qkv": [f"{block}.attn1.to_{part}" for part in "qkv"],
            f"{block}.cross.kv": [f"{block}.attn2.to_{part}" for part in "kv"],
        }),
        *(Rename(f"{block}.{theirs}.norm_{part}.weight", f"{block}.{ours}.norm_{part}.weight")
          for theirs, ours in (("attn1", "attention"), ("attn2", "cross")) for part in "qk"),
        Squeeze("scale_shift_table", "head_offsets", 1),
        Squeeze(f"{block}.scale_shift_table", f"{block}.offsets", 1),
        *_patch_embedding(config),
    ]  # fmt: skip
    if config.cross_norm:
        rules += renamed_layers({f"{block}.norm2": f"{block}.cross_norm"})
    if config.image_width:
        image = "condition_embedder.image_embedder"
        rules += renamed_layers({
            f"{image}.norm1": "image.norm_in", f"{image}.norm2": "image.norm_out",
            f"{image}.ff.net.0.proj": "image.rise", f"{image}.ff.net.2": "image.fall",
        })  # fmt: skip
    if config.image_width and config.image_apart:
        rules += fused_layers({f"{block}.cross.image_kv": [f"{block}.attn2.add_{part}_proj" for part in "kv"]})
        rules += [
            Rename(f"{block}.attn2.norm_added_k.weight", f"{block}.cross.image_norm_k.weight"),
            Drop(f"{block}.attn2.norm_added_q.weight"),
        ]
    if config.image_positions:
        rules.append(Squeeze("condition_embedder.image_embedder.pos_embed", "image.positions", 1))
    return tuple(rules)


def original_keys(config: WanConfig) -> KeyTable:
    """Names of the authors' files. Their norm3 is diffusers' norm2: the one before the cross-attention."""
    block = "blocks.{layer}"
    rules: list[Rule] = [
        *renamed_layers({
            "time_embedding.0": "level_in",
            "time_embedding.2": "level_out",
            "time_projection.1": "vectors",
            "text_embedding.0": "text_in",
            "text_embedding.2": "text_out",
            "head.head": "head",
            f"{block}.self_attn.o": f"{block}.attention.out",
            f"{block}.cross_attn.q": f"{block}.cross.q",
            f"{block}.cross_attn.o": f"{block}.cross.out",
            f"{block}.ffn.0": f"{block}.feed_forward.rise",
            f"{block}.ffn.2": f"{block}.feed_forward.fall",
        }),
        *fused_layers({
            f"{block}.attention.qkv": [f"{block}.self_attn.{part}" for part in "qkv"],
            f"{block}.cross.kv": [f"{block}.cross_attn.{part}" for part in "kv"],
        }),
        *(Rename(f"{block}.{theirs}.norm_{part}.weight", f"{block}.{ours}.norm_{part}.weight")
          for theirs, ours in (("self_attn", "attention"), ("cross_attn", "cross")) for part in "qk"),
        Squeeze("head.modulation", "head_offsets", 1),
        Squeeze(f"{block}.modulation", f"{block}.offsets", 1),
        *_patch_embedding(config),
    ]  # fmt: skip
    if config.cross_norm:
        rules += renamed_layers({f"{block}.norm3": f"{block}.cross_norm"})
    if config.image_width:
        rules += renamed_layers({
            "img_emb.proj.0": "image.norm_in", "img_emb.proj.1": "image.rise",
            "img_emb.proj.3": "image.fall", "img_emb.proj.4": "image.norm_out",
        })  # fmt: skip
    if config.image_width and config.image_apart:
        rules += fused_layers({f"{block}.cross.image_kv": [f"{block}.cross_attn.{part}_img" for part in "kv"]})
        rules.append(Rename(f"{block}.cross_attn.norm_k_img.weight", f"{block}.cross.image_norm_k.weight"))
    if config.image_positions:
        rules.append(Squeeze("img_emb.emb_pos", "image.positions", 1))
    return tuple(rules)


def _patch_embedding(config: WanConfig) -> list[Rule]:
    shape = (config.in_channels, *config.patch)
    return [
        Flatten("patch_embedding.weight", "embed.weight", shape),
        Rename("patch_embedding.bias", "embed.bias"),
    ]
