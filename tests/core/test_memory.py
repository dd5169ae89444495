"""Amounts of memory in words, and what the process is seen to hold."""

from __future__ import annotations

import time

import pytest
import torch

from vitascope.core.errors import InputError
from vitascope.core.freed_memory import release_freed_memory, return_freed_memory
from vitascope.core.memory import PeakMemory, available_bytes, format_bytes, parse_bytes, resident_bytes

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("12GB", 12 * 10**9),
        ("800MB", 8 * 10**8),
        ("1.5GiB", 3 * 2**29),
        (" 0.5 gb ", 5 * 10**8),
        ("512mib", 2**29),
        (".25TB", 25 * 10**10),
        ("100KB", 10**5),
    ],
)
def test_amounts_with_a_unit_are_read(text: str, amount: int) -> None:
    assert parse_bytes(text) == amount


@pytest.mark.parametrize(
    "text", ["", "12", "GB", "12 G", "-1GB", "1e9B", "1,5GB", "12GB or so", "0GB", "0.1B", "nanGB"]
)
def test_other_amounts_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match=r"12GB, 800MB or 1.5GiB|above 0"):
        parse_bytes(text)


def test_amounts_are_written_in_mb_and_gb() -> None:
    assert format_bytes(12_345_678_901) == "12.35 GB"
    assert format_bytes(999_000_000) == "999 MB"
    assert parse_bytes(format_bytes(1_230_000_000)) == 1_230_000_000


def test_a_rise_of_what_is_held_is_seen_though_it_is_over() -> None:
    return_freed_memory()
    release_freed_memory()
    with PeakMemory(CPU) as peak:
        large = torch.ones(50_000_000)
        del large
    # 200 MB; the thread that looks needs a little itself
    assert peak.growth == pytest.approx(200e6, rel=0.05)
    with PeakMemory(CPU) as outer:
        large = torch.ones(25_000_000)
        with PeakMemory(CPU) as inner:
            time.sleep(0.1)
        del large
    assert outer.growth == pytest.approx(100e6, rel=0.1)
    assert inner.growth < 20e6
    with PeakMemory(CPU) as after:
        pass
    assert after.growth < 20e6


def test_the_machine_has_some_memory_left_and_the_process_holds_some() -> None:
    assert available_bytes() > 100e6
    assert 20e6 < resident_bytes() < 100e9
