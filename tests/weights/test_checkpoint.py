"""Checkpoint files: exact round trips, atomic writes, one clear line for every kind of damage."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vitascope.core.errors import CheckpointError
from vitascope.weights.checkpoint import directory_digest, file_digest, load_checkpoint, load_into, save_checkpoint
from vitascope.weights.tensor_file import atomic_file


def tensors() -> dict[str, torch.Tensor]:
    return {
        "b": torch.arange(3, dtype=torch.int64),
        "flag": torch.tensor(True),
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "matrix": torch.arange(6, dtype=torch.float32).reshape(2, 3).t(),
        "none": torch.zeros(0, 4),
        "scale": torch.tensor(3.25, dtype=torch.float64),
    }


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model.safetensors"
    save_checkpoint(path, tensors(), "toy", {"width": 4, "strides": [1, 2]}, {"licence": "Apache-2.0"})
    read = load_checkpoint(path, family="toy")
    assert (read.family, read.config, read.extra) == ("toy", {"width": 4, "strides": [1, 2]}, {"licence": "Apache-2.0"})
    assert read.tensors.keys() == tensors().keys() == load_file(path).keys()
    for name, tensor in tensors().items():
        assert read.tensors[name].dtype == tensor.dtype
        assert read.tensors[name].shape == tensor.shape
        assert torch.equal(read.tensors[name], tensor)
    assert [entry.name for entry in path.parent.iterdir()] == ["model.safetensors"]


def test_same_content_same_bytes(tmp_path: Path) -> None:
    extra = {name: name for name in "abcdefgh"}
    save_checkpoint(tmp_path / "one", tensors(), "toy", {"x": 1, "y": 2}, extra)
    backwards = dict(reversed(tensors().items()))
    save_checkpoint(tmp_path / "two", backwards, "toy", {"y": 2, "x": 1}, dict(reversed(extra.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("length", [0, 5, 40, -1])
def test_truncated_files_are_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, tensors(), "toy", {})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="not a readable safetensors file") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_missing_foreign_and_unconfigured_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint file"):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no checkpoint file"):
        load_checkpoint(tmp_path)
    (tmp_path / "text").write_text("this is not a checkpoint, whatever its name says" * 9)
    with pytest.raises(CheckpointError, match="not a readable"):
        load_checkpoint(tmp_path / "text")
    for metadata, words in [
        (None, "no configuration"),
        ({"config": "{"}, "damaged configuration"),
        ({"config": "[]"}, "without a family"),
        ({"config": "{}"}, "without a family"),
    ]:
        save_file({"a": torch.zeros(1)}, tmp_path / "foreign", metadata=metadata)
        with pytest.raises(CheckpointError, match=words):
            load_checkpoint(tmp_path / "foreign")
    save_checkpoint(tmp_path / "other", {}, "codec", {})
    with pytest.raises(CheckpointError, match="'codec', but 'denoiser' is needed"):
        load_checkpoint(tmp_path / "other", family="denoiser")


def test_what_cannot_be_stored_is_refused_before_writing(tmp_path: Path) -> None:
    path = tmp_path / "model"
    complex_values = {"z": torch.zeros(1, dtype=torch.complex64)}
    for call, words in [
        (lambda: save_checkpoint(path, {}, "toy", {"x": float("nan")}), "JSON"),
        (lambda: save_checkpoint(path, {}, "toy", {"x": object()}), "JSON"),
        (lambda: save_checkpoint(path, {}, "", {}), "family"),
        (lambda: save_checkpoint(path, {}, "toy", {"family": "other"}), "family"),
        (lambda: save_checkpoint(path, {}, "toy", {}, {"config": "x"}), "'config'"),
        (lambda: save_checkpoint(path, complex_values, "toy", {}), "complex64"),
        (lambda: save_checkpoint(path, {"m": torch.zeros(1, device="meta")}, "toy", {}), "no dense values"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            call()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """A limit on file size fails in the middle of the data as a full disk does."""
    path = tmp_path / "model"
    save_checkpoint(path, {"a": torch.ones(2)}, "toy", {})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot write"):
            save_checkpoint(path, {"a": torch.ones(100_000)}, "toy", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_unusable_places_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "file" / "model", tmp_path, tmp_path / "pipe"):
        with pytest.raises(CheckpointError, match="cannot write"):
            save_checkpoint(path, {}, "toy", {})
    assert (tmp_path / "file").read_text() == "x"
    assert (tmp_path / "pipe").is_fifo()


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def write_half() -> None:
        with atomic_file(tmp_path / "model") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_load_into_is_strict_and_all_or_nothing() -> None:
    module = nn.Linear(2, 3)
    good = {"weight": torch.ones(3, 2, dtype=torch.float64), "bias": torch.zeros(3)}
    load_into(module, good)
    assert module.weight.dtype == torch.float32
    assert torch.equal(module.weight, torch.ones(3, 2))
    bad: list[tuple[dict[str, torch.Tensor], str]] = [
        ({"weight": torch.zeros(3, 2)}, r"1 missing \(bias\)"),
        ({**good, "gain": torch.zeros(1)}, r"1 unknown \(gain\)"),
        ({**good, "bias": torch.zeros(4)}, r"1 mis-shaped \(bias \(4,\) for \(3,\)\)"),
        ({**good, "bias": torch.zeros(3, dtype=torch.int64)}, "another kind"),
        ({f"k{i}": torch.zeros(1) for i in range(5)}, r"5 unknown \(k0, k1, k2 and 2 more\)"),
    ]
    for values, words in bad:
        with pytest.raises(CheckpointError, match=words) as caught:
            load_into(module, {**values, "weight": torch.zeros(3, 2)} if "weight" in values else values, name="toy")
        assert str(caught.value).startswith("weights do not fit toy: ")
    assert torch.equal(module.weight, torch.ones(3, 2))


def test_load_into_fills_a_module_on_the_meta_device() -> None:
    with torch.device("meta"):
        module = nn.Linear(2, 3)
    load_into(module, {"weight": torch.ones(3, 2), "bias": torch.full((3,), 2.0)})
    assert torch.equal(module(torch.ones(1, 2)), torch.full((1, 3), 4.0))


def test_digests_depend_on_names_and_contents_alone(tmp_path: Path) -> None:
    for root in ("one", "two"):
        (tmp_path / root / "sub").mkdir(parents=True)
    names = ["a", "sub/b"]
    for root, order in (("one", names), ("two", names[::-1])):
        for name in order:
            (tmp_path / root / name).write_text(f"contents of {name}")
    assert directory_digest(tmp_path / "one") == directory_digest(tmp_path / "two")
    assert len(file_digest(tmp_path / "one" / "a")) == 40
    (tmp_path / "two" / "a").rename(tmp_path / "two" / "c")
    assert directory_digest(tmp_path / "one") != directory_digest(tmp_path / "two")
    (tmp_path / "two" / "c").rename(tmp_path / "two" / "a")
    (tmp_path / "two" / "a").write_text("other")
    assert directory_digest(tmp_path / "one") != directory_digest(tmp_path / "two")
    with pytest.raises(CheckpointError, match="no folder"):
        directory_digest(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="cannot read"):
        file_digest(tmp_path / "absent")
