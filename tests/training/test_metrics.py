"""Metrics: means that wait on their device, and a log that survives a crash."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from vitascope.training.metrics import Means, MetricsLog


def test_means_are_taken_per_name_and_start_afresh() -> None:
    means = Means()
    means.add({"loss": torch.tensor(1.0), "rare": torch.tensor(5.0)})
    means.add({"loss": torch.tensor(4.0, requires_grad=True)})
    assert {name: value.item() for name, value in means.tensors().items()} == {"loss": 2.5, "rare": 5.0}
    assert means.take() == {"loss": 2.5, "rare": 5.0}
    assert means.take() == {}


def test_lines_after_the_step_of_the_checkpoint_and_torn_ones_are_dropped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    for step in (2, 4, 6):
        log.write(step, "train", {"loss": 1 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "kind": "tr')
    log = MetricsLog(tmp_path, 4, tensorboard=False)
    log.write(5, "validate", {"error": 2.0})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 2, "kind": "train", "loss": 0.5},
        {"step": 4, "kind": "train", "loss": 0.25},
        {"step": 5, "kind": "validate", "error": 2.0},
    ]


def test_tensorboard_gets_the_same_values(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, tensorboard=True)
    log.write(1, "train", {"loss": 0.5})
    log.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()
