"""LoRAs on small random Wan, LTX and Mochi: against diffusers with PEFT, and against W + scale * alpha / r * B A put by
hand into diffusers' models; merged, beside the weights, stacked, removed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from diffusers.models.transformers.transformer_mochi import MochiTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from peft import LoraConfig, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from vitascope.core.errors import CapabilityError, CheckpointError, InputError
from vitascope.core.tracks import TextContext, Track
from vitascope.models import FAMILIES
from vitascope.models.lora import LoraStack, family_of, looks_like
from vitascope.models.ltx.config import LTXConfig
from vitascope.models.ltx.keys import diffusers_keys as ltx_keys
from vitascope.models.ltx.model import LTXDenoiser
from vitascope.models.mochi.config import MochiConfig
from vitascope.models.mochi.keys import diffusers_keys as mochi_keys
from vitascope.models.mochi.model import MochiDenoiser
from vitascope.models.wan.config import WanConfig
from vitascope.models.wan.keys import diffusers_keys as wan_keys
from vitascope.models.wan.model import WanDenoiser
from vitascope.nn.low_rank import Branch, LowRankLinear
from vitascope.nn.precision import store_matrices
from vitascope.weights.checkpoint import load_into
from vitascope.weights.keys import convert
from vitascope.weights.lora import Lora, Target, read_lora

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # Mochi in diffusers

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
each_family = pytest.mark.parametrize("name", FAMILY)


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


STYLES = ("diffusers", "peft", "bare", "comfy", "kohya", "kohya of diffusers", "fun")


NAMED = [(name, style) for name in ("wan", "ltx", "mochi") for style in STYLES]


@pytest.mark.parametrize(("name", "style"), [*NAMED, ("wan image", "diffusers"), ("wan image", "comfy")])
def test_every_way_of_naming_gives_the_sum_of_the_definition(name: str, style: str, tmp_path: Path) -> None:
    theirs, ours = models(name)
    track, text = inputs(name)
    predict, factors = FAMILY[name].predict, factors_for(name, theirs)
    plain, before = ours({"video": track}, text)["video"], bits(ours)
    lora = written(tmp_path, styled(name, factors, style))
    add_by_hand(theirs, factors, 0.7)
    expected = predict(theirs, track, text)
    assert error(plain, expected) > 0.05  # the LoRA is there to be seen
    stack = LoraStack(ours)
    stack.set([(lora, 0.7)])
    # fp32 sums in another order
    assert error(ours({"video": track}, text)["video"], expected) < 1e-4
    stack.set([(lora, 0.7)], merged=False)
    assert sum(isinstance(part, LowRankLinear) for part in ours.modules()) > 5
    assert same_bits(ours, before)  # nothing was merged, and no name has changed
    assert error(ours({"video": track}, text)["video"], expected) < 1e-4
    stack.remove()
    assert same_bits(ours, before)
    assert torch.equal(ours({"video": track}, text)["video"], plain)


TARGETS = {
    "wan": r".*(to_[qkv]|to_out\.0|ffn\.net\.(0\.proj|2)|patch_embedding|time_proj|proj_out)",
    "wan image": r".*(to_[qkv]|add_[kv]_proj|ff\.net\.2|patch_embedding)",
    "ltx": r".*(to_[qkv]|to_out\.0|net\.2|proj_in|time_embed\.linear)",
    "mochi": r".*(to_[qkv]|add_[qkv]_proj|to_out\.0|net\.0\.proj|patch_embed\.proj|norm_out\.linear)",
}

PATTERNS: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "wan": ({"attn1.to_k": 2, "patch_embedding": 5}, {r".*\.1\.attn2\.to_v": 9}),
    "wan image": ({"attn1.to_k": 2, "^patch_embedding": 5}, {r"add_k_proj": 9}),
    "ltx": ({"attn1.to_k": 2, "proj_in": 1}, {r"transformer_blocks\.1\.attn2\.to_v": 9}),
    "mochi": ({"attn1.to_k": 2, "patch_embed.proj": 1}, {r".*\.1\.attn1\.add_q_proj": 9}),
}


def config_of(name: str, **settings: Any) -> LoraConfig:
    """PEFT warns of patterns that fit no layer."""
    ranks, alphas = PATTERNS[name]
    plain = {"lora_alpha": 5, "target_modules": TARGETS[name], "rank_pattern": ranks, "alpha_pattern": alphas}
    return LoraConfig(r=3, **{**plain, **settings})


def randomised(theirs: nn.Module, seed: int = 0) -> None:
    torch.manual_seed(seed)
    for key, parameter in theirs.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.2)


@pytest.mark.filterwarnings("ignore:.*invalid shape")  # PEFT, of biases
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, {}) for name in FAMILY),
        ("wan", {"use_rslora": True}),
        ("mochi", {"use_rslora": True}),
        *((name, {"lora_bias": True, "lora_alpha": 2}) for name in ("wan image", "ltx", "mochi")),
    ],
)
def test_adapters_that_diffusers_saves(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """With ranks, alphas and patterns of both in the head of the file."""
    theirs, ours = models(name)
    if settings.get("lora_bias"):
        targets = r".*(to_out\.0|norm1\.linear)" if name == "mochi" else TARGETS[name]  # where there are biases
        settings = {**settings, "target_modules": targets, "rank_pattern": {}, "alpha_pattern": {}}
    theirs.add_adapter(config_of(name, **settings))
    randomised(theirs)
    theirs.save_lora_adapter(tmp_path)
    track, text = inputs(name)
    expected, before = FAMILY[name].predict(theirs, track, text), bits(ours)
    stack, lora = LoraStack(ours), read_lora(tmp_path)
    for merged in (True, False):
        stack.set([(lora, 1.0)], merged=merged)
        assert error(ours({"video": track}, text)["video"], expected) < 1e-4
    stack.remove()
    assert same_bits(ours, before)


@pytest.mark.parametrize("name", ["wan", "ltx", "mochi"])
def test_adapters_that_peft_saves(name: str, tmp_path: Path) -> None:
    theirs, ours = models(name)
    wrapped: Any = get_peft_model(theirs, config_of(name, use_rslora=True))
    randomised(wrapped)
    wrapped.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()
    track, text = inputs(name)
    expected = FAMILY[name].predict(wrapped.base_model.model, track, text)
    for place in (tmp_path, tmp_path / "adapter_model.safetensors"):
        stack = LoraStack(ours)
        stack.set([(read_lora(place), 1.0)])
        assert error(ours({"video": track}, text)["video"], expected) < 1e-4
        stack.remove()


def test_files_that_pipelines_of_diffusers_save(tmp_path: Path) -> None:
    """Names and settings under `transformer.`."""
    theirs, ours = models("wan")
    theirs.add_adapter(config_of("wan"))
    randomised(theirs)
    layers: Any = get_peft_model_state_dict(theirs)
    metadata = theirs.peft_config["default"].to_dict()
    WanPipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=metadata)
    track, text = inputs("wan")
    LoraStack(ours).set([(read_lora(tmp_path), 1.0)])
    assert error(ours({"video": track}, text)["video"], wan_prediction(theirs, track, text)) < 1e-4


@pytest.mark.parametrize("style", ["comfy", "kohya"])
def test_files_of_the_community_equal_what_diffusers_reads_of_them(style: str, tmp_path: Path) -> None:
    """With a difference of a bias, which diffusers adds to the low-rank outputs."""
    theirs, ours = models("wan")
    parts = {"self_attn": "attn1", "cross_attn": "attn2"}
    ends = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
    layers = {
        f"blocks.{n}.{theirs_part}.{ends[end]}": f"blocks.{n}.{part}.{end}"
        for n in range(2) for part, theirs_part in parts.items() for end in ends
    }  # fmt: skip
    layers |= {f"blocks.{n}.ffn.net.{a}": f"blocks.{n}.ffn.{b}" for n in range(2) for a, b in (("0.proj", 0), (2, 2))}
    tensors: dict[str, Tensor] = {}
    for index, (layer, name) in enumerate(layers.items()):
        shape = theirs.get_submodule(layer).weight.shape
        stem = f"diffusion_model.{name}" if style == "comfy" else f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": 0.2 * draw(4, shape[1], seed=index), f"{stem}.alpha": torch.tensor(3.0)}
        tensors |= {f"{stem}.lora_up.weight": 0.2 * draw(shape[0], 4, seed=99 + index)}
        if style == "comfy":
            tensors |= {f"{stem}.diff_b": 0.2 * draw(shape[0], seed=999 + index)}
    lora = written(tmp_path, tensors)
    state: Any = WanLoraLoaderMixin.lora_state_dict({key: value.clone() for key, value in tensors.items()})
    theirs.load_lora_adapter(state, prefix="transformer")
    track, text = inputs("wan")
    LoraStack(ours).set([(lora, 1.0)])
    assert error(ours({"video": track}, text)["video"], wan_prediction(theirs, track, text)) < 1e-4


def test_a_layer_that_is_one_of_theirs_and_three_of_diffusers(tmp_path: Path) -> None:
    """Mochi's qkv in the authors' names has one down factor, and rows of its up factor are queries, keys and values."""
    theirs, ours = models("mochi")
    down, up = 0.3 * draw(4, 24), 0.3 * draw(72, 4, seed=1)
    lora = written(tmp_path, {"blocks.1.attn.qkv_x.lora_A": down, "blocks.1.attn.qkv_x.lora_B": up})
    for part, rows in zip("qkv", up.chunk(3), strict=True):
        theirs.get_submodule(f"transformer_blocks.1.attn1.to_{part}").weight.add_(rows @ down)
    track, text = inputs("mochi")
    LoraStack(ours).set([(lora, 1.0)])
    assert error(ours({"video": track}, text)["video"], mochi_prediction(theirs, track, text)) < 1e-4


def test_whole_differences_reach_norms_tables_biases_and_kernels(tmp_path: Path) -> None:
    theirs, ours = models("wan")
    diffs = {
        ("blocks.0.norm3.diff", "blocks.0.norm2.weight"): (24,),
        ("blocks.0.norm3.diff_b", "blocks.0.norm2.bias"): (24,),
        ("blocks.1.self_attn.norm_q.diff", "blocks.1.attn1.norm_q.weight"): (24,),
        ("blocks.1.self_attn.k.diff", "blocks.1.attn1.to_k.weight"): (24, 24),
        ("blocks.1.cross_attn.v.diff_b", "blocks.1.attn2.to_v.bias"): (24,),
        ("blocks.0.diff_m", "blocks.0.scale_shift_table"): (1, 6, 24),
        ("head.modulation.diff", "scale_shift_table"): (1, 2, 24),
        ("patch_embedding.diff", "patch_embedding.weight"): (24, 16, 1, 2, 2),
        ("patch_embedding.diff_b", "patch_embedding.bias"): (24,),
    }
    values = {names: 0.3 * draw(*shape, seed=index) for index, (names, shape) in enumerate(diffs.items())}
    lora = written(tmp_path, {f"diffusion_model.{file}": value for (file, _), value in values.items()})
    for (_, their), value in values.items():
        dict(theirs.named_parameters())[their].add_(0.5 * value)
    track, text = inputs("wan")
    before = bits(ours)
    stack = LoraStack(ours)
    for merged in (True, False):
        stack.set([(lora, 0.5)], merged=merged)
        assert error(ours({"video": track}, text)["video"], wan_prediction(theirs, track, text)) < 1e-4
    assert sum(not torch.equal(before[key], value) for key, value in ours.state_dict().items()) == len(diffs)
    stack.remove()
    assert same_bits(ours, before)


def test_a_difference_of_a_tensor_that_is_not_used_changes_nothing(tmp_path: Path) -> None:
    _, ours = models("wan image")
    before = bits(ours)
    LoraStack(ours).set([(written(tmp_path, {"transformer.blocks.0.attn2.norm_added_q.diff": torch.ones(24)}), 1.0)])
    assert same_bits(ours, before)


@each_family
def test_stacked_loras_add_up_in_any_order_and_scales_can_be_changed(name: str, tmp_path: Path) -> None:
    theirs, ours = models(name)
    track, text = inputs(name)
    one, two = (factors_for(name, theirs, seed) for seed in (0, 50))
    first = written(tmp_path, styled(name, one, "comfy"), "one.safetensors")
    second = written(tmp_path, styled(name, two, "diffusers"), "two.safetensors")
    add_by_hand(theirs, one, 0.6)
    add_by_hand(theirs, two, -0.3)
    expected, before, stack = FAMILY[name].predict(theirs, track, text), bits(ours), LoraStack(ours)
    stack.set([(first, 1.0)], merged=False)
    stack.set([(first, 0.6), (second, -0.3)])
    merged = bits(ours)
    assert error(ours({"video": track}, text)["video"], expected) < 1e-4
    stack.set([(first, 0.6), (second, -0.3)], merged=False)
    assert error(ours({"video": track}, text)["video"], expected) < 1e-4
    stack.set([(second, 7.0)])
    stack.set([(first, 0.6), (second, -0.3)])
    assert same_bits(ours, merged)  # always from the weights as they were, never from a sum that was rounded
    stack.set([])
    assert same_bits(ours, before)


def test_a_prepared_text_is_read_with_the_lora(tmp_path: Path) -> None:
    theirs, ours = models("ltx")
    track, text = inputs("ltx")
    LoraStack(ours).set([(written(tmp_path, styled("ltx", factors_for("ltx", theirs), "kohya")), 1.0)], merged=False)
    assert isinstance(ours, LTXDenoiser)
    bare = replace(ours.prepare(text), embeddings=torch.zeros_like(text.embeddings))
    assert torch.equal(ours({"video": track}, bare)["video"], ours({"video": track}, text)["video"])


@each_family
@pytest.mark.parametrize("autocast", [False, True])
def test_weights_in_bf16_are_rounded_once_and_come_back_to_the_bit(name: str, autocast: bool, tmp_path: Path) -> None:
    theirs, ours = models(name)
    track, text = inputs(name)
    factors = factors_for(name, theirs)
    tensors = {key: value.bfloat16() for key, value in styled(name, factors, "comfy").items() if "alpha" not in key}
    lora = written(tmp_path, tensors | {k: v for k, v in styled(name, factors, "comfy").items() if "alpha" in k})
    rounded = {
        layer: replace(pair, down=pair.down.bfloat16().float(), up=pair.up.bfloat16().float())
        for layer, pair in factors.items()
    }
    exact = {key: value.clone() for key, value in ours.state_dict().items()}
    store_matrices(ours, torch.bfloat16)
    before, stack = bits(ours), LoraStack(ours)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        stack.set([(lora, 0.8)])
    # by hand: bf16 weights of theirs, the sum in fp32, one rounding
    for parameter in theirs.parameters():
        parameter.copy_(parameter.bfloat16().float())
    add_by_hand(theirs, rounded, 0.8)
    wanted = convert(FAMILY[name].table, theirs.state_dict())
    for key, value in ours.state_dict().items():
        if value.dtype == torch.bfloat16:
            # the last bit may fall to the other side where fp32 sums in another order
            assert (value.float() - wanted[key]).abs().max() <= wanted[key].abs().max() * 2**-8, key
            same = (value == wanted[key].bfloat16()).float().mean()
            assert same > 0.99, key
        else:
            assert torch.equal(value, exact[key]), key
    with torch.autocast("cpu", torch.bfloat16):
        merged = ours({"video": track}, text)["video"]
        stack.set([(lora, 0.8)], merged=False)
        beside = ours({"video": track}, text)["video"]
        stack.remove()
        without = ours({"video": track}, text)["video"]
    # a few roundings of 8 bits through two blocks; far less than what the LoRA does
    assert error(beside, merged.float()) < 0.06 < error(without, merged.float())
    assert same_bits(ours, before)


def test_our_own_names_and_a_model_without_tables(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = {"width": 32, "depth": 2, "num_heads": 2, "audio_width": 16, "audio_heads": 2, "text_width": 16}
    ours = FAMILIES["factorised"].build(config | {"video_channels": 4, "audio_channels": 6, "patch": [1, 2, 2]})
    names = [name for name, value in ours.state_dict().items() if value.ndim > 1 and name.endswith(".weight")]
    tensors: dict[str, Tensor] = {}
    for name in names:
        shape = ours.state_dict()[name].shape
        stem = name.removesuffix(".weight")
        tensors[f"{stem}.lora_A.weight"] = torch.randn(2, *shape[1:])
        tensors[f"{stem}.lora_B.weight"] = torch.randn(shape[0], 2)
    lora, before, stack = written(tmp_path, tensors), bits(ours), LoraStack(ours)
    stack.set([(lora, 0.5)])
    for name in names:
        stem = name.removesuffix(".weight")
        delta = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"].flatten(1)
        expected = before[name] + 0.5 * delta.reshape(before[name].shape)
        torch.testing.assert_close(ours.state_dict()[name], expected)
    stack.set([(lora, 0.5)], merged=False)
    changed = {name for name in names if not torch.equal(ours.state_dict()[name], before[name])}
    assert changed == {name for name in names if before[name].ndim > 2}  # convolutions are merged in both cases
    stack.remove()
    assert same_bits(ours, before)


def test_without_keeping_the_weights_there_is_no_way_back(tmp_path: Path) -> None:
    theirs, ours = models("wan")
    lora = written(tmp_path, styled("wan", factors_for("wan", theirs), "peft"))
    stack = LoraStack(ours, keep=False)
    stack.set([(lora, 1.0)], merged=False)  # changes no weight
    stack.set([(lora, 1.0)])
    for again in (stack.remove, lambda: stack.set([(lora, 2.0)])):
        with pytest.raises(CapabilityError, match="merged without keeping the weights: load the model again"):
            again()


def test_a_fault_half_way_leaves_the_model_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = models("wan")
    before, made = bits(ours), list[Branch]()
    tensors = styled("wan", factors_for("wan", theirs), "comfy") | {"blocks.0.norm3.diff": torch.ones(24)}

    def failing(*given: Any) -> Branch:
        if len(made) == 3:
            raise MemoryError
        made.append(Branch(*given))
        return made[-1]

    monkeypatch.setattr("vitascope.models.lora.Branch", failing)
    with pytest.raises(MemoryError):
        LoraStack(ours).set([(written(tmp_path, tensors), 1.0)], merged=False)
    assert same_bits(ours, before)
    assert not any(isinstance(part, LowRankLinear) for part in ours.modules())


def test_what_is_done_to_the_weights_beside_a_lora_stays(tmp_path: Path) -> None:
    theirs, ours = models("ltx")
    stack = LoraStack(ours)
    stack.set([(written(tmp_path, styled("ltx", factors_for("ltx", theirs), "comfy")), 1.0)], merged=False)
    ours.double().train()
    embed: Any = ours.get_submodule("embed")
    embed.weight = nn.Parameter(torch.ones_like(embed.weight))
    stack.remove()
    assert all(value.dtype == torch.float64 for value in ours.state_dict().values())
    assert ours.state_dict()["embed.weight"].eq(1).all()
    assert all(part.training for part in ours.modules())


def refused(tensors: dict[str, Tensor], folder: Path, name: str = "wan") -> str:
    """The message that a file is refused with, after which the model is as it was."""
    _, ours = models(name)
    before = bits(ours)
    with pytest.raises(CheckpointError) as caught:
        LoraStack(ours).set([(written(folder, tensors), 1.0)])
    assert same_bits(ours, before)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("style", ["diffusers", "comfy", "kohya"])
@pytest.mark.parametrize("other", ["ltx", "mochi", "wan"])
def test_a_lora_for_another_model_is_refused_by_its_names(other: str, style: str, tmp_path: Path) -> None:
    theirs, _ = models(other)
    tensors = styled(other, factors_for(other, theirs), style)
    message = refused(tensors, tmp_path, "mochi" if other == "wan" else "wan")
    assert "does not fit this model of the family " in message
    assert f"it looks like one for {other}" in message
    assert message.count(", ...") == 1


@pytest.mark.parametrize(
    ("layer", "model"),
    [
        ("double_blocks.0.img_attn.qkv", "HunyuanVideo or FLUX"),
        ("down_blocks.0.attentions.0.proj_in", "Stable Diffusion"),
        ("transformer_blocks.0.audio_attn1.to_q", "LTX-2"),
    ],
)
def test_models_that_are_not_ours_are_told_by_their_names(layer: str, model: str, tmp_path: Path) -> None:
    stem = f"transformer.{layer}"
    pair = {f"{stem}.lora_A.weight": torch.ones(2, 4), f"{stem}.lora_B.weight": torch.ones(4, 2)}
    message = refused(pair, tmp_path)
    assert f"1 of its 1 updates have no place there ({layer})" in message
    assert model in message
    assert looks_like(Lora("file", {Target("something.else"): written(tmp_path, pair).updates[Target(layer)]})) == ""


def test_a_lora_for_another_variant_or_size_is_refused(tmp_path: Path) -> None:
    theirs, _ = models("wan image")
    message = refused(styled("wan image", factors_for("wan image", theirs), "comfy"), tmp_path)
    assert "2 of its 14 updates have no place there (blocks.1.cross_attn.v_img, img_emb.proj.1)" in message
    assert message.endswith("; the others fit: it is for another variant of wan")
    stem = "blocks.0.self_attn.q"
    pair = {f"{stem}.lora_A.weight": torch.ones(2, 48), f"{stem}.lora_B.weight": torch.ones(48, 2)}
    message = refused(pair, tmp_path)
    assert "made for another size" in message
    assert "1 of its 1 updates have other shapes (blocks.0.self_attn.q (48, 48) for (24, 24))" in message
    assert "(23,) for (24,)" in refused({"blocks.0.norm3.diff": torch.ones(23)}, tmp_path)
    vector = {"blocks.0.norm3.lora_A.weight": torch.ones(2, 1), "blocks.0.norm3.lora_B.weight": torch.ones(24, 2)}
    assert "other shapes (blocks.0.norm3" in refused(vector, tmp_path)
    table = {"blocks.0.modulation.lora_A": torch.ones(1, 6, 24), "blocks.0.modulation.lora_B": torch.ones(1, 1)}
    assert "other shapes (blocks.0.modulation" in refused(table, tmp_path)
    assert "blocks.9.self_attn.q" in refused({"blocks.9.self_attn.q.diff": torch.ones(24, 24)}, tmp_path)
    assert "blocks.0.attn.qkv_x.bias" in refused({"blocks.0.attn.qkv_x.diff_b": torch.ones(72)}, tmp_path, "mochi")


def test_scales_and_weights_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    theirs, ours = models("wan")
    lora = written(tmp_path, styled("wan", factors_for("wan", theirs), "peft"))
    for scale in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="scale of a LoRA must be a number"):
            LoraStack(ours).set([(lora, scale)])
    with torch.device("meta"):
        empty = WanDenoiser(WAN)
    with pytest.raises(CapabilityError, match="quantised or not loaded"):
        LoraStack(empty).set([(lora, 1.0)])
    assert family_of(ours) == "wan"
    assert family_of(nn.Linear(1, 1)) == "Linear"
