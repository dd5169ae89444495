"""What every benchmark shares: timing, the machine, the measured matrix-product rate, and JSON results.

Run a benchmark from the repository root, for example `python benchmarks/generation.py`; it prints a table and writes
`benchmarks/results/NAME.json`.
"""

from __future__ import annotations

import json
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs after warm-up."""

    median_s: float
    p95_s: float
    repeats: int


def timed(run: Callable[[], object], repeats: int = 10, warmup: int = 2) -> Timing:
    """Time `run`, device work included."""
    return timed_in_turn({"": run}, repeats, warmup)[""]


def timed_in_turn(runs: Mapping[str, Callable[[], object]], repeats: int = 10, warmup: int = 2) -> dict[str, Timing]:
    """Time several things one after the other, over and over, so that what slows the machine slows all of them."""
    for _ in range(warmup):
        for run in runs.values():
            run()
    _wait()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            _wait()
            seconds[name].append(time.perf_counter() - start)
    return {name: _timing(each) for name, each in seconds.items()}


def _timing(seconds: list[float]) -> Timing:
    return Timing(statistics.median(seconds), p95(seconds), len(seconds))


def p95(seconds: list[float]) -> float:
    """The 95th percentile, as the nearest that was measured."""
    return sorted(seconds)[round(0.95 * (len(seconds) - 1))]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matrix_rate(dtype: torch.dtype, device: torch.device, size: int = 2048) -> float:
    """Floating-point operations a second of a product of two random square matrices: the ceiling of the machine."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / timed(lambda: a @ b, repeats=20, warmup=5).median_s


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory so far: of the device on a GPU, else resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine(device: torch.device) -> dict[str, Any]:
    """Where the figures come from."""
    commit, changed = (
        _git("rev-parse", "HEAD"),
        _git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results"),
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "commit": commit + ("+changes" if changed else ""),
        "device": name,
        "threads": torch.get_num_threads(),
        "huge_pages": _huge_pages(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()


def _huge_pages() -> str:
    """When the system backs memory with pages of 2 MB by itself, which makes large tensors faster and more of them
    resident; "" where it does not say."""
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", path.read_text()) if path.is_file() else None
    return chosen[1] if chosen else ""


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def write_results(name: str, device: torch.device, rows: list[dict[str, Any]], **more: Any) -> Path:
    """Write rows (plain values and Timings) with the machine as JSON, and print them as a table."""
    plain = [{key: asdict(value) if isinstance(value, Timing) else value for key, value in row.items()} for row in rows]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(device), **more, "rows": plain}, indent=1) + "\n")
    for row in rows:
        print("  ".join(f"{key}={_short(value)}" for key, value in row.items()))
    print(f"written to {path}")
    return path


def earlier_rows(name: str, rows: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """The rows that results hold already, without those that `rows` measure anew (the same values of `keys`)."""
    path = RESULTS / f"{name}.json"
    anew = {tuple(row.get(key) for key in keys) for row in rows}
    known = json.loads(path.read_text())["rows"] if path.is_file() else []
    return [row for row in known if tuple(row.get(key) for key in keys) not in anew]


def _short(value: Any) -> str:
    if isinstance(value, Timing):
        return f"{value.median_s * 1000:.1f} ms (p95 {value.p95_s * 1000:.1f})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
