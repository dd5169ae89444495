"""T5 whose layers come from files one after the other, against the whole encoder in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vitascope.core.errors import CapabilityError, CheckpointError
from vitascope.models.offload.offloaded import WHOLE, Layers
from vitascope.models.text.t5.encoder import PROMPTS_AT_ONCE, T5Files, load_t5, open_t5
from vitascope.models.text.t5.options import T5_OPTIONS
from vitascope.models.text.t5.original import KEYS
from vitascope.models.text.t5.streamed import TABLES, open_layers
from vitascope.weights.keys import convert
from vitascope.weights.plain_file import PlainFile

PROMPTS = ["a red ball  bounces\n in &amp;lt;wind", "", "a ball"]
WAYS = [WHOLE, Layers(0), Layers(0, prefetch=False), Layers(0, group=2), Layers(1)]


def original(text_folders: Path, to: Path) -> T5Files:
    """The umT5 as a file of Wan's authors."""
    tensors: dict[str, Any] = {}
    for shard in (text_folders / "umt5" / "text_encoder").glob("*.safetensors"):
        tensors |= load_file(shard)
    tensors.pop(TABLES[1], None)
    theirs = convert(KEYS, tensors, writing=True)
    file = to / "models_t5_umt5-xxl-enc-bf16.safetensors"
    save_file({name: value.clone() for name, value in theirs.items()}, file)
    return T5Files(file, text_folders / "umt5" / "tokenizer")


KINDS: dict[str, tuple[str, Callable[[Path, Path], Any]]] = {
    "t5 in shards": ("ltx", lambda folders, _: folders / "t5"),
    "umt5 in shards": ("wan", lambda folders, _: folders / "umt5"),
    "umt5 in a file of its authors": ("wan", original),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_those_of_the_whole_encoder_to_the_bit(
    kind: str, dtype: torch.dtype, text_folders: Path, tmp_path: Path
) -> None:
    family, find = KINDS[kind]
    files, options = find(text_folders, tmp_path), T5_OPTIONS[family]
    whole = load_t5(files, options, dtype=dtype)
    expected = whole(PROMPTS)
    assert expected.embeddings.dtype == dtype
    for layers in WAYS:
        encoder = load_t5(files, options, dtype=dtype, layers=layers)
        for _ in range(2):  # the second time everything is read anew
            found = encoder(PROMPTS)
            assert torch.equal(found.embeddings, expected.embeddings)
            assert torch.equal(found.mask, expected.mask)
            assert encoder.held is not None
            assert all(value.is_meta for value in encoder.state_dict().values())
        assert (encoder.width, encoder.device) == (whole.width, whole.device)


def test_more_prompts_than_go_at_once_come_back_in_their_order(text_folders: Path) -> None:
    prompts = [" ".join(["ball"] * (1 + n % 5)) for n in range(PROMPTS_AT_ONCE + 3)]
    whole, parts = (load_t5(text_folders / "t5", T5_OPTIONS["mochi"], layers=way) for way in (None, Layers(0)))
    assert torch.equal(whole(prompts).embeddings, parts(prompts).embeddings)


def test_of_the_table_of_tokens_only_rows_are_read(text_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    rows: list[list[int]] = []
    get, get_rows = PlainFile.get, PlainFile.rows
    monkeypatch.setattr(PlainFile, "get", lambda self, name: read.append(name) or get(self, name))
    monkeypatch.setattr(
        PlainFile, "rows", lambda self, name, some: rows.append(list(some)) or get_rows(self, name, some)
    )
    encoder = load_t5(text_folders / "t5", T5_OPTIONS["mochi"], layers=Layers(0, prefetch=False))
    assert read == []
    encoder(["a ball"])
    assert not set(TABLES) & set(read)
    assert len(read) == len(set(read)) == 2 * 9 + 2  # of each layer 9, its bias of positions once, and the last norm
    assert rows == [sorted(set(encoder.tokenizer("a ball").input_ids))]


def test_embeddings_on_the_disk_are_shared_and_nothing_is_loaded_for_them(
    text_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, options = text_folders / "umt5", T5_OPTIONS["wan"]
    expected = open_t5(files, options, cache=tmp_path)(PROMPTS)
    monkeypatch.setattr("vitascope.models.text.t5.encoder.load_t5", lambda *args, **kwargs: pytest.fail("loaded"))
    found = open_t5(files, options, cache=tmp_path, layers=Layers(0))(PROMPTS)
    assert torch.equal(found.embeddings, expected.embeddings)


def test_files_that_do_not_fit_are_refused_before_a_prompt_is_read(text_folders: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(text_folders / "t5", tmp_path / "t5"))
    place = folder / "text_encoder"
    tensors: dict[str, Any] = {}
    for shard in place.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (place / "model.safetensors.index.json").unlink()
    table = next(name for name in TABLES if name in tensors)
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    wide = torch.zeros(len(tensors[table]), 3)
    for changed, message in (
        ({key: value for key, value in tensors.items() if key != name}, f"1 weights missing .{name}"),
        ({key: value for key, value in tensors.items() if key not in TABLES}, "1 weights missing .shared.weight"),
        (tensors | {"encoder.block.9.layer.0.x": torch.zeros(2)}, "1 weights of another model .encoder.block.9"),
        (tensors | {table: wide}, r"expected \(tokens, 16\)"),
    ):
        save_file(changed, place / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            load_t5(folder, T5_OPTIONS["mochi"], layers=Layers(0))
    save_file(tensors | {name: torch.zeros(3, 3)}, place / "model.safetensors")
    encoder = load_t5(folder, T5_OPTIONS["mochi"], layers=Layers(0))
    with pytest.raises(CheckpointError, match=r"has the shape \(3, 3\)"):
        encoder(["a ball"])
    # under either name or both, and beside weights that an encoder does not use
    rest = {key: value for key, value in tensors.items() if key not in TABLES}
    for names in (TABLES[:1], TABLES[1:], TABLES):
        both = {key: tensors[table].clone() for key in names}
        save_file(rest | both | {"decoder.final_layer_norm.weight": torch.zeros(16)}, place / "model.safetensors")
        assert open_layers(place, dtype=torch.float32).weight_bytes().total < sum(
            4 * v.numel() for v in tensors.values()
        )
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(CheckpointError, match="type 'bert'; valid types: t5, umt5"):
        load_t5(folder, T5_OPTIONS["ltx"], layers=Layers(0))


def test_layers_that_come_from_files_are_not_quantised(text_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitascope.models.text.t5.encoder.check_quantise", lambda quantise, device: None)
    with pytest.raises(CapabilityError, match="cannot be quantised"):
        load_t5(text_folders / "t5", replace(T5_OPTIONS["ltx"]), quantise="torchao_int8", layers=Layers(0))
