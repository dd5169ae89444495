from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from vitascope.core.errors import CheckpointError
from vitascope.training.checkpoints import list_checkpoints, read_checkpoint, write_checkpoint


def test_round_trip_and_only_the_last_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step, {"weights": torch.full((2,), float(step))}, keep=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 3]
    assert read_checkpoint(list_checkpoints(tmp_path)[-1][1])["weights"].tolist() == [3.0, 3.0]


def _write_for_ever(folder: Path) -> None:
    torch.set_num_threads(1)  # the threads of the parent's pool are not there after a fork: waiting for them hangs
    state = {"weights": torch.arange(300_000)}
    for step in range(1, 1_000_000):
        write_checkpoint(folder, step, state, keep=2)


def test_killed_in_the_middle_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 30
    try:
        while len(list_checkpoints(tmp_path)) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        # wait for the moment in which a temporary file is there, that is, a write is under way
        while not list(tmp_path.glob(".step_*")) and time.monotonic() < deadline:
            pass
    finally:
        process.kill()
        process.join()
    found = list_checkpoints(tmp_path)
    assert found
    for _, path in found:
        assert torch.equal(read_checkpoint(path)["weights"], torch.arange(300_000))


def test_a_write_that_fails_leaves_the_earlier_ones_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, 1, {"weights": torch.ones(2)}, keep=1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_checkpoint(tmp_path, 2, {"weights": torch.ones(2)}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001.pt"]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_damaged_files_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = write_checkpoint(tmp_path, 1, {"weights": torch.ones(2)}, keep=1)
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    torch.save({"format": 99}, tmp_path / "step_00000001.pt")
    with pytest.raises(CheckpointError, match="format"):
        read_checkpoint(tmp_path / "step_00000001.pt")
