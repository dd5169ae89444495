"""Layers disabled for guidance, in every family, against the same layers disabled in diffusers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode, LayerSkipConfig, _apply_layer_skip_hook
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from diffusers.models.transformers.transformer_mochi import MochiTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn

from vitascope.core.protocols import InBlocks
from vitascope.core.tracks import TextContext, Track
from vitascope.diffusion.guidance import Perturbation, disable
from vitascope.models.ltx.config import LTXConfig
from vitascope.models.ltx.keys import diffusers_keys as ltx_keys
from vitascope.models.ltx.model import LTXDenoiser
from vitascope.models.mochi.config import MochiConfig
from vitascope.models.mochi.keys import diffusers_keys as mochi_keys
from vitascope.models.mochi.model import MochiDenoiser
from vitascope.models.wan.config import WanConfig
from vitascope.models.wan.keys import diffusers_keys as wan_keys
from vitascope.models.wan.model import WanDenoiser
from vitascope.weights.checkpoint import load_into
from vitascope.weights.keys import convert

LATENTS = (2, 4, 6)
LTX = LTXConfig(width=48, depth=3, num_heads=4, in_channels=8, out_channels=8, text_width=20)
WAN = WanConfig(
    width=48, depth=3, num_heads=4, hidden=80, text_width=20, in_channels=36, frequency_width=32, image_width=24
)
MOCHI = MochiConfig(
    width=48, stream_width=24, depth=3, num_heads=4, video_channels=4, text_width=16, frequency_width=32, pool_heads=8
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ltx_prediction(model: Any, track: Track, text: TextContext) -> Tensor:
    timestep = 1000.0 * track.noise.expand(2, 1, *LATENTS).flatten(1)
    out = model(
        track.values.flatten(2).transpose(1, 2), text.embeddings, timestep, text.mask.float(), *LATENTS,
        rope_interpolation_scale=(8 / 24.0, 32, 32), return_dict=False,
    )[0]  # fmt: skip
    return out.transpose(1, 2).unflatten(2, LATENTS)


def wan_prediction(model: Any, track: Track, text: TextContext) -> Tensor:
    assert track.condition is not None
    values, timestep = torch.cat([track.values, track.condition], 1), 1000.0 * track.noise.flatten()
    return model(values, timestep, text.embeddings, text.image, return_dict=False)[0]


def mochi_prediction(model: Any, track: Track, text: TextContext) -> Tensor:
    timestep = 1000.0 * (1.0 - track.noise.flatten())
    return -model(track.values, text.embeddings, timestep, text.mask, return_dict=False)[0]


@dataclass(frozen=True)
class Family:
    """Ours, theirs with random weights, and how theirs is called. words: of each of two clips, how many are real."""

    config: Any
    ours: Callable[[Any], Any]
    keys: Callable[[Any], Any]
    theirs: Callable[[], Any]
    predict: Callable[[Any, Track, TextContext], Tensor]
    channels: int
    words: tuple[int, int] = (7, 2)


FAMILIES = {
    "ltx": Family(
        LTX, LTXDenoiser, ltx_keys,
        lambda: LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=12, cross_attention_dim=48,
            num_layers=3, caption_channels=20,
        ),
        ltx_prediction, 8,
    ),
    "wan": Family(
        WAN, WanDenoiser, wan_keys,
        lambda: WanTransformer3DModel(
            num_attention_heads=4, attention_head_dim=12, in_channels=36, out_channels=16, text_dim=20, freq_dim=32,
            ffn_dim=80, num_layers=3, image_dim=24, added_kv_proj_dim=48,
        ),
        wan_prediction, 16, (512, 512),
    ),
    "mochi": Family(
        MOCHI, MochiDenoiser, mochi_keys,
        lambda: MochiTransformer3DModel(
            num_attention_heads=4, attention_head_dim=12, num_layers=3, pooled_projection_dim=24, in_channels=4,
            text_embed_dim=16, time_embed_dim=32,
        ),
        mochi_prediction, 4,
    ),
}  # fmt: skip


def their_model(family: Family) -> Any:
    torch.manual_seed(0)
    model = family.theirs()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.02 if "pos_freq" in name else 0.1)
    return model.eval().requires_grad_(False)


def our_model(family: Family, theirs: nn.Module, config: Any = None) -> Any:
    model = family.ours(family.config if config is None else config).eval().requires_grad_(False)
    load_into(model, convert(family.keys(family.config), theirs.state_dict()))
    return model


def inputs(family: Family) -> tuple[Track, TextContext]:
    config, count = family.config, max(family.words)
    levels = torch.rand((2, 1, 1, 1, 1), generator=torch.Generator().manual_seed(1))
    extra, image_width = getattr(config, "condition_channels", 0), getattr(config, "image_width", 0)
    condition = draw(2, extra, *LATENTS, seed=2) if extra else None
    image = draw(2, 257, image_width, seed=3) if image_width else None
    # LTX is told times in seconds; the others do not read them
    track = Track(draw(2, family.channels, *LATENTS), levels, torch.arange(LATENTS[0]) * 8 / 24.0, condition)
    mask = torch.arange(count) < torch.tensor(family.words)[:, None]
    return track, TextContext(draw(2, count, config.text_width, seed=4), mask, image)


def disabled(model: InBlocks, layers: tuple[int, ...], how: Perturbation, *given: Any) -> Tensor:
    state, passage = model.enter(*given)
    return disable(passage, layers, how).run(state)["video"]


def disable_theirs(model: Any, layers: tuple[int, ...], how: Perturbation) -> None:
    """By their hook for blocks; by their mode that gives back values, around the self-attention alone, for attention:
    their hook for that knows no processor of these models."""
    if how == "block":
        _apply_layer_skip_hook(model, LayerSkipConfig(list(layers)))
        return
    blocks = model.blocks if hasattr(model, "blocks") else model.transformer_blocks
    for index in layers:
        attention = blocks[index].attn1
        plain = attention.forward

        def alone(*args: Any, plain: Any = plain, **named: Any) -> Any:
            with AttentionScoreSkipFunctionMode():
                return plain(*args, **named)

        attention.forward = alone


def differ(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # their Mochi asks for fp32 by autocast
@pytest.mark.parametrize("how", ["attention", "block"])
@pytest.mark.parametrize("layers", [(1,), (0, 2)])
@pytest.mark.parametrize("name", FAMILIES)
def test_disabled_layers_give_what_they_give_in_diffusers(
    name: str, layers: tuple[int, ...], how: Perturbation
) -> None:
    family = FAMILIES[name]
    theirs = their_model(family)
    ours = our_model(family, theirs)
    track, text = inputs(family)
    plain = ours({"video": track}, text)["video"]
    disable_theirs(theirs, layers, how)
    expected = family.predict(theirs, track, text)
    out = disabled(ours, layers, how, {"video": track}, text)
    assert differ(out, expected) < 1e-5  # fp32 sums in another order
    assert differ(out, plain) > 0.01


def test_where_text_sees_text_alone_the_video_is_disabled() -> None:
    """Video tokens of Mochi get what they ask of values alone: what the words are does not matter to that layer."""
    family = FAMILIES["mochi"]
    model = our_model(family, their_model(family), replace(MOCHI, text_sees="text"))
    track, text = inputs(family)
    prepared = model.prepare(text)
    pooled, *memories = prepared.prepared
    others = replace(prepared, prepared=(pooled, *(torch.randn_like(part) for part in memories)))
    every = (0, 1, 2)
    out = [disabled(model, every, "attention", {"video": track}, words) for words in (prepared, others)]
    assert torch.equal(*out)
    assert differ(out[0], model({"video": track}, text)["video"]) > 0.01
