"""Metrics of a run: one JSON object per line in `metrics.jsonl`, and TensorBoard if asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vitascope.core.errors import TrainingError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class MetricsLog:
    """Appends metrics of steps. Lines of steps after `resume_step` (lost in a crash, to be taken again) are dropped."""

    def __init__(self, folder: Path, resume_step: int, tensorboard: bool) -> None:
        self.path = folder / "metrics.jsonl"
        self._keep_until(resume_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _tensorboard(folder, resume_step) if tensorboard else None

    def _keep_until(self, step: int) -> None:
        if not self.path.exists():
            return
        lines = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        os.replace(temporary, self.path)

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Log `values` at `step` (optimiser steps done); kind is "train" or "validate"."""
        rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "kind": kind, **rounded}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


class Means:
    """Running means of scalars that stay on their device until asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Take in one value per name; names may differ from call to call."""
        for name, value in values.items():
            total, count = self._sums.get(name, (torch.zeros((), device=value.device), 0))
            self._sums[name] = (total + value.detach().float(), count + 1)

    def tensors(self) -> dict[str, Tensor]:
        """The means so far, on their devices."""
        return {name: total / count for name, (total, count) in self._sums.items()}

    def take(self) -> dict[str, float]:
        """The means since the last call."""
        means = {name: float(mean) for name, mean in self.tensors().items()}
        self._sums = {}
        return means


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short by a crash


def _tensorboard(folder: Path, purge_step: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrainingError("loop.tensorboard needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter(folder / "tensorboard", purge_step=purge_step + 1)
