"""T5 and umT5: the embeddings of the text_folders of diffusers, and what is refused when an encoder is loaded."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.ltx.pipeline_ltx import LTXPipeline
from diffusers.pipelines.mochi.pipeline_mochi import MochiPipeline
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitascope.core.errors import CapabilityError, CheckpointError, InputError, PromptError
from vitascope.core.protocols import TextEncoder
from vitascope.models.pretrained import QUANTISERS, loading
from vitascope.models.text.t5 import options as t5_options
from vitascope.models.text.t5.encoder import PROMPTS_AT_ONCE, T5TextEncoder, load_t5, open_t5
from vitascope.models.text.t5.options import T5_OPTIONS, T5Options, clean_web_text

PROMPTS = ["a red ball  bounces\n in &amp;lt;wind", "", "a ball"]
FOLDERS = {"wan": "umt5", "ltx": "t5", "mochi": "t5"}


def ours(text_folders: Path, family: str, **changes: Any) -> T5TextEncoder:
    options = replace(T5_OPTIONS[family], **changes)
    return load_t5(text_folders / FOLDERS[family], options, dtype=torch.float32)


def theirs(encoder: T5TextEncoder, family: str, prompts: list[str], **config: Any) -> tuple[Tensor, Tensor | None]:
    """Embeddings and mask by diffusers, with the same model and tokeniser."""
    parts: dict[str, Any] = {"tokenizer": encoder.tokenizer, "text_encoder": encoder.model}
    rest: dict[str, Any] = dict.fromkeys(("vae", "scheduler", "transformer"))
    pipes: dict[str, Any] = {"wan": WanPipeline, "ltx": LTXPipeline, "mochi": MochiPipeline}
    pipe = pipes[family](**parts, **rest, **config)
    found = pipe.encode_prompt(
        prompts,
        do_classifier_free_guidance=False,
        max_sequence_length=encoder.options.max_tokens,
        device=torch.device("cpu"),
    )
    return found[0], None if family == "wan" else found[1]


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_tokens", [None, 40])
@pytest.mark.parametrize("family", T5_OPTIONS)
def test_embeddings_are_those_of_diffusers(family: str, max_tokens: int | None, text_folders: Path) -> None:
    padding = "zero" if family == "wan" else "kept"
    most = max_tokens or T5_OPTIONS[family].max_tokens
    encoder = ours(text_folders, family, max_tokens=most, padding=padding, empty="encoded")
    text = encoder(PROMPTS)
    embeddings, mask = theirs(encoder, family, PROMPTS)
    assert text.embeddings.shape == (3, most, encoder.width) == (3, most, 16)
    assert_close(text.embeddings, embeddings)
    assert mask is None or torch.equal(text.mask, mask)
    assert text.mask.sum(1).tolist()[1:] == [1, 3]
    assert bool(text.embeddings[1, 1:].any()) == (family != "wan")
    assert not text.embeddings.requires_grad


@pytest.mark.parametrize("family", ["ltx", "mochi"])
def test_cut_padding_leaves_the_words_as_they_are(family: str, text_folders: Path) -> None:
    encoder: TextEncoder = ours(text_folders, family, empty="encoded")
    text = encoder(PROMPTS)
    embeddings, mask = theirs(ours(text_folders, family), family, PROMPTS)
    assert mask is not None
    longest = int(mask.sum(1).max())
    assert text.embeddings.shape == (3, longest, 16)
    assert torch.equal(text.mask, mask[:, :longest])
    assert_close(text.embeddings[text.mask], embeddings[mask])
    assert not text.embeddings[~text.mask].any()


def test_the_encoder_of_ltx_reads_padding_and_that_of_mochi_does_not(text_folders: Path) -> None:
    for attention, same in (("all", False), ("words", True)):
        short, long = (
            ours(text_folders, "ltx", attention=attention, max_tokens=n, padding="cut")(["a ball"]) for n in (8, 40)
        )
        assert torch.allclose(short.embeddings, long.embeddings, atol=1e-5) == same


def test_the_empty_prompt_of_mochi_has_no_words(text_folders: Path) -> None:
    encoder = ours(text_folders, "mochi", padding="kept")
    text = encoder(["a ball", ""])
    _, mask = theirs(encoder, "mochi", [""], force_zeros_for_empty_prompt=True)
    assert mask is not None
    assert torch.equal(text.mask[1:], mask)
    assert text.mask.sum(1).tolist() == [3, 0]
    assert not text.embeddings[1].any()
    assert ours(text_folders, "mochi")([""]).embeddings.shape == (1, 1, 16)


def test_prompts_that_are_too_long_are_refused_or_cut_aloud(text_folders: Path) -> None:
    prompts = ["a red ball bounces a red wind", "a ball"]
    with pytest.raises(PromptError, match=r"8 tokens, at most 6 fit; too much is: 'red wind'"):
        ours(text_folders, "mochi", max_tokens=6)(prompts)
    encoder = ours(text_folders, "mochi", max_tokens=6, too_long="cut", padding="kept")
    with pytest.warns(UserWarning, match=r"cut to 6 tokens; not read: 'red wind'"):
        text = encoder(prompts)
    embeddings, mask = theirs(encoder, "mochi", prompts)
    assert_close(text.embeddings, embeddings)
    assert mask is not None
    assert torch.equal(text.mask, mask)
    assert ours(text_folders, "mochi", max_tokens=8)(prompts[:1]).mask.sum() == 8  # just fits
    for wrong in ([], "a ball", [3]):
        with pytest.raises(PromptError, match="sequence of strings"):
            encoder(wrong)


def test_many_prompts_come_back_in_their_order(text_folders: Path) -> None:
    encoder = ours(text_folders, "mochi")
    prompts = [" ".join(["ball"] * (n % 5)) for n in range(PROMPTS_AT_ONCE + 3)]
    text = encoder(prompts)
    for row, prompt in enumerate(prompts):
        alone = encoder([prompt])
        assert torch.equal(text.mask[row], torch.arange(text.mask.shape[1]) < alone.mask.sum()), prompt
        assert_close(text.embeddings[row][text.mask[row]], alone.embeddings[alone.mask])


def test_prompts_are_cleaned_as_the_family_does(monkeypatch: pytest.MonkeyPatch) -> None:
    web, plain = T5_OPTIONS["wan"], T5_OPTIONS["ltx"]
    assert web.clean(" A\t\u00a0 B &amp;amp;&amp;lt;b&gt;\n") == "A B &amp;<b>".replace("&amp;", "&")
    assert plain.clean("  A &amp; B ") == "  A &amp; B "
    assert replace(plain, cleaning="lower").clean("  A Ball ") == "a ball"
    assert web.clean("\ud800") == plain.clean("\ud800") == "?"
    monkeypatch.setattr(t5_options, "find_spec", lambda name: name)
    monkeypatch.setattr(t5_options, "import_module", lambda name: FakeFtfy)
    assert clean_web_text(" schÃ¶n&amp;lt;") == "schön<"


class FakeFtfy:
    @staticmethod
    def fix_text(text: str) -> str:
        return text.replace("Ã¶", "ö")


def test_other_options_are_refused() -> None:
    with pytest.raises(InputError, match="padding 'none' is not known; valid values: zero, kept, cut"):
        T5Options(padding="none")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_tokens must be at least 2"):
        T5Options(max_tokens=1)


def test_an_encoder_is_loaded_in_a_dtype_and_frozen(text_folders: Path) -> None:
    shards = list((text_folders / "t5" / "text_encoder").glob("model-*.safetensors"))
    assert len(shards) > 1
    encoder = load_t5(text_folders / "t5", T5_OPTIONS["mochi"])
    assert encoder(["a ball"]).embeddings.dtype == torch.bfloat16
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def copied(text_folders: Path, to: Path) -> Path:
    return Path(shutil.copytree(text_folders / "t5", to / "t5"))


def whole(folder: Path) -> dict[str, Tensor]:
    """Make one file of the shards: its tensors."""
    tensors: dict[str, Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    return tensors


def test_weights_must_be_those_of_the_encoder(text_folders: Path, tmp_path: Path) -> None:
    folder = copied(text_folders, tmp_path)
    place = folder / "text_encoder"
    tensors = whole(place)
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    for changed, message in (
        ({key: value for key, value in tensors.items() if key != name}, f"1 weights missing .{name}"),
        (tensors | {"encoder.block.9.layer.0.x": torch.zeros(2)}, "1 weights of another model .encoder.block.9"),
        (tensors | {name: torch.zeros(3, 3)}, f"1 weights of another shape .{name}"),
    ):
        save_file(changed, place / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            load_t5(folder, T5_OPTIONS["mochi"])
    save_file(tensors | {"decoder.final_layer_norm.weight": torch.zeros(16)}, place / "model.safetensors")
    load_t5(folder, T5_OPTIONS["mochi"])


def test_files_that_are_missing_or_others_are_refused(text_folders: Path, tmp_path: Path) -> None:
    folder = copied(text_folders, tmp_path)
    place = folder / "text_encoder"
    gone = sorted(place.glob("model-*"))[0]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"shard {gone.name} is missing"):
        load_t5(folder, T5_OPTIONS["ltx"])
    torch.save(whole(place), place / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds no .*model.safetensors"):
        load_t5(folder, T5_OPTIONS["ltx"])
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(CheckpointError, match="type 'bert'; valid types: t5, umt5"):
        load_t5(folder, T5_OPTIONS["ltx"])
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokeniser"):
        load_t5(folder, T5_OPTIONS["ltx"])
    shutil.rmtree(folder / "tokenizer")
    for load in (lambda: load_t5(folder, T5_OPTIONS["ltx"]), lambda: open_t5(folder, T5_OPTIONS["ltx"], cache=None)):
        with pytest.raises(CheckpointError, match="folder tokenizer"):
            load()


def test_a_missing_extra_is_named(text_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CapabilityError, match=r"transformers: pip install '.\[checkpoints\]'"):
        load_t5(text_folders / "t5", T5_OPTIONS["ltx"])


def test_quantisers_are_known_by_name_and_need_their_package(
    text_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=f"quantise 'int3' is not known; valid values: {', '.join(QUANTISERS)}"):
        load_t5(text_folders / "t5", T5_OPTIONS["ltx"], quantise="int3")
    for name, quantiser in QUANTISERS.items():
        monkeypatch.setitem(sys.modules, quantiser.packages[0], None)
        with pytest.raises(CapabilityError, match=f"{name}' needs the package {quantiser.packages[0]}: pip install"):
            open_t5(text_folders / "t5", T5_OPTIONS["ltx"], cache=None, quantise=name, device="cuda")
    with pytest.raises(CapabilityError, match="'bnb_nf4' needs a GPU"):
        load_t5(text_folders / "t5", T5_OPTIONS["ltx"], quantise="bnb_nf4")


@pytest.mark.parametrize("text", ["CUDA out of memory. Tried to allocate 9 GiB", "DefaultCPUAllocator: can't allocate"])
def test_a_lack_of_memory_is_not_said_to_be_the_files(text: str) -> None:
    with pytest.raises(RuntimeError, match=text[:12]), loading("an encoder"):
        raise RuntimeError(text)
    with pytest.raises(CheckpointError, match=r"an encoder cannot be loaded: .*no such layer"), loading("an encoder"):
        raise RuntimeError("no such layer")


def test_fp16_in_which_t5_overflows_is_refused(text_folders: Path) -> None:
    for load in (load_t5, lambda *given, **more: open_t5(*given, cache=None, **more)):
        with pytest.raises(InputError, match=r"overflows in fp16: give torch\.bfloat16 or torch\.float32"):
            load(text_folders / "t5", T5Options(), dtype=torch.float16)
