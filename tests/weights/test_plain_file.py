"""Tensors read by plain reads against the library that wrote them, and damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitascope.core.errors import CheckpointError
from vitascope.weights import plain_file
from vitascope.weights.plain_file import PlainFile
from vitascope.weights.tensor_file import TensorInfo

TENSORS: dict[str, Tensor] = {
    "matrix": torch.randn(5, 7),
    "half": torch.randn(3, 2).half(),
    "rounded": torch.randn(4, 3, 2).bfloat16(),
    "eight bits": torch.randn(6, 2).to(torch.float8_e4m3fn),
    "number": torch.tensor(3),
    "none": torch.zeros(0, 4),
    "flags": torch.tensor([True, False]),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "a.safetensors", {"note": "x"})
    return tmp_path / "a.safetensors"


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.float().equal(b.float())


def test_tensors_are_as_the_library_reads_them(path: Path) -> None:
    file, theirs = PlainFile(path), load_file(path)
    for name, expected in theirs.items():
        assert same(file.get(name), expected)
        assert file.info(name) == TensorInfo(expected.dtype, tuple(expected.shape))
    changed = file.get("matrix")
    changed.zero_()
    assert same(file.get("matrix"), theirs["matrix"])
    file.close()


def test_views_are_pages_of_the_file_that_nobody_else_sees_written_to(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_file, "_MAPPED_BYTES", 32)  # pages are given back again and again
    before, theirs = path.read_bytes(), load_file(path)
    file = PlainFile(path)
    views = {name: file.view(name) for name in theirs}
    file.close()
    for name, view in views.items():
        assert same(view, theirs[name])
        assert view.untyped_storage().nbytes() == view.nbytes
    views["matrix"].zero_()
    assert same(PlainFile(path).view("matrix"), theirs["matrix"])
    assert path.read_bytes() == before


def test_threads_may_read_at_the_same_time(path: Path) -> None:
    file, wrong = PlainFile(path), []

    def read(name: str) -> None:
        wrong.extend(name for _ in range(50) if not same(file.get(name), TENSORS[name]))

    threads = [Thread(target=read, args=(name,)) for name in TENSORS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_faults_are_told_in_one_line(path: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a\.safetensors: tensor colour cannot be read: it is not there"):
        PlainFile(path).get("colour")
    data = path.read_bytes()
    for kept in (data[:-1], data[:40], data[:4], b"", b"\xff" * 64, data[:8] + b"[]" + data[10:]):
        path.write_bytes(kept)
        with pytest.raises(CheckpointError, match=r"a\.safetensors is not a readable safetensors file"):
            PlainFile(path)
    head = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(8))
    with pytest.raises(CheckpointError, match="head is damaged"):
        PlainFile(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        PlainFile(tmp_path / "missing.safetensors")


def test_a_file_that_is_cut_while_it_is_read_is_an_error(path: Path) -> None:
    file = PlainFile(path)
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(CheckpointError, match="cut short"):
        for name in TENSORS:
            file.get(name)
    with pytest.raises(CheckpointError, match="cut short"):
        for name in TENSORS:
            file.view(name)
