"""What a step cache skips and what that costs: the same clips with all blocks at every step, and with fewer.

    python benchmarks/step_cache.py [--model pocket] [--cache first_block:0.05 tea:0.1 ...] [--clips 4]

For each setting: the share of block evaluations that were skipped, the time of denoising against that of the plain run,
and how far the clips are from the plain ones: relative error of the latents and PSNR of the frames. A second seed's
clips stand beside them for scale: what another draw of noise changes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from measure import write_results
from torch import Tensor

from vitascope.caches.steps import StepCaching
from vitascope.core.tracks import VIDEO
from vitascope.diffusion.samplers import Step
from vitascope.tasks.generate import generate
from vitascope.tasks.load import load_pipeline
from vitascope.tasks.pipeline import Pipeline
from vitascope.tasks.request import GenerateRequest

PROMPTS = (
    "a red ball bounces on a gray background",
    "a blue box moves left over green hills",
    "a green triangle spins, the camera zooms in",
    "a yellow star circles under a starry sky",
)
CACHES = ("first_block:0.1", "first_block:0.2", "first_block:0.3", "first_block:0.5", "tea:0.1", "tea:0.2")


@dataclass(frozen=True)
class Made:
    """One clip: its last latents, its frames, the seconds of denoising and the share of blocks skipped."""

    latents: Tensor
    frames: Tensor
    denoise_s: float
    skipped_share: float


def make(pipeline: Pipeline, request: GenerateRequest) -> Made:
    steps: list[Step] = []
    made = generate(pipeline, request, steps.append)
    latents = steps[-1].tracks[VIDEO].values.float().cpu()
    return Made(latents, made.clip.frames, made.seconds["denoise"], made.skipped_share)


def compare(name: str, made: Sequence[Made], plain: Sequence[Made]) -> dict[str, Any]:
    """A row of means over clips."""
    num = len(plain)
    errors = [float((a.latents - b.latents).norm() / b.latents.norm()) for a, b in zip(made, plain, strict=True)]
    return {
        "what": name,
        "skipped_share": sum(clip.skipped_share for clip in made) / num,
        "relative_time": sum(clip.denoise_s for clip in made) / sum(clip.denoise_s for clip in plain),
        "latents_relative_error": sum(errors) / num,
        "psnr_db": sum(psnr(a.frames, b.frames) for a, b in zip(made, plain, strict=True)) / num,
    }


def psnr(frames: Tensor, reference: Tensor) -> float:
    """Of frames uint8, in dB; 100 for equal ones."""
    error = float((frames.float() - reference.float()).square().mean())
    return 100.0 if error == 0 else min(100.0, 10 * float(torch.tensor(255.0**2 / error).log10()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--cache", nargs="+", default=list(CACHES), help="KIND:THRESHOLD, of several settings")
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--steps", type=int, default=None)
    arguments = parser.parse_args()
    pipeline = load_pipeline(arguments.model, arguments.device, arguments.precision)
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(arguments.clips)]
    requests = [
        GenerateRequest(prompt, format=pipeline.defaults.clip, seed=seed, num_inference_steps=arguments.steps)
        for seed, prompt in enumerate(prompts)
    ]
    make(pipeline, requests[0])  # warm-up
    made: dict[str, list[Made]] = {}
    for request in requests:  # all settings in turn, so that what slows the machine slows all of them
        made.setdefault("plain", []).append(make(pipeline, request))
        made.setdefault("another seed", []).append(make(pipeline, replace(request, seed=request.seed + 1000)))
        for text in arguments.cache:
            cached = replace(request, step_cache=StepCaching.parse(text))
            made.setdefault(text, []).append(make(pipeline, cached))
    rows = [compare(name, clips, made["plain"]) for name, clips in made.items()]
    write_results("step_cache", pipeline.device, rows, model=arguments.model, clips=arguments.clips)


if __name__ == "__main__":
    main()
