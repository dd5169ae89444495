"""What a process that torchrun did not start, or started wrongly, is told."""

from __future__ import annotations

import importlib
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from vitascope.core.errors import InputError
from vitascope.parallel.launch import DEFAULTS, joined

STARTED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RANK": None}, r"several processes are started by torchrun \(RANK not set\): torchrun --nproc-per-node 2 -m"),
        (dict.fromkeys(STARTED), r"RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set"),
        ({"WORLD_SIZE": "two"}, "must be whole numbers"),
        ({"RANK": "1"}, "RANK 1 and LOCAL_RANK 0 do not fit WORLD_SIZE 1"),
    ],
)
def test_an_environment_that_torchrun_did_not_make(changed: dict[str, str | None], message: str) -> None:
    environment = {name: value for name, value in {**STARTED, **changed}.items() if value is not None}
    with pytest.raises(InputError, match=message), joined(environment, "cpu"):
        pass


@pytest.fixture
def port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_one_process_is_a_group_too_and_leaves_it(port: str) -> None:
    with joined({**STARTED, "MASTER_PORT": port}, "cpu", patience_s=60.0) as ranks:
        x = torch.arange(3.0)
        assert torch.equal(ranks.sum(x), x)
        assert torch.equal(ranks.gather(x, [3], 0), x)
        assert (ranks.rank, ranks.size, ranks.is_first, ranks.device.type) == (0, 1, True, "cpu")
    assert not dist.is_initialized()


def test_no_thread_of_the_group_outlives_it(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def threads() -> int:
        names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
        return sum(name.startswith("pt_gloo") for name in names)

    monkeypatch.delitem(sys.modules, DEFAULTS, raising=False)
    before = threads()
    with joined({**STARTED, "MASTER_PORT": port}, "cpu", patience_s=60.0) as ranks:
        ranks.sum(torch.ones(1))
        assert threads() > before or not Path("/proc/self/task").is_dir()  # Linux tells
        importlib.import_module(DEFAULTS)  # as DTensor and others do
    assert threads() == before


def test_others_that_do_not_come(port: str) -> None:
    alone = {**STARTED, "WORLD_SIZE": "2", "MASTER_PORT": port}
    with pytest.raises(InputError, match=rf"process 0 did not meet the 1 others at 127.0.0.1:{port}: "):
        joined(alone, "cpu", patience_s=0.5).__enter__()
    assert not dist.is_initialized()


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="'mps' is not known for several processes; valid values: auto, cpu, cuda"):
        joined(STARTED, "mps").__enter__()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="process 2 of this machine has no GPU: 2 were found; start at most 2"):
        joined({**STARTED, "LOCAL_RANK": "2"}, "cuda").__enter__()
