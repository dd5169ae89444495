"""How well a limit of memory is kept and foretold: a Wan pipeline with random weights under several limits.

    python benchmarks/memory.py [--device cpu] [--limits 1.6GB 700MB 450MB] [--lossy]

Each limit runs in a process of its own, which says what it predicted for every stage and what it measured: on a GPU
what the allocator gave out at most, on a CPU the growth of the memory that the process holds for itself. The codec has
the channels of the published one; the denoiser, of 0.6 GB, is large against what is worked out with it. Limits count
from the start of the process's models, without the interpreter and its libraries; the room that is left is less by what
planning leaves behind.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import write_results
from torch import nn

from vitascope.core.errors import InputError
from vitascope.core.freed_memory import return_freed_memory
from vitascope.core.memory import held_bytes, parse_bytes
from vitascope.core.shapes import ClipFormat
from vitascope.core.tracks import TextContext
from vitascope.diffusion.guidance import Guidance
from vitascope.diffusion.paths import RectifiedFlow
from vitascope.models.codecs.wan.config import WanCodecConfig
from vitascope.models.codecs.wan.model import WanCodec
from vitascope.models.offload.stores import FileStore, same_names
from vitascope.models.wan.config import WanConfig
from vitascope.models.wan.model import WanDenoiser
from vitascope.tasks.fitting import MemoryLimit, fit_parts
from vitascope.tasks.footprint import TextCost
from vitascope.tasks.generate import generate
from vitascope.tasks.pipeline import Defaults, Pipeline
from vitascope.tasks.request import GenerateRequest
from vitascope.weights.checkpoint import save_checkpoint
from vitascope.weights.sources import open_source

CONFIG = WanConfig(width=1024, depth=8, num_heads=8, hidden=4096, text_width=1024)
SIZE = (192, 128, 9)
"""Width and height in px, and frames."""
NUM_WORDS, NUM_STEPS = 512, 2


class RandomWords:
    """A text encoder without weights."""

    def __call__(self, prompts: Sequence[str]) -> TextContext:
        """Embeddings that depend on the number of prompts alone."""
        draw = torch.Generator().manual_seed(0)
        words = torch.randn(len(prompts), NUM_WORDS, CONFIG.text_width, generator=draw)
        return TextContext(words, torch.ones(words.shape[:2], dtype=torch.bool))


def write_weights(folder: Path) -> None:
    """Random weights of both parts."""
    parts: dict[str, nn.Module] = {"denoiser": WanDenoiser(CONFIG), "video_codec": WanCodec(WanCodecConfig())}
    for name, module in parts.items():
        save_checkpoint(folder / f"{name}.safetensors", module.state_dict(), name, {})


def pipeline_in(folder: Path, device: torch.device, fmt: ClipFormat, limit: MemoryLimit) -> Pipeline:
    """The pipeline of `write_weights` under a limit."""
    with torch.device("meta"):
        denoiser: Any = WanDenoiser(CONFIG).eval().requires_grad_(False)
        codec: Any = WanCodec(WanCodecConfig()).eval().requires_grad_(False)
    stores = {}
    for name, module in (("denoiser", denoiser), ("video_codec", codec)):
        source = open_source(folder / f"{name}.safetensors")
        stores[name] = FileStore(module.state_dict(), source, same_names(source))
    defaults = Defaults(fmt, NUM_STEPS, Guidance(5.0), "euler")
    pipeline = Pipeline(
        "wan", denoiser, RandomWords(), codec, None, RectifiedFlow(), defaults, device, torch.float32, (2, 2)
    )
    return fit_parts(pipeline, stores, limit, text=TextCost(0, NUM_WORDS, CONFIG.text_width, 0, 0))


def warm_up(device: torch.device) -> None:
    """Load the libraries that kernels come from: their memory is not that of a model."""
    with torch.no_grad():
        image = torch.randn(1, 8, 4, 16, 16, device=device)
        nn.Conv3d(8, 8, 3, device=device)(image)
        nn.Conv2d(8, 8, 3, device=device)(image[:, :, 0])
        nn.Linear(16, 16, device=device)(image)
        nn.functional.scaled_dot_product_attention(image, image, image)


def point(folder: Path, device: torch.device, fmt: ClipFormat, limit: int, lossy: bool) -> dict[str, Any]:
    """A clip under a limit of `limit` bytes for models and what is worked out with them."""
    return_freed_memory()
    warm_up(device)
    try:
        pipeline = pipeline_in(folder, device, fmt, MemoryLimit(held_bytes(device) + limit, lossy))
        use = generate(pipeline, GenerateRequest("a red ball", format=fmt)).memory
    except InputError as error:
        return {"limit_bytes": limit, "refused": str(error)}
    assert use is not None
    predicted = {stage.name: stage.total for stage in use.plan.stages}
    measured = {name: use.measured[name] for name in predicted}
    peak = max(measured.values())
    return {
        "limit_bytes": limit,
        "room_bytes": use.plan.limit,
        "plan": use.plan.choices(),
        "predicted_peak_bytes": use.plan.peak,
        "measured_peak_bytes": peak,
        "error": use.plan.peak / peak - 1,
        "kept": peak <= use.plan.limit,
        "predicted_bytes": predicted,
        "measured_bytes": measured,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limits", nargs="+", default=["2GB", "900MB", "600MB"])
    parser.add_argument("--lossy", action="store_true", help="let layers be kept in fp8")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--size", nargs=3, type=int, default=SIZE, metavar=("WIDTH", "HEIGHT", "FRAMES"))
    arguments = parser.parse_args()
    width, height, num_frames = arguments.size
    device = torch.device(arguments.device)
    if arguments.point:
        folder, limit = arguments.point
        fmt = ClipFormat(width, height, 16.0, num_frames)
        print(json.dumps(point(Path(folder), device, fmt, int(limit), arguments.lossy)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        write_weights(Path(name))
        for limit in map(parse_bytes, arguments.limits):
            command = [sys.executable, __file__, "--device", arguments.device, "--point", name, str(limit)]
            command += ["--size", *map(str, arguments.size)]
            command += ["--lossy"] if arguments.lossy else []
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    shapes = {"width": width, "height": height, "num_frames": num_frames}
    write_results("memory", device, rows, shapes=shapes, denoiser_depth=CONFIG.depth, denoiser_width=CONFIG.width)


if __name__ == "__main__":
    main()
