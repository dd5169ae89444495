"""Where the time of a clip goes: whole command, stages, steps a second, and the share of the matrix-product rate.

    python benchmarks/generation.py [--batch 1 4 8] [--device cpu] [--model pocket]

The share counts the operations of matrix products and attention in one call of the denoiser (the analytic count that a
test checks against PyTorch's own counter) over the time of that call, against a 2048 x 2048 product in the same
precision on the same threads.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import matrix_rate, peak_memory_bytes, timed, write_results

from vitascope.core.shapes import num_audio_latents
from vitascope.core.tracks import AUDIO, VIDEO, TextContext, Track
from vitascope.models.factorised.cost import LATENTS_PER_S, NUM_WORDS, STRIDES, forward_flops
from vitascope.models.factorised.model import FactorisedDenoiser
from vitascope.models.factorised.presets import PRESETS
from vitascope.tasks.generate import generate_batch
from vitascope.tasks.load import load_pipeline
from vitascope.tasks.request import GenerateRequest

PROMPT = "a red ball bounces on a gray background"


def whole_command(model: str, repeats: int) -> dict[str, Any]:
    """Wall time of `vitascope generate`, process start and file included."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            start = time.perf_counter()
            command = [sys.executable, "-m", "vitascope", "generate", PROMPT, "--model", model]
            command += ["--output", str(Path(folder) / "clip.mp4")]
            subprocess.run(command, check=True, capture_output=True)
            seconds.append(time.perf_counter() - start)
    return {"what": "whole command", "median_s": sorted(seconds)[len(seconds) // 2], "worst_s": max(seconds)}


def stages(model: str, device: str, batch: int, repeats: int) -> dict[str, Any]:
    """Median seconds of every stage of a batch of clips with default settings."""
    pipeline = load_pipeline(model, device)
    requests = [GenerateRequest(PROMPT, format=pipeline.defaults.clip, seed=seed) for seed in range(batch)]
    generate_batch(pipeline, requests)
    runs = [generate_batch(pipeline, requests)[0].seconds for _ in range(repeats)]
    middle = {f"{name}_s": sorted(run[name] for run in runs)[repeats // 2] for name in runs[0]}
    steps = pipeline.defaults.num_inference_steps
    return {
        "what": "stages",
        "batch": batch,
        "num_steps": steps,
        **middle,
        "steps_per_s": steps / middle["denoise_s"],
        "clips_per_s": batch / sum(middle.values()),
        "peak_memory_bytes": peak_memory_bytes(pipeline.device),
    }


def denoising(device: torch.device, preset: str, side_px: int, batch: int, compiled: bool) -> dict[str, Any]:
    """One call of the denoiser in bf16 against the matrix-product rate."""
    config = PRESETS[preset]
    rows = side_px // STRIDES.height
    model: Any = FactorisedDenoiser(config).eval().requires_grad_(False).to(device, torch.bfloat16)
    num_audio = num_audio_latents(25 / 12, LATENTS_PER_S, config.audio_patch)
    tracks = {
        VIDEO: _track(batch, (config.video_channels, 7, rows, rows), device),
        AUDIO: _track(batch, (config.audio_channels, num_audio), device),
    }
    text = TextContext(
        torch.randn(batch, NUM_WORDS, config.text_width, device=device, dtype=torch.bfloat16),
        torch.ones(batch, NUM_WORDS, dtype=torch.bool, device=device),
    )
    flops = forward_flops(config, batch, 7, rows, rows, num_audio, NUM_WORDS)
    if compiled:
        for part in model.regions:
            part.compile(dynamic=False)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        timing = timed(lambda: model(tracks, text), repeats=15, warmup=3)
    ceiling = matrix_rate(torch.bfloat16, device)
    return {
        "what": "denoiser call, bf16" + (", compiled" if compiled else ""),
        "preset": preset,
        "side_px": side_px,
        "batch": batch,
        "call": timing,
        "gflop": flops / 1e9,
        "gflop_per_s": flops / timing.median_s / 1e9,
        "ceiling_gflop_per_s": ceiling / 1e9,
        "share": flops / timing.median_s / ceiling,
        "peak_memory_bytes": peak_memory_bytes(device),
    }


def _track(batch: int, shape: tuple[int, ...], device: torch.device) -> Track:
    values = torch.randn(batch, *shape, device=device, dtype=torch.bfloat16)
    noise = torch.full((batch, 1, shape[1], *[1] * (len(shape) - 2)), 0.5, device=device)
    times = torch.arange(shape[1], device=device, dtype=torch.float32)
    return Track(values, noise, (times + 0.5) / (50 if len(shape) == 2 else 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 32])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled calls")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rows = [whole_command(arguments.model, arguments.repeats)]
    rows += [stages(arguments.model, arguments.device, batch, arguments.repeats) for batch in arguments.batch]
    for compiled in (False,) if arguments.no_compile else (False, True):
        rows += [denoising(device, "pocket", 128, batch, compiled) for batch in arguments.batch]
        rows += [denoising(device, "small", 256, batch, compiled) for batch in (1, 4)]
    write_results("generation", device, rows)


if __name__ == "__main__":
    main()
