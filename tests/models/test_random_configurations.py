"""Denoisers, codecs and up-samplers of any configuration that diffusers builds: read as a folder says it, they give the
same, and their configurations are written back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from diffusers.models.transformers.transformer_mochi import MochiTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.ltx.modeling_latent_upsampler import LTXLatentUpsamplerModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vitascope.core.errors import CheckpointError, InputError
from vitascope.core.tracks import TextContext, Track
from vitascope.models import FAMILIES, named
from vitascope.models.published import PUBLISHED
from vitascope.weights.checkpoint import load_into
from vitascope.weights.config import config_to_dict
from vitascope.weights.keys import convert

quick = settings(max_examples=10)
Sizes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
Seeds = st.integers(0, 2**20)


def filled(model: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "timestep_scale_multiplier" in name:
            continue
        spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
        nn.init.normal_(parameter, 1.0 if "gamma" in name or name.endswith("norm.weight") else 0.0, spread)
    return model.eval().requires_grad_(False)


def ours(theirs: Any, **changes: Any) -> Any:
    """Our model with the weights of theirs, as its configuration says it; `changes` are of that."""
    values: dict[str, Any] = {**theirs.config, "_class_name": type(theirs).__name__, **changes}
    part = PUBLISHED[values["_class_name"]]
    config = named(part.config)(values)
    assert named(part.config)(named(part.write)(config)) == config
    model = FAMILIES[part.family].build(config_to_dict(config)).eval().requires_grad_(False)
    load_into(model, convert(named(part.keys)(config), theirs.state_dict()))
    return model


def same(out: Tensor, expected: Tensor) -> None:
    assert out.shape == expected.shape
    # fp32 sums in another order, through a few random layers
    assert float((out - expected).norm() / expected.norm().clamp_min(1e-12)) < 2e-5


@quick
@given(
    st.fixed_dictionaries({
        "num_attention_heads": st.integers(1, 4), "attention_head_dim": st.sampled_from([2, 4, 6, 10, 12, 16]),
        "patch_size": st.sampled_from([(1, 2, 2), (1, 1, 1), (2, 2, 2), (1, 3, 2)]),
        "in_channels": st.sampled_from([16, 20, 36]), "out_channels": st.sampled_from([4, 16]),
        "text_dim": st.integers(4, 20), "freq_dim": st.sampled_from([1, 7, 32, 256]), "ffn_dim": st.integers(8, 40),
        "num_layers": st.integers(1, 3), "cross_attn_norm": st.booleans(), "eps": st.sampled_from([1e-6, 1e-4]),
        "image_dim": st.sampled_from([None, 8, 24]), "pos_embed_seq_len": st.sampled_from([None, 10]),
        "rope_max_seq_len": st.sampled_from([32, 1024]),
    }),
    st.booleans(), Sizes, Seeds,
)  # fmt: skip
def test_wan(config: dict[str, Any], apart: bool, size: tuple[int, int, int], seed: int) -> None:
    image, apart = config["image_dim"], apart and config["image_dim"] is not None
    width = config["num_attention_heads"] * config["attention_head_dim"]
    theirs = filled(WanTransformer3DModel(**config, added_kv_proj_dim=width if apart else None), seed)
    full = [count * step for count, step in zip(size, config["patch_size"], strict=True)]
    made, beside = config["out_channels"], config["in_channels"] - config["out_channels"]
    values, levels = torch.randn(2, config["in_channels"], *full), torch.rand(2)
    words = torch.randn(2, 512 if apart else 5, config["text_dim"])  # diffusers counts on 512 where images are apart
    double = 2 if image and config["pos_embed_seq_len"] else 1
    tokens = torch.randn(2 * double, 5, image) if image else None
    expected = theirs(values, 1000 * levels, words, tokens, return_dict=False)[0]
    condition = values[:, made:] if beside else None
    track = Track(values[:, :made], levels.view(2, 1, 1, 1, 1), torch.arange(full[0]) / 4, condition)
    shown = None if tokens is None else tokens.view(2, 5 * double, -1)
    text = TextContext(words, torch.ones(words.shape[:2], dtype=torch.bool), shown)
    same(ours(theirs)({"video": track}, text)["video"], expected)


@quick
@given(
    st.integers(1, 4), st.sampled_from([2, 4, 6, 10, 16]),
    st.fixed_dictionaries({
        "in_channels": st.integers(2, 8), "out_channels": st.integers(2, 8), "num_layers": st.integers(1, 3),
        "norm_eps": st.sampled_from([1e-6, 1e-3]), "caption_channels": st.integers(4, 20),
    }),
    Sizes, st.sampled_from([8.0, 24.0, 30.0]), Seeds,
)  # fmt: skip
def test_ltx(heads: int, each: int, config: dict[str, Any], size: tuple[int, int, int], fps: float, seed: int) -> None:
    each = max(each, 6 // heads + (6 // heads) % 2)  # positions need a width of 6, in diffusers too
    sizes = {"num_attention_heads": heads, "attention_head_dim": each, "cross_attention_dim": heads * each}
    theirs = filled(LTXVideoTransformer3DModel(**sizes, **config), seed)
    values, levels = torch.randn(2, config["in_channels"], *size), torch.rand(2, 1, *size)
    words, mask = torch.randn(2, 6, config["caption_channels"]), torch.arange(6) < torch.tensor([[6], [seed % 6 + 1]])
    expected = theirs(
        values.flatten(2).transpose(1, 2), words, 1000 * levels.flatten(1), mask.float(), *size,
        rope_interpolation_scale=(8 / fps, 32, 32), return_dict=False,
    )[0].transpose(1, 2).unflatten(2, size)  # fmt: skip
    track = Track(values, levels, torch.arange(size[0]) * 8 / fps)
    same(ours(theirs)({"video": track}, TextContext(words, mask))["video"], expected)


@quick
@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # theirs asks for fp32 by autocast
@given(
    st.fixed_dictionaries({
        "patch_size": st.integers(1, 3), "num_attention_heads": st.integers(1, 4),
        "attention_head_dim": st.sampled_from([2, 4, 8, 16]), "num_layers": st.integers(1, 3),
        "pooled_projection_dim": st.integers(4, 24), "in_channels": st.integers(2, 12),
        "text_embed_dim": st.sampled_from([8, 16, 24]), "time_embed_dim": st.sampled_from([1, 5, 8, 256]),
    }),
    Sizes, Seeds,
)  # fmt: skip
def test_mochi(config: dict[str, Any], size: tuple[int, int, int], seed: int) -> None:
    theirs = filled(MochiTransformer3DModel(**config), seed)
    full = (size[0], size[1] * config["patch_size"], size[2] * config["patch_size"])
    values, levels = torch.randn(2, config["in_channels"], *full), torch.rand(2)
    # a text may have no words at all: the empty prompt
    words, mask = torch.randn(2, 6, config["text_embed_dim"]), torch.arange(6) < torch.tensor([[6], [seed % 7]])
    expected = -theirs(values, words, 1000 * (1 - levels), mask, return_dict=False)[0]
    track = Track(values, levels.view(2, 1, 1, 1, 1), torch.arange(full[0]) / 4)
    same(ours(theirs)({"video": track}, TextContext(words, mask))["video"], expected)


@quick
@given(st.sampled_from([(2, True, False), (3, True, False), (3, False, True), (3, True, True)]), Sizes, Seeds)
def test_up_samplers(kind: tuple[int, bool, bool], size: tuple[int, int, int], seed: int) -> None:
    dims, space, time = kind
    theirs = LTXLatentUpsamplerModel(4, 32, 1 + seed % 2, dims, space, time)
    latents = torch.randn(2, 4, size[0] + time, *size[1:])
    same(ours(filled(theirs, seed))(latents), theirs(latents))


@quick
@given(
    st.integers(4, 8), st.sampled_from([None, 6]), st.lists(st.integers(1, 3), min_size=3, max_size=4),
    st.integers(1, 2), Sizes, Seeds,
)  # fmt: skip
def test_codec_of_wan(
    base: int, other: int | None, multiples: list[int], blocks: int, size: tuple[int, int, int], seed: int
) -> None:
    multiples = [2 * multiple for multiple in multiples]  # halved on the way up
    halve = [False] * (len(multiples) - 3) + [True, True]
    theirs = filled(
        AutoencoderKLWan(base, other, 4, multiples, blocks, [], halve, 0.1, [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 0.5, 1.5]),
        seed,
    )
    side = 2 ** (len(multiples) - 1)
    frames = torch.randn(1, 3, 1 + 4 * (size[0] - 1), side * size[1], side * size[2]).clamp(-1, 1)
    mean, std = (torch.tensor(theirs.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    raw, codec = theirs.encode(frames).latent_dist.mode(), ours(theirs)
    same(codec.encode(frames), (raw - mean) / std)
    same(codec.decode((raw - mean) / std).clamp(-1, 1), theirs.decode(raw).sample)


@quick
@given(
    st.sampled_from([("spatiotemporal",), ("spatial", "temporal"), ("temporal", "spatial"), ("conv",), ()]),
    st.lists(st.booleans(), min_size=6, max_size=6), st.sampled_from([1, 2, 4]), Sizes, Seeds,
)  # fmt: skip
def test_codec_of_ltx(
    steps: tuple[str, ...], flags: list[bool], patch: int, size: tuple[int, int, int], seed: int
) -> None:
    conditioned, noisy, residual, narrow, encoder_causal, decoder_causal = flags
    growth = {"spatial": 4, "temporal": 2, "spatiotemporal": 8, "conv": 1}
    channels, widths = [4], [8, 8 * (1 + narrow)]
    for step in steps:
        channels.append(channels[-1] * growth[step])
    scaled = bool(steps)
    theirs = filled(
        AutoencoderKLLTXVideo(
            latent_channels=6, block_out_channels=(*channels, channels[-1]),
            down_block_types=("LTXVideo095DownBlock3D",) * len(channels), layers_per_block=(1,) * (len(channels) + 1),
            spatio_temporal_scaling=(*[True] * len(steps), False), downsample_type=(*steps, "conv"),
            decoder_block_out_channels=tuple(widths), decoder_layers_per_block=(1, 2, 1),
            decoder_spatio_temporal_scaling=(False, scaled), upsample_residual=(False, residual),
            upsample_factor=(1, 2 if narrow and scaled else 1), decoder_inject_noise=(False, noisy, False),
            timestep_conditioning=conditioned, patch_size=patch, encoder_causal=encoder_causal,
            decoder_causal=decoder_causal,
        ),
        seed,
    )  # fmt: skip
    time, side = (2, 2 * patch) if scaled else (1, patch)
    frames = torch.randn(2, 3, 1 + time * (size[0] - 1), side * size[1], side * size[2]).clamp(-1, 1)
    if widths[0] != widths[1] and not (narrow and scaled) and (conditioned or noisy):
        with pytest.raises(InputError, match="neither noise nor timesteps"):
            ours(theirs)
        return
    codec = ours(theirs)
    raw = theirs.encode(frames).latent_dist.mode()
    same(codec.encode(frames), raw)
    torch.manual_seed(seed)
    if conditioned:
        noised = (1 - 0.1) * raw + 0.1 * torch.randn(raw.shape)
        expected = theirs.decode(noised, torch.full((2,), 0.3)).sample
    else:
        expected = theirs.decode(raw).sample
    same(codec.decode(raw, 1, 0.3, 0.1, torch.Generator().manual_seed(seed)), expected)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (WanTransformer3DModel, {"added_kv_proj_dim": 7}, "added_kv_proj_dim is 7; only None"),
        (WanTransformer3DModel, {"qk_norm": "rms_norm"}, "qk_norm is 'rms_norm'; only 'rms_norm_across_heads'"),
        (WanTransformer3DModel, {"out_channels": 20}, "out_channels.* at most 16, got 20"),
        (LTXVideoTransformer3DModel, {"attention_head_dim": 5}, "attention_head_dim must be even, got 5"),
        (LTXVideoTransformer3DModel, {"attention_bias": False}, "attention_bias is False; only True"),
        (LTXVideoTransformer3DModel, {"patch_size": 2}, "patch_size is 2; only 1"),
        (MochiTransformer3DModel, {"out_channels": 4}, "out_channels is 4; only 12"),
        (MochiTransformer3DModel, {"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'; only 'rms_norm'"),
        (AutoencoderKLWan, {"dim_mult": [1, 2]}, "temperal_downsample must have 1 values, got 3"),
        (AutoencoderKLWan, {"patch_size": 2}, "patch_size is 2; only None"),
    ],
)
def test_what_is_not_known_is_refused_by_its_key(model: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((CheckpointError, InputError), match=message):
        named(PUBLISHED[model.__name__].config)({"_class_name": model.__name__, **changes})
