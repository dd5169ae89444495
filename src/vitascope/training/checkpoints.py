"""Training checkpoints: written whole or not at all, the last few kept.

A checkpoint is one file `step_00001000.pt` of tensors and plain values (read with `weights_only=True`). It is written
to a temporary file beside it, flushed to the disk and renamed, so a crash at any moment leaves the earlier ones whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from vitascope.core.errors import CheckpointError
from vitascope.weights.tensor_file import atomic_file

FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})\.pt")


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of every whole checkpoint in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def write_checkpoint(folder: Path, step: int, state: Mapping[str, Any], keep: int) -> Path:
    """Write `state` as the checkpoint of `step`, then drop all but the newest `keep`.

    Raises CheckpointError when the disk refuses; no partial file is left behind.
    """
    target = folder / f"step_{step:08d}.pt"
    try:
        with atomic_file(target) as file:
            torch.save({"format": FORMAT, "step": step, **state}, file)
    except RuntimeError as error:  # torch's own writer meets a full disk as this
        raise CheckpointError(f"cannot write {target}: {error}") from error
    for _, path in list_checkpoints(folder)[:-keep]:
        path.unlink()
    for stale in folder.glob(".step_*.part"):
        stale.unlink(missing_ok=True)
    return target


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state of a checkpoint, on the CPU. Raises CheckpointError when the file is damaged or of another format."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError, KeyError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path} is not of format {FORMAT}")
    return state
