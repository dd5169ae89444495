"""Amounts of memory: as words, as what a process holds, and its peak while something runs."""

from __future__ import annotations

import os
import re
import threading
from types import TracebackType

import torch

from vitascope.core.errors import InputError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]+)\s*", re.IGNORECASE)
_PERIOD_S = 0.002


def parse_bytes(text: str) -> int:
    """Bytes of an amount with a unit, such as 12GB, 800MB (powers of ten) or 1.5GiB (of two). Raises InputError."""
    found = _AMOUNT.fullmatch(text)
    factor = UNITS.get(found[2].upper()) if found else None
    if found is None or factor is None:
        raise InputError(f"an amount of memory is a number and a unit such as 12GB, 800MB or 1.5GiB, got {text!r}")
    amount = round(float(found[1]) * factor)
    if amount < 1:
        raise InputError(f"an amount of memory must be above 0, got {text!r}")
    return amount


def format_bytes(amount: int) -> str:
    """Three figures or more, in MB or GB (powers of ten)."""
    return f"{amount / 1e9:.2f} GB" if amount >= 10**9 else f"{amount / 1e6:.0f} MB"


def resident_bytes() -> int:
    """What this process holds of the machine's memory for itself, without the files that are mapped into it.

    Raises InputError where the system does not tell (it must have /proc).
    """
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            _, resident, shared, *_ = file.read().split()
    except OSError as error:
        raise InputError("the memory of this process can only be told on Linux") from error
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def held_bytes(device: torch.device) -> int:
    """What this process holds of the memory that models on `device` live in: of the GPU, or `resident_bytes`."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()


def available_bytes() -> int:
    """The machine's memory that new tensors may take, files that are only cached given up; 0 where the system does not
    tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = [line.split()[1] for line in file if line.startswith("MemAvailable:")]
    except OSError:
        return 0
    return int(found[0]) * 1024 if found else 0


class PeakMemory:
    """How far `held_bytes` rises above what it was at the start of a `with` block: `growth` bytes, from then on.

    On a GPU the allocator counts, elsewhere the system. Of blocks inside one another the outer one looks every 2 ms
    instead, so a rise that is over sooner may be missed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self.growth = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._counts = False

    def __enter__(self) -> PeakMemory:
        self.start, self.growth = held_bytes(self.device), 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._ended.clear()
            self._counts = _begin_counting()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            self.growth = torch.cuda.max_memory_allocated(self.device) - self.start
            return
        self._ended.set()
        self._thread.join()
        self._thread = None
        if self._counts:
            self.growth = max(self.growth, _counted_bytes() - self.start)

    def _watch(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(_PERIOD_S)
            self.growth = max(self.growth, resident_bytes() - self.start)


def _begin_counting() -> bool:
    """Let the kernel's count of the peak begin anew; False where it has none."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _counted_bytes() -> int:
    """The kernel's peak, without the files that are mapped now."""
    with open("/proc/self/status", encoding="ascii") as file:
        found = dict(re.findall(r"(\w+):\s+(\d+) kB", file.read()))
    return 1024 * (int(found["VmHWM"]) - int(found["RssFile"]) - int(found["RssShmem"]))
