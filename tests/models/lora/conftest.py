"""Small random Wan, LTX and Mochi of diffusers with ours beside them, and LoRAs for them in every way of naming."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from diffusers.models.transformers.transformer_mochi import MochiTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from vitascope.core.tracks import TextContext, Track
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
from vitascope.weights.lora import Lora, read_lora

WAN = WanConfig(width=24, depth=2, num_heads=2, hidden=40, text_width=20, in_channels=16, frequency_width=32)
WAN_IMAGE = replace(WAN, in_channels=36, image_width=24)
LTX = LTXConfig(width=24, depth=2, num_heads=2, in_channels=8, out_channels=8, text_width=20)
MOCHI = MochiConfig(
    width=24, stream_width=12, depth=3, num_heads=2, video_channels=4, text_width=16, frequency_width=32, pool_heads=8
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def their_wan(config: WanConfig = WAN) -> nn.Module:
    return WanTransformer3DModel(
        num_attention_heads=config.num_heads, attention_head_dim=config.width // config.num_heads,
        in_channels=config.in_channels, out_channels=16, text_dim=config.text_width, freq_dim=32,
        ffn_dim=config.hidden, num_layers=config.depth, image_dim=config.image_width or None,
        added_kv_proj_dim=config.width if config.image_width else None,
    )  # fmt: skip


def their_ltx() -> nn.Module:
    return LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
        num_layers=2, caption_channels=20,
    )  # fmt: skip


def their_mochi() -> nn.Module:
    return MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=3, pooled_projection_dim=12, in_channels=4,
        text_embed_dim=16, time_embed_dim=32,
    )  # fmt: skip


def wan_prediction(model: Any, track: Track, text: TextContext) -> Tensor:
    values = track.values if track.condition is None else torch.cat([track.values, track.condition], 1)
    return model(values, 1000.0 * track.noise.flatten(), text.embeddings, text.image, return_dict=False)[0]


def ltx_prediction(model: Any, track: Track, text: TextContext) -> Tensor:
    size = tuple(track.values.shape[2:])
    out = model(
        track.values.flatten(2).transpose(1, 2), text.embeddings, 1000.0 * track.noise.flatten(1), text.mask.float(),
        *size, rope_interpolation_scale=(8 / 24, 32, 32), return_dict=False,
    )[0]  # fmt: skip
    return out.transpose(1, 2).unflatten(2, size)


def mochi_prediction(model: Any, track: Track, text: TextContext) -> Tensor:
    timestep = 1000.0 * (1.0 - track.noise.flatten())
    return -model(track.values, text.embeddings, timestep, text.mask, return_dict=False)[0]


@dataclass(frozen=True)
class Family:
    """Both models, their prediction, and layers by diffusers' and by the authors' names; `swapped`: of these, those
    whose rows have their halves in the other order in the authors' files."""

    theirs: Callable[[], nn.Module]
    ours: Callable[[], nn.Module]
    table: Any
    predict: Callable[[Any, Track, TextContext], Tensor]
    channels: tuple[int, int]
    layers: dict[str, str]
    swapped: tuple[str, ...] = ()
    image: bool = False


WAN_LAYERS = {
    "blocks.0.attn1.to_q": "blocks.0.self_attn.q",
    "blocks.1.attn1.to_k": "blocks.1.self_attn.k",
    "blocks.1.attn1.to_v": "blocks.1.self_attn.v",
    "blocks.0.attn1.to_out.0": "blocks.0.self_attn.o",
    "blocks.1.attn2.to_q": "blocks.1.cross_attn.q",
    "blocks.0.attn2.to_v": "blocks.0.cross_attn.v",
    "blocks.0.ffn.net.0.proj": "blocks.0.ffn.0",
    "blocks.1.ffn.net.2": "blocks.1.ffn.2",
    "patch_embedding": "patch_embedding",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "proj_out": "head.head",
}
LTX_LAYERS = {
    "transformer_blocks.0.attn1.to_k": "transformer_blocks.0.attn1.to_k",
    "transformer_blocks.1.attn1.to_q": "transformer_blocks.1.attn1.to_q",
    "transformer_blocks.1.attn2.to_k": "transformer_blocks.1.attn2.to_k",
    "transformer_blocks.1.attn2.to_out.0": "transformer_blocks.1.attn2.to_out.0",
    "transformer_blocks.0.ff.net.0.proj": "transformer_blocks.0.ff.net.0.proj",
    "transformer_blocks.0.ff.net.2": "transformer_blocks.0.ff.net.2",
    "proj_in": "patchify_proj",
    "time_embed.linear": "adaln_single.linear",
    "time_embed.emb.timestep_embedder.linear_1": "adaln_single.emb.timestep_embedder.linear_1",
    "proj_out": "proj_out",
}
MOCHI_LAYERS = {
    "transformer_blocks.0.attn1.to_out.0": "blocks.0.attn.proj_x",
    "transformer_blocks.1.attn1.to_add_out": "blocks.1.attn.proj_y",
    "transformer_blocks.0.norm1.linear": "blocks.0.mod_x",
    "transformer_blocks.2.norm1_context.linear_1": "blocks.2.mod_y",
    "transformer_blocks.1.ff.net.0.proj": "blocks.1.mlp_x.w1",
    "transformer_blocks.1.ff.net.2": "blocks.1.mlp_x.w2",
    "patch_embed.proj": "x_embedder.proj",
    "time_embed.pooler.to_kv": "t5_y_embedder.to_kv",
    "norm_out.linear": "final_layer.mod",
}
IMAGE_LAYERS = {
    "blocks.1.attn2.add_v_proj": "blocks.1.cross_attn.v_img",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
}
FAMILY = {
    "wan": Family(their_wan, lambda: WanDenoiser(WAN), wan_keys(WAN), wan_prediction, (16, 20), WAN_LAYERS),
    "wan image": Family(
        lambda: their_wan(WAN_IMAGE), lambda: WanDenoiser(WAN_IMAGE), wan_keys(WAN_IMAGE), wan_prediction, (16, 20),
        WAN_LAYERS | IMAGE_LAYERS, image=True,
    ),
    "ltx": Family(their_ltx, lambda: LTXDenoiser(LTX), ltx_keys(LTX), ltx_prediction, (8, 20), LTX_LAYERS),
    "mochi": Family(
        their_mochi, lambda: MochiDenoiser(MOCHI), mochi_keys(MOCHI), mochi_prediction, (4, 16), MOCHI_LAYERS,
        ("norm_out.linear", "transformer_blocks.1.ff.net.0.proj"),
    ),
}  # fmt: skip


