"""Key tables of LTX-Video: diffusers' layout and the authors' own."""

from __future__ import annotations

from vitascope.models.ltx.config import LTXConfig
from vitascope.weights.keys import KeyTable, Rename, Rule, fused_layers, renamed_layers

EMBEDDINGS = {
    "time_embed.emb.timestep_embedder.linear_1": "level_in",
    "time_embed.emb.timestep_embedder.linear_2": "level_out",
    "caption_projection.linear_1": "text_in",
    "caption_projection.linear_2": "text_out",
}
BLOCK = {
    "attn1.to_out.0": "attention.out",
    "attn2.to_q": "cross.q",
    "attn2.to_out.0": "cross.out",
    "ff.net.0.proj": "feed_forward.rise",
    "ff.net.2": "feed_forward.fall",
}


def diffusers_keys(config: LTXConfig) -> KeyTable:
    """Names of `LTXVideoTransformer3DModel`, alike for all configurations."""
    del config
    return _table(("norm_q", "norm_k"), {"proj_in": "embed", "time_embed.linear": "vectors", "proj_out": "head"})


def original_keys(config: LTXConfig) -> KeyTable:
    """Names of the authors' files, without their prefix `model.diffusion_model.`, alike for all configurations."""
    del config
    ends = {"patchify_proj": "embed", "adaln_single.linear": "vectors", "proj_out": "head"}
    return _table(("q_norm", "k_norm"), ends)


def _table(norms: tuple[str, str], ends: dict[str, str]) -> KeyTable:
    """`norms`: theirs of queries and keys. `ends`: their first and last maps, and the last of the noise level."""
    theirs_block, block = "transformer_blocks.{layer}", "blocks.{layer}"
    names = {**ends, **{t.replace("time_embed", _time(ends)): o for t, o in EMBEDDINGS.items()}}
    names |= {f"{theirs_block}.{theirs}": f"{block}.{ours}" for theirs, ours in BLOCK.items()}
    rules: list[Rule] = [
        *renamed_layers(names),
        *fused_layers({
            f"{block}.attention.qkv": [f"{theirs_block}.attn1.to_{part}" for part in "qkv"],
            f"{block}.cross.kv": [f"{theirs_block}.attn2.to_{part}" for part in "kv"],
        }),
    ]  # fmt: skip
    for theirs, ours in (("attn1", "attention"), ("attn2", "cross")):
        rules += [
            Rename(f"{theirs_block}.{theirs}.{norm}.weight", f"{block}.{ours}.norm_{part}.weight")
            for norm, part in zip(norms, "qk", strict=True)
        ]
    return (
        *rules,
        Rename("scale_shift_table", "head_offsets"),
        Rename(f"{theirs_block}.scale_shift_table", f"{block}.offsets"),
    )


def _time(ends: dict[str, str]) -> str:
    """What the noise level's embedding is called, from the name of its last map."""
    return next(theirs for theirs, ours in ends.items() if ours == "vectors").removesuffix(".linear")
