"""Public models against diffusers on the same random weights: denoising steps, codecs, whole pipelines, starts.

    python benchmarks/public_models.py [--only "wan step" ...] [--rounds 3] [--dtypes bf16 fp32]
    python benchmarks/public_models.py --device cuda --compiled     (steps and codecs at their full size)

Every figure is of a process of its own, ours and theirs in turn, `--rounds` times each, with `Case.repeats` runs after
a first one; median and p95 are over all of these. Figures of other cases that the results hold already stay, with the
commit that they are of. Memory is how far the resident memory rises in the first run, for whole pipelines its highest
mark, on a GPU what the allocator gave out at most beside the weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from folders import whole, write_folder
from measure import earlier_rows, machine, p95, write_results
from peers import DTYPES, SIDES, WORDS, Run, Setting, codec, step

from vitascope.core.freed_memory import release_freed_memory

SMALL: dict[str, dict[str, Any]] = {
    "wan": {
        "num_attention_heads": 12, "attention_head_dim": 64, "ffn_dim": 3072, "num_layers": 6, "text_dim": 4096,
    },
    "ltx": {"num_attention_heads": 12, "attention_head_dim": 64, "cross_attention_dim": 768, "num_layers": 6},
    "mochi": {"num_attention_heads": 12, "attention_head_dim": 64, "num_layers": 6, "pooled_projection_dim": 384},
}  # fmt: skip
"""Width 768, 6 layers."""
SMALL_LATENTS = {
    4680: {"wan": (16, 13, 40, 36), "ltx": (128, 13, 20, 18), "mochi": (12, 13, 40, 36)},
    1170: {"wan": (16, 13, 20, 18), "ltx": (128, 13, 10, 9), "mochi": (12, 13, 20, 18)},
}
"""Latents (C, T, h, w) by tokens."""
FULL: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "wan 1.3b 480p step": ("wan", {
        "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30,
    }, (16, 21, 60, 104)),
    "wan 1.3b 720p step": ("wan", {
        "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30,
    }, (16, 21, 90, 160)),
    "ltx 13b step": ("ltx", {
        "num_attention_heads": 32, "attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48,
    }, (128, 16, 22, 38)),
    "mochi step": ("mochi", {}, (12, 28, 60, 106)),
}  # fmt: skip
"""Family, configuration and latents at full size, for a GPU."""
FULL_CLIPS = {"wan": (81, 480, 832), "ltx": (121, 704, 1216), "mochi": (163, 480, 848)}
CLIPS = {"wan": (17, 256, 256), "ltx": (33, 256, 256), "mochi": (13, 256, 256)}
"""Frames, height and width in px of what the codecs are given."""
PIPELINE_CLIPS = {"wan": (17, 256, 256), "ltx": (33, 512, 512), "mochi": (13, 256, 256)}
NUM_STEPS = 10


@dataclass(frozen=True)
class Case:
    """make(side, setting): what to time. shape: what is said of it in the results."""

    make: Callable[[str, Setting], Run]
    shape: dict[str, Any] = field(default_factory=dict)
    repeats: int = 3


@dataclass(frozen=True)
class Folder:
    """A process that loads a folder, reads the prompt if there is one, and makes a clip of it unless steps is 0."""

    family: str
    prompt: str
    steps: int = 0
    size: tuple[int, int, int] = (0, 0, 0)

    @property
    def shape(self) -> dict[str, Any]:
        frames, height, width = self.size
        return {"steps": self.steps, "frames": frames, "height_px": height, "width_px": width} if self.steps else {}


def _steps(tokens: int, name: str) -> dict[str, Case]:
    shape = {"tokens": tokens, "width": 768, "layers": 6}
    return {
        name.format(family): Case(partial(step, family, SMALL[family], latents), {**shape, "words": WORDS[family]})
        for family, latents in SMALL_LATENTS[tokens].items()
    }


def _codecs(clips: dict[str, tuple[int, int, int]], repeats: int) -> dict[str, Case]:
    return {
        f"{family} {way}": Case(
            partial(codec, family, way, (frames, height, width)),
            {"frames": frames, "height_px": height, "width_px": width},
            repeats,
        )
        for family, (frames, height, width) in clips.items()
        for way in ("encode", "decode")
    }


CASES = {**_steps(4680, "{} step"), **_steps(1170, "{} step, 1170 tokens"), **_codecs(CLIPS, 2)}
FULL_CASES = {
    **{
        name: Case(partial(step, family, config, shape), {"latents": list(shape), "words": WORDS[family]}, 5)
        for name, (family, config, shape) in FULL.items()
    },
    **_codecs(FULL_CLIPS, 3),
}
FOLDERS = {
    "wan start": Folder("wan", ""),
    "wan start, a prompt read": Folder("wan", "w1 w2 w3"),
    **{f"{family} pipeline": Folder(family, "w1 w2 w3", NUM_STEPS, size) for family, size in PIPELINE_CLIPS.items()},
}
"""What is read after loading. Ours opens the text encoder for the first prompt that it has no embedding of."""


def work(case: Case, side: str, setting: Setting) -> dict[str, Any]:
    """Seconds of each run and the rise of memory in the first, in this process."""
    run = case.make(side, setting)
    gc.collect()
    on_gpu = setting.device.type == "cuda"
    release_freed_memory()  # what making the model left would be taken anew without a trace
    before = torch.cuda.memory_allocated() if on_gpu else _resident("VmRSS")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
    _once(run)
    rise = (torch.cuda.max_memory_allocated() if on_gpu else _resident("VmHWM")) - before
    return {"seconds": [_once(run) for _ in range(case.repeats)], "rise_bytes": rise}


def _once(run: Run) -> float:
    begin = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _resident(mark: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(mark)).split()[1])


def compare(name: str, dtype: str, rounds: int, run: Callable[[str], dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of both sides, in turn."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side, results in found.items():
            results.append(run(side))
    rows = []
    for side, results in found.items():
        seconds = [one for result in results for one in result["seconds"]]
        row: dict[str, Any] = {"what": name, "side": side, "dtype": dtype, "median_s": statistics.median(seconds)}
        row |= {"p95_s": p95(seconds), "runs": len(seconds), "rounds": rounds}
        for key in ("load_s", "rise_bytes"):
            if key in results[0]:
                row[key] = statistics.median(result[key] for result in results)
        rows.append(row)
    for key in ("median_s", "rise_bytes"):
        rows[0][f"{key.partition('_')[0]}_ratio"] = rows[0][key] / rows[1][key]
    print("  ".join(f"{key}={value}" for key, value in rows[0].items()), flush=True)
    return rows


def apart(name: str, side: str, dtype: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """`work` in a process of its own."""
    command = [sys.executable, __file__, "--worker", name, side, dtype, "--device", arguments.device]
    command += ["--compiled"] if arguments.compiled else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} of {side} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_folder(name: str, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of one case of `FOLDERS`."""
    case = FOLDERS[name]
    with tempfile.TemporaryDirectory() as folder:
        write_folder(case.family, Path(folder))
        act = partial(whole, Path(folder), dtype=dtype, prompt=case.prompt, steps=case.steps, size=case.size)
        return [{**row, **case.shape} for row in compare(name, dtype, rounds, lambda side: act(side=side))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=None, choices=[*CASES, *FULL_CASES, *FOLDERS], metavar="CASE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=None, choices=DTYPES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compiled", action="store_true", help="both sides compile their repeated blocks")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    cases = FULL_CASES if on_gpu else CASES
    if arguments.worker:
        name, side, dtype = arguments.worker
        print(json.dumps(work(cases[name], side, Setting(DTYPES[dtype], device, arguments.compiled))))
        return
    results = "public_models_gpu" if on_gpu else "public_models"
    label = {"compiled": True} if arguments.compiled else {}
    for name in arguments.only or [*cases, *([] if on_gpu else FOLDERS)]:
        for dtype in arguments.dtypes or (["bf16"] if on_gpu else ["bf16", "fp32"]):
            if name in FOLDERS:
                rows = measure_folder(name, dtype, arguments.rounds)
            else:
                act = partial(apart, name, dtype=dtype, arguments=arguments)
                both = compare(name, dtype, arguments.rounds, lambda side, act=act: act(side=side))
                rows = [{**row, **cases[name].shape} for row in both]
            here = {key: value for key, value in machine(device).items() if key in ("commit", "huge_pages")}
            rows = [{**row, **label, **here} for row in rows]
            with redirect_stdout(None):  # the new ones are said already
                write_results(results, device, [*earlier_rows(results, rows, "what", "dtype", "compiled"), *rows])


if __name__ == "__main__":
    main()
