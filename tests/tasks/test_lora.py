"""LoRAs by FILE[:SCALE] in a pipeline: what clips say of them, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from vitascope.core.errors import CapabilityError, CheckpointError, InputError
from vitascope.core.memory import held_bytes
from vitascope.models.lora import LoraStack, updates_of
from vitascope.models.offload.merged import with_updates
from vitascope.models.offload.offloaded import Layers
from vitascope.models.offload.stores import FileStore, KeptStore, same_names
from vitascope.tasks.fitting import Fitted, MemoryLimit
from vitascope.tasks.generate import generate
from vitascope.tasks.load import load_pipeline
from vitascope.tasks.long import generate_any_length
from vitascope.tasks.lora import apply_loras, parse_lora
from vitascope.tasks.pipeline import Pipeline
from vitascope.tasks.request import GenerateRequest
from vitascope.weights.lora import read_lora
from vitascope.weights.sources import MemorySource

REQUEST = GenerateRequest("a red ball bounces", seed=1, num_inference_steps=2)


@pytest.fixture
def own(tiny_model: Path) -> Pipeline:
    """The tiny model, loaded for one test alone: LoRAs change it in place."""
    return load_pipeline(str(tiny_model), "cpu", "fp32")


@pytest.fixture
def file(own: Pipeline, tmp_path: Path) -> Path:
    """A LoRA for two layers of each block of the tiny model, and some of a text encoder."""
    assert isinstance(own.denoiser, nn.Module)
    torch.manual_seed(0)
    names = [name for name, part in own.denoiser.named_modules() if isinstance(part, nn.Linear)][:8]
    tensors = {"text_encoder.a.lora_A.weight": torch.ones(2, 2), "text_encoder.a.lora_B.weight": torch.ones(2, 2)}
    for name in names:
        linear: Any = own.denoiser.get_submodule(name)
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, linear.in_features) / 2
        tensors[f"{name}.lora_B.weight"] = torch.randn(linear.out_features, 2) / 2
    save_file(tensors, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


def test_a_clip_made_with_a_lora_says_so_and_without_it_is_as_before(own: Pipeline, file: Path) -> None:
    plain = generate(own, REQUEST)
    assert isinstance(own.denoiser, nn.Module)
    stack, notes = LoraStack(own.denoiser), list[str]()
    changed = apply_loras(own, [f"{file}:0.5"], stack=stack, note=notes.append)
    made = generate(changed, REQUEST)
    assert not torch.equal(made.clip.frames, plain.clip.frames)
    assert made.recipe["loras"] == [f"{file}:0.5"]
    assert made.recipe["weights"] == changed.fingerprint != plain.recipe["weights"]
    assert made.recipe.keys() - plain.recipe.keys() == {"loras"}
    assert json.loads(json.dumps(made.recipe)) == made.recipe
    assert notes == [f"{file}: 2 tensors for the text encoder are left out"]
    longer = replace(REQUEST, format=replace(own.defaults.clip, num_frames=13))
    assert generate_any_length(changed, longer).recipe["loras"] == [f"{file}:0.5"]
    stack.remove()
    again = generate(own, REQUEST)
    assert torch.equal(again.clip.frames, plain.clip.frames)
    assert again.recipe == plain.recipe
    # what the recipe says makes the same clip
    once_more = generate(apply_loras(own, made.recipe["loras"]), REQUEST)
    assert torch.equal(once_more.clip.frames, made.clip.frames)
    assert once_more.recipe == made.recipe


def test_beside_the_weights_gives_nearly_the_same_clip(own: Pipeline, file: Path) -> None:
    assert isinstance(own.denoiser, nn.Module)
    stack, clips = LoraStack(own.denoiser), []
    for merged in (True, False):
        pipeline = apply_loras(own, [str(file)], merged=merged, stack=stack)
        clips.append(generate(pipeline, REQUEST).clip.frames)
    # fp32 sums in another order may turn over a level of 256
    assert (clips[0].int() - clips[1].int()).abs().max() <= 1


def test_the_fingerprint_is_of_contents_and_scales(own: Pipeline, file: Path, tmp_path: Path) -> None:
    assert isinstance(own.denoiser, nn.Module)
    stack = LoraStack(own.denoiser)

    def fingerprint(*texts: str) -> str:
        return apply_loras(own, texts, stack=stack).fingerprint

    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(file.read_bytes())
    one = fingerprint(str(file))
    assert fingerprint(f"{file}:1.0") == fingerprint(str(copy)) == one
    assert len({one, fingerprint(f"{file}:0.9"), fingerprint(f"{file}:0.5", f"{copy}:0.5"), own.fingerprint}) == 4
    assert apply_loras(own, []) is own


def test_loras_are_given_all_at_once_and_fit_or_nothing_changes(own: Pipeline, file: Path, tmp_path: Path) -> None:
    assert isinstance(own.denoiser, nn.Module)
    before = {name: value.clone() for name, value in own.denoiser.state_dict().items()}
    save_file({"blocks.0.self_attn.q.diff": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors does not fit this model of the family factorised"):
        apply_loras(own, [str(file), str(tmp_path / "other.safetensors")])
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        apply_loras(own, [str(file), str(tmp_path / "missing.safetensors:0.5")])
    assert all(torch.equal(value, before[name]) for name, value in own.denoiser.state_dict().items())
    changed = apply_loras(own, [str(file)])
    with pytest.raises(InputError, match=r"has LoRAs already \(.*style\.safetensors:1\.0\): give all of them at once"):
        apply_loras(changed, [str(file)])
    denoiser: Any = dict  # a callable without weights
    with pytest.raises(CapabilityError, match="takes no LoRAs"):
        apply_loras(replace(own, denoiser=denoiser), [str(file)])


@pytest.mark.parametrize(
    ("text", "file", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("a.safetensors:-1e-1", "a.safetensors", -0.1),
        (r"C:\loras\a.safetensors", r"C:\loras\a.safetensors", 1.0),
        (r"C:\loras\a.safetensors:2", r"C:\loras\a.safetensors", 2.0),
        ("a:b/c:d.safetensors", "a:b/c:d.safetensors", 1.0),
        ("a:b/c:d.safetensors:0.25", "a:b/c:d.safetensors", 0.25),
    ],
)
def test_file_and_scale(text: str, file: str, scale: float) -> None:
    assert parse_lora(text) == (Path(file), scale)


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["a", "b:c", "d:1/e"]))
def test_what_recipes_say_is_read_back(scale: float, file: str) -> None:
    assert parse_lora(f"{file}:{scale!r}") == (Path(file), scale)


def test_a_file_whose_name_ends_like_a_scale_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("style:2").write_bytes(b"")
    assert parse_lora("style:2") == (Path("style:2"), 1.0)
    assert parse_lora("style:2:0.5") == (Path("style:2"), 0.5)
    for text in ("", ":0.5"):
        with pytest.raises(InputError, match=r"is not FILE\[:SCALE\]"):
            parse_lora(text)
    for text in ("style:nan", "style:inf"):
        with pytest.raises(InputError, match="the scale of style must be a finite number"):
            parse_lora(text)
    for text in ("style:2:much", "style:2:"):
        with pytest.raises(InputError, match="the scale of style:2 must be a number"):
            parse_lora(text)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_under_a_limit_of_memory_loras_are_merged_as_weights_are_read(
    precision: str, tiny_model: Path, file: Path
) -> None:
    asked = [f"{file}:0.5", f"{file}:0.25"]
    plain = load_pipeline(str(tiny_model), "cpu", precision)
    before = generate(plain, REQUEST).clip.frames
    whole = apply_loras(plain, asked)
    expected = generate(whole, REQUEST)
    assert not torch.equal(expected.clip.frames, before)
    limit = MemoryLimit(held_bytes(torch.device("cpu")) + 10**9)
    bare = load_pipeline(str(tiny_model), "cpu", precision, memory=limit)
    assert torch.equal(generate(bare, REQUEST).clip.frames, before)
    with pytest.raises(CapabilityError, match="under a limit of memory LoRAs are merged"):
        apply_loras(bare, asked, merged=False)
    under = apply_loras(bare, asked)
    assert under.fingerprint == whole.fingerprint
    assert isinstance(under.memory, Fitted)
    part = under.memory.parts["denoiser"]
    assert not part.present
    for layers in (None, Layers(0), Layers(1, prefetch=False)):
        if layers is not None:
            part.change(layers)
        made = generate(under, REQUEST)
        assert torch.equal(made.clip.frames, expected.clip.frames)
        assert made.recipe["loras"] == expected.recipe["loras"]


def test_a_lora_that_does_not_fit_changes_nothing_under_a_limit(
    tiny_model: Path, own: Pipeline, tmp_path: Path
) -> None:
    save_file(
        {"other.lora_A.weight": torch.ones(1, 2), "other.lora_B.weight": torch.ones(2, 1)}, tmp_path / "a.safetensors"
    )
    under = load_pipeline(str(tiny_model), "cpu", "fp32", memory=MemoryLimit(held_bytes(torch.device("cpu")) + 10**9))
    with pytest.raises(CheckpointError, match="have no place there"):
        apply_loras(under, [str(tmp_path / "a.safetensors")])
    assert torch.equal(generate(under, REQUEST).clip.frames, generate(own, REQUEST).clip.frames)


def test_what_merging_takes_is_counted(own: Pipeline, file: Path) -> None:
    assert isinstance(own.denoiser, nn.Module)
    updates = updates_of(own.denoiser, [(read_lora(file), 1.0)])
    tensors = own.denoiser.state_dict()
    plain = MemorySource(tensors)
    inner = FileStore(tensors, plain, same_names(plain))
    store = with_updates(inner, own.denoiser, updates)
    name = next(iter(updates))
    other = next(name for name in tensors if name not in updates)
    assert store.transit_bytes([other]) == inner.transit_bytes([other])
    assert store.transit_bytes([name]) == 3 * 4 * tensors[name].numel() > inner.transit_bytes([name])
    # weights that wait in memory are changed there, once
    kept = KeptStore.fill(inner, tensors)
    assert with_updates(kept, own.denoiser, updates) is kept
    read = [{name: torch.empty_like(tensors[name])} for _ in range(2)]
    store.read(read[0])
    kept.read(read[1])
    assert torch.equal(read[0][name], read[1][name])
    assert not torch.equal(read[0][name], tensors[name])
