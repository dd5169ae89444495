"""Attention of long sequences: our backend for a device against torch's own kernel, and a matrix product for scale.

    python benchmarks/attention.py [--device cpu] [--dtype bf16] [--repeats 10]

On a CPU ours is `ops.block_attention` in bf16; on a GPU both are torch's kernel. Sides take turns. The rate counts the
two products, 4 L S H E operations. The masked case hides a quarter of the keys, as padding does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import matrix_rate, timed_in_turn, write_results
from torch import Tensor

from vitascope.ops.attention import attend, choose_backend

SHAPES = {
    "4,680 tokens": (4680, 4680, 12, 64),
    "2,048 tokens": (2048, 2048, 16, 128),
    "9,360 tokens": (9360, 9360, 12, 128),
    "512 tokens": (512, 512, 12, 64),
    "4,680 tokens read 512 words": (4680, 512, 12, 128),
    "4,680 tokens, a quarter masked": (4680, 4680, 12, 64),
}
"""Queries, keys, heads and width of a head."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def compare(name: str, dtype: torch.dtype, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """Rows of both backends."""
    queries, keys, heads, width = SHAPES[name]
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, heads, width, generator=draw).to(device, dtype) for n in (queries, keys, keys))
    mask: Tensor | None = None
    if "masked" in name:
        mask = (torch.arange(keys, device=device) < keys * 3 // 4)[None, None, None]
    ours = choose_backend(queries, keys, device.type, dtype == torch.bfloat16)
    runs: dict[str, Callable[[], Tensor]] = {
        side: partial(attend, q, k, v, mask, backend) for side, backend in (("ours", "auto"), ("torch", "sdpa"))
    }
    with torch.no_grad():
        times = timed_in_turn(runs, repeats)
        exact = attend(q.double(), k.double(), v.double(), mask, "sdpa") if queries <= 4680 else None
        rows = []
        for side, run in runs.items():
            row: dict[str, Any] = {"what": name, "side": side, "backend": ours if side == "ours" else "sdpa"}
            row |= {"time": times[side], "rate": 4 * queries * keys * heads * width / times[side].median_s}
            if exact is not None:
                row["relative_error"] = float((run().double() - exact).norm() / exact.norm())
            rows.append(row)
    rows[0]["median_ratio"] = times["ours"].median_s / times["torch"].median_s
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--repeats", type=int, default=10)
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    rate = matrix_rate(dtype, device)
    rows = [row for name in SHAPES for row in compare(name, dtype, device, arguments.repeats)]
    write_results("attention", device, rows, dtype=arguments.dtype, matrix_rate=rate)


if __name__ == "__main__":
    main()
