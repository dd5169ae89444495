"""Joining the processes that torchrun started."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from vitascope.core.errors import InputError
from vitascope.parallel.ranks import Ranks

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process (https://docs.pytorch.org/docs/stable/elastic/run.html)."""
BACKENDS: dict[str, str] = {"cpu": "gloo", "cuda": "nccl"}
PATIENCE_S = 600.0
DEFAULTS = "torch.distributed.nn.functional"
"""Its functions take the group that exists when they are defined as a default argument. Were this module first imported
later (torch may do so on its own), they would keep the group: its threads would outlive Python, which aborts."""


@contextmanager
def joined(environment: Mapping[str, str], device: str = "auto", patience_s: float = PATIENCE_S) -> Iterator[Ranks]:
    """The processes of a torchrun, for as long as the block lasts; process i of a machine works on its GPU i.

    environment: os.environ. device: "cpu", "cuda" or "auto" (GPUs if there are any). patience_s: seconds after which a
    process that waits for another gives up. Raises InputError when torchrun did not start this process, started more
    processes than this machine has GPUs, or when the others do not come.
    """
    rank, local, size = _place(environment)
    place = _device(device, local)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    importlib.import_module(DEFAULTS)
    address = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    try:
        dist.init_process_group(
            BACKENDS[place.type],
            f"tcp://{address}",
            timedelta(seconds=patience_s),
            world_size=size,
            rank=rank,
            device_id=place if place.type == "cuda" else None,
        )
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"process {rank} did not meet the {size - 1} others at {address}: {reason}") from error
    try:
        yield Ranks(rank, size, place)
    finally:
        dist.destroy_process_group()


def _place(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Number of this process, its number on its machine, and how many processes there are."""
    missing = [name for name in VARIABLES if name not in environment]
    if missing:
        raise InputError(
            f"several processes are started by torchrun ({', '.join(missing)} not set): "
            "torchrun --nproc-per-node 2 -m vitascope generate --parallel ulysses ..."
        )
    try:
        rank, local, size = (int(environment[name]) for name in VARIABLES[:3])
    except ValueError as error:
        raise InputError(f"RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers: {error}") from error
    if not (0 <= rank < size and local >= 0):
        raise InputError(f"RANK {rank} and LOCAL_RANK {local} do not fit WORLD_SIZE {size}")
    return rank, local, size


def _device(name: str, local: int) -> torch.device:
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if kind not in BACKENDS:
        raise InputError(
            f"device {name!r} is not known for several processes; valid values: auto, {', '.join(BACKENDS)}"
        )
    if kind == "cpu":
        return torch.device("cpu")
    found = torch.cuda.device_count()
    if local >= found:
        raise InputError(
            f"process {local} of this machine has no GPU: {found} were found; start at most {found} of them"
        )
    return torch.device("cuda", local)