def models(name: str) -> tuple[Any, nn.Module]:
    """Theirs and ours, with the same random weights."""
    family = FAMILY[name]
    torch.manual_seed(0)
    theirs = family.theirs()
    for key, parameter in theirs.named_parameters():
        nn.init.normal_(parameter, std=0.02 if "pos_freq" in key else 0.15)
    ours = family.ours().eval().requires_grad_(False)
    load_into(ours, convert(family.table, theirs.state_dict()))
    return theirs.eval().requires_grad_(False), ours


def inputs(name: str) -> tuple[Track, TextContext]:
    family = FAMILY[name]
    channels, width = family.channels
    condition = draw(2, 20, 2, 4, 4, seed=3) if family.image else None
    track = Track(draw(2, channels, 2, 4, 4), torch.rand(2, 1, 1, 1, 1), torch.arange(2) * 8 / 24.0, condition)
    words = draw(2, 512 if family.image else 5, width, seed=4)  # they tell text from image by 512 words
    image = draw(2, 257, 24, seed=5) if family.image else None
    return track, TextContext(words, torch.ones(words.shape[:2], dtype=torch.bool), image)


def error(ours: Tensor, theirs: Tensor) -> float:
    theirs = theirs.detach()
    return float((ours.float() - theirs).norm() / theirs.norm())


@dataclass(frozen=True)
class Factors:
    """Random factors for the weight of a layer of diffusers, and what they are multiplied by."""

    down: Tensor
    up: Tensor
    alpha: float

    def delta(self) -> Tensor:
        product = self.up.flatten(1) @ self.down.flatten(1)
        return (self.alpha / len(self.down) * product).reshape(len(self.up), *self.down.shape[1:])


def factors_for(name: str, theirs: Any, seed: int = 0) -> dict[str, Factors]:
    """A pair for every layer, of ranks 1 to 4; of kernels the first is a kernel too."""
    made = {}
    for index, layer in enumerate(FAMILY[name].layers):
        shape, rank = theirs.state_dict()[f"{layer}.weight"].shape, 1 + index % 4
        up = draw(shape[0], rank, *(1 for _ in shape[2:]), seed=seed + 2 * index + 1)
        made[layer] = Factors(0.2 * draw(rank, *shape[1:], seed=seed + 2 * index), 0.2 * up, rank * (0.5 + index % 3))
    return made


def add_by_hand(theirs: Any, factors: dict[str, Factors], scale: float) -> None:
    for layer, pair in factors.items():
        theirs.get_submodule(layer).weight.add_(scale * pair.delta())


def styled(name: str, factors: dict[str, Factors], style: str) -> dict[str, Tensor]:
    """The tensors of a file that names the layers in one of the ways."""
    family, tensors = FAMILY[name], {}
    for layer, pair in factors.items():
        their = layer if style in ("diffusers", "peft", "kohya of diffusers") else family.layers[layer]
        up = torch.cat(pair.up.chunk(2)[::-1]) if their != layer and layer in family.swapped else pair.up
        flat, folded = their.replace(".", "_"), pair.alpha / len(pair.down) * pair.down
        if style in ("kohya", "kohya of diffusers", "fun"):
            stem = f"lora_unet_{'_' if style == 'fun' else ''}{flat}"
            kinds = (f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha")
        elif style == "comfy":
            stem = f"diffusion_model.{their}"
            kinds = (f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha")
        else:
            stem = {"diffusers": "transformer.", "peft": "base_model.model.", "bare": ""}[style] + their
            middle = ".default" if style == "peft" else ""
            ends = ("lora_A", "lora_B") if style == "bare" else (f"lora_A{middle}.weight", f"lora_B{middle}.weight")
            kinds = (f"{stem}.{ends[0]}", f"{stem}.{ends[1]}", "")
        tensors |= {kinds[0]: pair.down if kinds[2] else folded, kinds[1]: up.contiguous()}
        tensors |= {kinds[2]: torch.tensor(pair.alpha)} if kinds[2] else {}
    return tensors


def written(folder: Path, tensors: dict[str, Tensor], name: str = "lora.safetensors") -> Lora:
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    return read_lora(folder / name)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(
        torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before
    )


@pytest.fixture(scope="session")
def lab() -> SimpleNamespace:
    """All of the above."""
    return SimpleNamespace(
        FAMILY=FAMILY, wan_prediction=wan_prediction, mochi_prediction=mochi_prediction, draw=draw, models=models,
        inputs=inputs, error=error, factors_for=factors_for, add_by_hand=add_by_hand, styled=styled, written=written,
        bits=bits, same_bits=same_bits,
    )  # fmt: skip
