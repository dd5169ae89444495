"""LoRAs in every way of naming on small random models: against diffusers with PEFT, and against the definition,
W + scale * alpha / r * B A, put by hand into diffusers' models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from peft import LoraConfig, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor, nn

from vitascope.models.lora import LoraStack
from vitascope.nn.low_rank import LowRankLinear
from vitascope.weights.lora import read_lora

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # Mochi in diffusers
NAMES = ("wan", "wan image", "ltx", "mochi")
STYLES = ("diffusers", "peft", "bare", "comfy", "kohya", "kohya of diffusers", "fun")


NAMED = [(name, style) for name in ("wan", "ltx", "mochi") for style in STYLES]


@pytest.mark.parametrize(("name", "style"), [*NAMED, ("wan image", "diffusers"), ("wan image", "comfy")])
def test_every_way_of_naming_gives_the_sum_of_the_definition(lab: Any, name: str, style: str, tmp_path: Path) -> None:
    theirs, ours = lab.models(name)
    track, text = lab.inputs(name)
    predict, factors = lab.FAMILY[name].predict, lab.factors_for(name, theirs)
    plain, before = ours({"video": track}, text)["video"], lab.bits(ours)
    lora = lab.written(tmp_path, lab.styled(name, factors, style))
    lab.add_by_hand(theirs, factors, 0.7)
    expected = predict(theirs, track, text)
    assert lab.error(plain, expected) > 0.05  # the LoRA is there to be seen
    stack = LoraStack(ours)
    stack.set([(lora, 0.7)])
    # fp32 sums in another order
    assert lab.error(ours({"video": track}, text)["video"], expected) < 1e-4
    stack.set([(lora, 0.7)], merged=False)
    assert sum(isinstance(part, LowRankLinear) for part in ours.modules()) > 5
    assert lab.same_bits(ours, before)  # nothing was merged, and no name has changed
    assert lab.error(ours({"video": track}, text)["video"], expected) < 1e-4
    stack.remove()
    assert lab.same_bits(ours, before)
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
        *((name, {}) for name in NAMES),
        ("wan", {"use_rslora": True}),
        ("mochi", {"use_rslora": True}),
        *((name, {"lora_bias": True, "lora_alpha": 2}) for name in ("wan image", "ltx", "mochi")),
    ],
)
def test_adapters_that_diffusers_saves(lab: Any, name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """With ranks, alphas and patterns of both in the head of the file."""
    theirs, ours = lab.models(name)
    if settings.get("lora_bias"):
        targets = r".*(to_out\.0|norm1\.linear)" if name == "mochi" else TARGETS[name]  # where there are biases
        settings = {**settings, "target_modules": targets, "rank_pattern": {}, "alpha_pattern": {}}
    theirs.add_adapter(config_of(name, **settings))
    randomised(theirs)
    theirs.save_lora_adapter(tmp_path)
    track, text = lab.inputs(name)
    expected, before = lab.FAMILY[name].predict(theirs, track, text), lab.bits(ours)
    stack, lora = LoraStack(ours), read_lora(tmp_path)
    for merged in (True, False):
        stack.set([(lora, 1.0)], merged=merged)
        assert lab.error(ours({"video": track}, text)["video"], expected) < 1e-4
    stack.remove()
    assert lab.same_bits(ours, before)


@pytest.mark.parametrize("name", ["wan", "ltx", "mochi"])
def test_adapters_that_peft_saves(lab: Any, name: str, tmp_path: Path) -> None:
    theirs, ours = lab.models(name)
    wrapped: Any = get_peft_model(theirs, config_of(name, use_rslora=True))
    randomised(wrapped)
    wrapped.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()
    track, text = lab.inputs(name)
    expected = lab.FAMILY[name].predict(wrapped.base_model.model, track, text)
    for place in (tmp_path, tmp_path / "adapter_model.safetensors"):
        stack = LoraStack(ours)
        stack.set([(read_lora(place), 1.0)])
        assert lab.error(ours({"video": track}, text)["video"], expected) < 1e-4
        stack.remove()


def test_files_that_pipelines_of_diffusers_save(lab: Any, tmp_path: Path) -> None:
    """Names and settings under `transformer.`."""
    theirs, ours = lab.models("wan")
    theirs.add_adapter(config_of("wan"))
    randomised(theirs)
    layers: Any = get_peft_model_state_dict(theirs)
    metadata = theirs.peft_config["default"].to_dict()
    WanPipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=metadata)
    track, text = lab.inputs("wan")
    LoraStack(ours).set([(read_lora(tmp_path), 1.0)])
    assert lab.error(ours({"video": track}, text)["video"], lab.wan_prediction(theirs, track, text)) < 1e-4


@pytest.mark.parametrize("style", ["comfy", "kohya"])
def test_files_of_the_community_equal_what_diffusers_reads_of_them(lab: Any, style: str, tmp_path: Path) -> None:
    """With a difference of a bias, which diffusers adds to the low-rank outputs."""
    theirs, ours = lab.models("wan")
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
        tensors |= {f"{stem}.alpha": torch.tensor(3.0)}
        tensors |= {f"{stem}.lora_down.weight": 0.2 * lab.draw(4, shape[1], seed=index)}
        tensors |= {f"{stem}.lora_up.weight": 0.2 * lab.draw(shape[0], 4, seed=99 + index)}
        if style == "comfy":
            tensors |= {f"{stem}.diff_b": 0.2 * lab.draw(shape[0], seed=999 + index)}
    lora = lab.written(tmp_path, tensors)
    state: Any = WanLoraLoaderMixin.lora_state_dict({key: value.clone() for key, value in tensors.items()})
    theirs.load_lora_adapter(state, prefix="transformer")
    track, text = lab.inputs("wan")
    LoraStack(ours).set([(lora, 1.0)])
    assert lab.error(ours({"video": track}, text)["video"], lab.wan_prediction(theirs, track, text)) < 1e-4


def test_a_layer_that_is_one_of_theirs_and_three_of_diffusers(lab: Any, tmp_path: Path) -> None:
    """Mochi's qkv in the authors' names has one down factor, and rows of its up factor are queries, keys and values."""
    theirs, ours = lab.models("mochi")
    down, up = 0.3 * lab.draw(4, 24), 0.3 * lab.draw(72, 4, seed=1)
    lora = lab.written(tmp_path, {"blocks.1.attn.qkv_x.lora_A": down, "blocks.1.attn.qkv_x.lora_B": up})
    for part, rows in zip("qkv", up.chunk(3), strict=True):
        theirs.get_submodule(f"transformer_blocks.1.attn1.to_{part}").weight.add_(rows @ down)
    track, text = lab.inputs("mochi")
    LoraStack(ours).set([(lora, 1.0)])
    assert lab.error(ours({"video": track}, text)["video"], lab.mochi_prediction(theirs, track, text)) < 1e-4


def test_whole_differences_reach_norms_tables_biases_and_kernels(lab: Any, tmp_path: Path) -> None:
    theirs, ours = lab.models("wan")
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
    values = {names: 0.3 * lab.draw(*shape, seed=index) for index, (names, shape) in enumerate(diffs.items())}
    lora = lab.written(tmp_path, {f"diffusion_model.{file}": value for (file, _), value in values.items()})
    for (_, their), value in values.items():
        dict(theirs.named_parameters())[their].add_(0.5 * value)
    track, text = lab.inputs("wan")
    before = lab.bits(ours)
    stack = LoraStack(ours)
    for merged in (True, False):
        stack.set([(lora, 0.5)], merged=merged)
        assert lab.error(ours({"video": track}, text)["video"], lab.wan_prediction(theirs, track, text)) < 1e-4
    assert sum(not torch.equal(before[key], value) for key, value in ours.state_dict().items()) == len(diffs)
    stack.remove()
    assert lab.same_bits(ours, before)


def test_a_difference_of_a_tensor_that_is_not_used_changes_nothing(lab: Any, tmp_path: Path) -> None:
    _, ours = lab.models("wan image")
    before = lab.bits(ours)
    lora = lab.written(tmp_path, {"transformer.blocks.0.attn2.norm_added_q.diff": torch.ones(24)})
    LoraStack(ours).set([(lora, 1.0)])
    assert lab.same_bits(ours, before)
