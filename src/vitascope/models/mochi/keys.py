"""Key tables of Mochi 1: diffusers' layout and the authors' own."""

from __future__ import annotations

from vitascope.models.mochi.config import MochiConfig
from vitascope.weights.keys import LEAVES, Flatten, Fuse, KeyTable, Rename, Rule, Swap, renamed_layers


def diffusers_keys(config: MochiConfig) -> KeyTable:
    """Names of `MochiTransformer3DModel`."""
    rules: list[Rule] = renamed_layers({
        "time_embed.timestep_embedder.linear_1": "level_in",
        "time_embed.timestep_embedder.linear_2": "level_out",
        "time_embed.pooler.to_q": "pool.q",
        "time_embed.pooler.to_kv": "pool.kv",
        "time_embed.pooler.to_out": "pool.out",
        "time_embed.caption_proj": "text",
        "norm_out.linear": "head_modulation",
        "proj_out": "head",
    })  # fmt: skip
    rules += [Rename("pos_frequencies", "frequencies"), *_embedding(config, "patch_embed.proj")]
    for layer in range(config.depth):
        theirs, block, last = f"transformer_blocks.{layer}", f"blocks.{layer}", layer == config.depth - 1
        rules += renamed_layers({
            f"{theirs}.norm1.linear": f"{block}.video.modulation",
            f"{theirs}.norm1_context.linear{'_1' if last else ''}": f"{block}.text.modulation",
            f"{theirs}.attn1.to_out.0": f"{block}.video.out",
        })  # fmt: skip
        names = [("video", "to_{}", "norm_{}"), ("text", "add_{}_proj", "norm_added_{}")]
        for stream, projection, norm in names:
            parts = tuple(f"{theirs}.attn1.{projection.format(part)}.weight" for part in "qkv")
            rules.append(Fuse(parts, f"{block}.{stream}.qkv.weight"))
            rules += [
                Rename(f"{theirs}.attn1.{norm.format(part)}.weight", f"{block}.{stream}.norm_{part}.weight")
                for part in "qk"
            ]
        for stream, ff in (("video", "ff"), ("text", "ff_context")):
            if stream == "video" or not last:
                rules.append(Rename(f"{theirs}.{ff}.net.0.proj.weight", f"{block}.{stream}.feed_forward.rise.weight"))
                rules.append(Rename(f"{theirs}.{ff}.net.2.weight", f"{block}.{stream}.feed_forward.fall.weight"))
        if not last:
            rules += renamed_layers({f"{theirs}.attn1.to_add_out": f"{block}.text.out"})
    return tuple(rules)


def original_keys(config: MochiConfig) -> KeyTable:
    """Names of the authors' file: both halves of the gated feed-forwards and of the last modulation change places."""
    rules: list[Rule] = renamed_layers({
        "t_embedder.mlp.0": "level_in",
        "t_embedder.mlp.2": "level_out",
        "t5_y_embedder.to_q": "pool.q",
        "t5_y_embedder.to_kv": "pool.kv",
        "t5_y_embedder.to_out": "pool.out",
        "t5_yproj": "text",
        "final_layer.linear": "head",
    })  # fmt: skip
    rules += [Swap(f"final_layer.mod.{leaf}", f"head_modulation.{leaf}") for leaf in LEAVES]
    rules += [Rename("pos_frequencies", "frequencies"), *_embedding(config, "x_embedder.proj")]
    for layer in range(config.depth):
        block, last = f"blocks.{layer}", layer == config.depth - 1
        for stream, letter in (("video", "x"), ("text", "y")):
            rules += renamed_layers({f"{block}.mod_{letter}": f"{block}.{stream}.modulation"})
            rules.append(Rename(f"{block}.attn.qkv_{letter}.weight", f"{block}.{stream}.qkv.weight"))
            rules += [
                Rename(f"{block}.attn.{part}_norm_{letter}.weight", f"{block}.{stream}.norm_{part}.weight")
                for part in "qk"
            ]
            if stream == "video" or not last:
                rules += renamed_layers({f"{block}.attn.proj_{letter}": f"{block}.{stream}.out"})
                rules.append(Swap(f"{block}.mlp_{letter}.w1.weight", f"{block}.{stream}.feed_forward.rise.weight"))
                rules.append(Rename(f"{block}.mlp_{letter}.w2.weight", f"{block}.{stream}.feed_forward.fall.weight"))
    return tuple(rules)


def _embedding(config: MochiConfig, theirs: str) -> list[Rule]:
    shape = (config.video_channels, config.patch, config.patch)
    return [Flatten(f"{theirs}.weight", "embed.weight", shape), Rename(f"{theirs}.bias", "embed.bias")]
