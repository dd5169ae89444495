"""Weights of other projects: shards, variants, prefixes, pickles, and every fault told in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vitascope.core.errors import CheckpointError
from vitascope.weights.keys import Fuse, KeyTable, Rename, Split
from vitascope.weights.plain_file import PlainFile
from vitascope.weights.sources import MemorySource, TensorSource, Under, open_source, read_metadata
from vitascope.weights.streaming import load_streaming

TENSORS = {f"layer.{n}.{leaf}": torch.randn(4, 4) for n in range(3) for leaf in ("q", "k")}


def content(source: TensorSource) -> dict[str, Tensor]:
    return {name: source.get(name) for name in source.names()}


def assert_holds(source: TensorSource, expected: dict[str, Tensor]) -> None:
    found = content(source)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def write_shards(folder: Path, variant: str = "", count: int = 2) -> Path:
    """Shards and an index as diffusers writes them; the path of the index."""
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for number in range(count):
        name = f"diffusion_pytorch_model{variant}-{number + 1:05d}-of-{count:05d}.safetensors"
        part = {key: TENSORS[key] for key in sorted(TENSORS)[number::count]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = folder / f"diffusion_pytorch_model.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def test_a_file_and_a_folder_with_one_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, {"config": "{}"})
    assert_holds(open_source(path), TENSORS)
    assert_holds(open_source(tmp_path), TENSORS)
    assert read_metadata(path) == {"config": "{}"}


@pytest.mark.parametrize("variant", ["", "fp16"])
def test_shards_are_read_by_their_index(tmp_path: Path, variant: str) -> None:
    write_shards(tmp_path, f".{variant}" if variant else "")
    assert_holds(open_source(tmp_path, variant=variant), TENSORS)
    with pytest.raises(CheckpointError, match=r"holds no diffusion_pytorch_model\.bf16\.safetensors or .*there are"):
        open_source(tmp_path, variant="bf16")


def test_a_part_of_a_file_is_known_by_its_prefix() -> None:
    both = MemorySource({"vae.a": torch.ones(1), "model.b": torch.zeros(2), "model.c": torch.ones(3)}, "both")
    part = Under(both, "model.")
    assert part.names() == ["b", "c"]
    assert part.get("c").shape == (3,)
    assert part.label == "both"


def test_a_pickle_needs_permission_and_gives_tensors_alone(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": TENSORS}, path)
    with pytest.raises(CheckpointError, match=r"is a pickle: allow it \(--allow-pickle\) if you trust"):
        open_source(path)
    assert_holds(open_source(path, allow_pickle=True), TENSORS)
    torch.save({"a": 3}, path)
    with pytest.raises(CheckpointError, match="holds no table of tensors"):
        open_source(path, allow_pickle=True)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"a": Evil()}, path)
    with pytest.raises(CheckpointError, match="cannot be read as weights alone"):
        open_source(path, allow_pickle=True)
    assert "run" not in capsys.readouterr().out


def test_faults_of_shards_are_told(tmp_path: Path) -> None:
    index = write_shards(tmp_path)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    whole = second.read_bytes()
    second.unlink()
    with pytest.raises(CheckpointError, match=rf"shard {second.name} is missing from .*: fetch it again"):
        open_source(tmp_path)
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=f"{second.name} is not a readable safetensors file"):
        open_source(tmp_path)
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="lacks 3 tensors that the index names"):
        open_source(tmp_path)
    second.write_bytes(whole)
    save_file(TENSORS, first)
    with pytest.raises(
        CheckpointError, match=rf"tensor layer\.0\.q stands in two shards: {first.name} and {second.name}"
    ):
        open_source(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="names a shard outside its folder"):
        open_source(tmp_path)
    index.write_text("[1, 2")
    with pytest.raises(CheckpointError, match="cannot be read: it is not JSON"):
        open_source(tmp_path)


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        open_source(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"holds no diffusion_pytorch_model\.safetensors or model\.safetensors"):
        open_source(tmp_path)
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(CheckpointError, match=r"valid suffixes: \.safetensors, \.pth"):
        open_source(text)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError, match=r"broken\.safetensors is not a readable safetensors file"):
        open_source(broken)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 8, bias=False) for _ in range(3))
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))


TABLE: KeyTable = (Fuse(("layer.{n}.q", "layer.{n}.k"), "layers.{n}.weight"), Rename("seen", "count"))


def toy() -> Toy:
    with torch.device("meta"):
        return Toy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_on_the_meta_device_is_filled(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({**TENSORS, "seen": torch.tensor([3, 4])}, tmp_path / "model.safetensors")
    model, steps = toy(), []
    load_streaming(model, open_source(tmp_path), TABLE, dtype=dtype, report=lambda *counts: steps.append(counts))
    assert steps == [(n, 4) for n in (1, 2, 3, 4)]
    assert model.get_buffer("count").tolist() == [3, 4]
    for n, layer in enumerate(model.layers):
        expected = torch.cat([TENSORS[f"layer.{n}.q"], TENSORS[f"layer.{n}.k"]]).to(dtype)
        assert torch.equal(layer.weight, expected)  # type: ignore[arg-type]
        assert not layer.weight.requires_grad


def test_weights_share_no_memory_with_their_source() -> None:
    given = {"a": torch.ones(8, 4), "count": torch.tensor([3, 4])}
    with torch.device("meta"):
        model = nn.ModuleDict({"first": nn.Linear(4, 4, bias=False), "second": nn.Linear(4, 4, bias=False)})
        model.register_buffer("count", torch.zeros(2, dtype=torch.int64))
    table = (Split("a", ("first.weight", "second.weight")), Rename("count", "count"))
    load_streaming(model, MemorySource(given), table)
    for tensor in given.values():
        tensor.zero_()
    for value in model.state_dict().values():
        assert bool(value.all())
        assert value.untyped_storage().nbytes() == value.nbytes  # and no larger tensor is kept for a part of it


def test_weights_that_need_no_change_are_pages_of_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    viewed: list[int] = []
    view = PlainFile.view

    def watched(file: PlainFile, name: str) -> Tensor:
        tensor = view(file, name)
        viewed.append(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(PlainFile, "view", watched)
    with torch.device("meta"):
        model = nn.Linear(4, 4, bias=False)
    load_streaming(model, open_source(tmp_path), (Rename("a", "weight"),))
    assert viewed == [model.weight.data_ptr()]


def test_weights_that_do_not_fit_the_model_are_told() -> None:
    whole = {**TENSORS, "seen": torch.tensor([3, 4])}
    with pytest.raises(CheckpointError, match=r"toy\.bin: 1 weights missing \(count\)"):
        load_streaming(toy(), MemorySource(TENSORS, "toy.bin"), TABLE)
    more = {**whole, "layer.7.q": torch.ones(4, 4), "layer.7.k": torch.ones(4, 4)}
    with pytest.raises(CheckpointError, match=r"1 weights of another model \(layers\.7\.weight\)"):
        load_streaming(toy(), MemorySource(more), TABLE)
    wrong = {**whole, "layer.1.q": torch.ones(5, 4)}
    with pytest.raises(CheckpointError, match=r"layers\.1\.weight has the shape \(9, 4\), expected \(8, 4\)"):
        load_streaming(toy(), MemorySource(wrong), TABLE)
