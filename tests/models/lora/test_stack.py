"""LoRAs stacked, in bf16, taken off again; and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitascope.core.errors import CapabilityError, CheckpointError, InputError
from vitascope.models import FAMILIES
from vitascope.models.lora import LoraStack, family_of, looks_like
from vitascope.models.ltx.model import LTXDenoiser
from vitascope.nn.low_rank import Branch, LowRankLinear
from vitascope.nn.precision import store_matrices
from vitascope.weights.keys import convert
from vitascope.weights.lora import Lora, Target

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # Mochi in diffusers
NAMES = ("wan", "wan image", "ltx", "mochi")
each_family = pytest.mark.parametrize("name", NAMES)


@each_family
def test_stacked_loras_add_up_in_any_order_and_scales_can_be_changed(lab: Any, name: str, tmp_path: Path) -> None:
    theirs, ours = lab.models(name)
    track, text = lab.inputs(name)
    one, two = (lab.factors_for(name, theirs, seed) for seed in (0, 50))
    first = lab.written(tmp_path, lab.styled(name, one, "comfy"), "one.safetensors")
    second = lab.written(tmp_path, lab.styled(name, two, "diffusers"), "two.safetensors")
    lab.add_by_hand(theirs, one, 0.6)
    lab.add_by_hand(theirs, two, -0.3)
    expected, before, stack = lab.FAMILY[name].predict(theirs, track, text), lab.bits(ours), LoraStack(ours)
    stack.set([(first, 1.0)], merged=False)
    stack.set([(first, 0.6), (second, -0.3)])
    merged = lab.bits(ours)
    assert lab.error(ours({"video": track}, text)["video"], expected) < 1e-4
    stack.set([(first, 0.6), (second, -0.3)], merged=False)
    assert lab.error(ours({"video": track}, text)["video"], expected) < 1e-4
    stack.set([(second, 7.0)])
    stack.set([(first, 0.6), (second, -0.3)])
    assert lab.same_bits(ours, merged)  # always from the weights as they were, never from a sum that was rounded
    stack.set([])
    assert lab.same_bits(ours, before)


def test_a_prepared_text_is_read_with_the_lora(lab: Any, tmp_path: Path) -> None:
    theirs, ours = lab.models("ltx")
    track, text = lab.inputs("ltx")
    lora = lab.written(tmp_path, lab.styled("ltx", lab.factors_for("ltx", theirs), "kohya"))
    LoraStack(ours).set([(lora, 1.0)], merged=False)
    assert isinstance(ours, LTXDenoiser)
    bare = replace(ours.prepare(text), embeddings=torch.zeros_like(text.embeddings))
    assert torch.equal(ours({"video": track}, bare)["video"], ours({"video": track}, text)["video"])


@each_family
@pytest.mark.parametrize("autocast", [False, True])
def test_weights_in_bf16_are_rounded_once_and_come_back_to_the_bit(
    lab: Any, name: str, autocast: bool, tmp_path: Path
) -> None:
    theirs, ours = lab.models(name)
    track, text = lab.inputs(name)
    factors = lab.factors_for(name, theirs)
    tensors = lab.styled(name, factors, "comfy")
    tensors |= {key: value.bfloat16() for key, value in tensors.items() if "alpha" not in key}
    lora = lab.written(tmp_path, tensors)
    rounded = {
        layer: replace(pair, down=pair.down.bfloat16().float(), up=pair.up.bfloat16().float())
        for layer, pair in factors.items()
    }
    exact = {key: value.clone() for key, value in ours.state_dict().items()}
    store_matrices(ours, torch.bfloat16)
    before, stack = lab.bits(ours), LoraStack(ours)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        stack.set([(lora, 0.8)])
    # by hand: bf16 weights of theirs, the sum in fp32, one rounding
    for parameter in theirs.parameters():
        parameter.copy_(parameter.bfloat16().float())
    lab.add_by_hand(theirs, rounded, 0.8)
    wanted = convert(lab.FAMILY[name].table, theirs.state_dict())
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
    # a few roundings of 8 lab.bits through two blocks; far less than what the LoRA does
    assert lab.error(beside, merged.float()) < 0.06 < lab.error(without, merged.float())
    assert lab.same_bits(ours, before)


def test_our_own_names_and_a_model_without_tables(lab: Any, tmp_path: Path) -> None:
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
    lora, before, stack = lab.written(tmp_path, tensors), lab.bits(ours), LoraStack(ours)
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
    assert lab.same_bits(ours, before)


def test_without_keeping_the_weights_there_is_no_way_back(lab: Any, tmp_path: Path) -> None:
    theirs, ours = lab.models("wan")
    lora = lab.written(tmp_path, lab.styled("wan", lab.factors_for("wan", theirs), "peft"))
    stack = LoraStack(ours, keep=False)
    stack.set([(lora, 1.0)], merged=False)  # changes no weight
    stack.set([(lora, 1.0)])
    for again in (stack.remove, lambda: stack.set([(lora, 2.0)])):
        with pytest.raises(CapabilityError, match="merged without keeping the weights: load the model again"):
            again()


def test_a_fault_half_way_leaves_the_model_as_it_was(lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = lab.models("wan")
    before, made = lab.bits(ours), list[Branch]()
    tensors = lab.styled("wan", lab.factors_for("wan", theirs), "comfy") | {"blocks.0.norm3.diff": torch.ones(24)}

    def failing(*given: Any) -> Branch:
        if len(made) == 3:
            raise MemoryError
        made.append(Branch(*given))
        return made[-1]

    monkeypatch.setattr("vitascope.models.lora.Branch", failing)
    with pytest.raises(MemoryError):
        LoraStack(ours).set([(lab.written(tmp_path, tensors), 1.0)], merged=False)
    assert lab.same_bits(ours, before)
    assert not any(isinstance(part, LowRankLinear) for part in ours.modules())


def test_what_is_done_to_the_weights_beside_a_lora_stays(lab: Any, tmp_path: Path) -> None:
    theirs, ours = lab.models("ltx")
    stack = LoraStack(ours)
    stack.set([(lab.written(tmp_path, lab.styled("ltx", lab.factors_for("ltx", theirs), "comfy")), 1.0)], merged=False)
    ours.double().train()
    embed: Any = ours.get_submodule("embed")
    embed.weight = nn.Parameter(torch.ones_like(embed.weight))
    stack.remove()
    assert all(value.dtype == torch.float64 for value in ours.state_dict().values())
    assert ours.state_dict()["embed.weight"].eq(1).all()
    assert all(part.training for part in ours.modules())


def refused(lab: Any, tensors: dict[str, Tensor], folder: Path, name: str = "wan") -> str:
    """The message that a file is refused with, after which the model is as it was."""
    _, ours = lab.models(name)
    before = lab.bits(ours)
    with pytest.raises(CheckpointError) as caught:
        LoraStack(ours).set([(lab.written(folder, tensors), 1.0)])
    assert lab.same_bits(ours, before)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("style", ["diffusers", "comfy", "kohya"])
@pytest.mark.parametrize("other", ["ltx", "mochi", "wan"])
def test_a_lora_for_another_model_is_refused_by_its_names(lab: Any, other: str, style: str, tmp_path: Path) -> None:
    theirs, _ = lab.models(other)
    tensors = lab.styled(other, lab.factors_for(other, theirs), style)
    message = refused(lab, tensors, tmp_path, "mochi" if other == "wan" else "wan")
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
def test_models_that_are_not_ours_are_told_by_their_names(lab: Any, layer: str, model: str, tmp_path: Path) -> None:
    stem = f"transformer.{layer}"
    pair = {f"{stem}.lora_A.weight": torch.ones(2, 4), f"{stem}.lora_B.weight": torch.ones(4, 2)}
    message = refused(lab, pair, tmp_path)
    assert f"1 of its 1 updates have no place there ({layer})" in message
    assert model in message
    update = lab.written(tmp_path, pair).updates[Target(layer)]
    assert looks_like(Lora("file", {Target("something.else"): update})) == []


def test_names_that_two_models_have_in_common_tell_both(lab: Any, tmp_path: Path) -> None:
    stem = "transformer_blocks.0.attn1.to_q"
    message = refused(lab, {f"{stem}.lora_A": torch.ones(2, 4), f"{stem}.lora_B": torch.ones(4, 2)}, tmp_path)
    assert message.endswith("; it looks like one for ltx or mochi")


def test_a_lora_for_another_variant_or_size_is_refused(lab: Any, tmp_path: Path) -> None:
    theirs, _ = lab.models("wan image")
    message = refused(lab, lab.styled("wan image", lab.factors_for("wan image", theirs), "comfy"), tmp_path)
    assert "2 of its 14 updates have no place there (blocks.1.cross_attn.v_img, img_emb.proj.1)" in message
    assert message.endswith("; the others fit: it is for another variant of wan")
    stem = "blocks.0.self_attn.q"
    pair = {f"{stem}.lora_A.weight": torch.ones(2, 48), f"{stem}.lora_B.weight": torch.ones(48, 2)}
    message = refused(lab, pair, tmp_path)
    assert "made for another size" in message
    assert "1 of its 1 updates have other shapes (blocks.0.self_attn.q (48, 48) for (24, 24))" in message
    assert "(23,) for (24,)" in refused(lab, {"blocks.0.norm3.diff": torch.ones(23)}, tmp_path)
    vector = {"blocks.0.norm3.lora_A.weight": torch.ones(2, 1), "blocks.0.norm3.lora_B.weight": torch.ones(24, 2)}
    assert "other shapes (blocks.0.norm3" in refused(lab, vector, tmp_path)
    table = {"blocks.0.modulation.lora_A": torch.ones(1, 6, 24), "blocks.0.modulation.lora_B": torch.ones(1, 1)}
    assert "other shapes (blocks.0.modulation" in refused(lab, table, tmp_path)
    assert "blocks.9.self_attn.q" in refused(lab, {"blocks.9.self_attn.q.diff": torch.ones(24, 24)}, tmp_path)
    assert "blocks.0.attn.qkv_x.bias" in refused(lab, {"blocks.0.attn.qkv_x.diff_b": torch.ones(72)}, tmp_path, "mochi")


def test_scales_and_weights_that_cannot_be_used_are_refused(lab: Any, tmp_path: Path) -> None:
    theirs, ours = lab.models("wan")
    lora = lab.written(tmp_path, lab.styled("wan", lab.factors_for("wan", theirs), "peft"))
    for scale in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="scale of a LoRA must be a number"):
            LoraStack(ours).set([(lora, scale)])
    with torch.device("meta"):
        empty = lab.FAMILY["wan"].ours()
    with pytest.raises(CapabilityError, match="quantised or not loaded"):
        LoraStack(empty).set([(lora, 1.0)])
    assert family_of(ours) == "wan"
    assert family_of(nn.Linear(1, 1)) == "Linear"
