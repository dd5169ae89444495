"""How time and memory grow with the length and the size of a clip: denoiser call and decoding, pocket model.

    python benchmarks/growth.py [--device cpu] [--model pocket]

Each point runs in a process of its own, so that peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch
from measure import peak_memory_bytes, timed, write_results

from vitascope.core.random import generator
from vitascope.core.shapes import ClipFormat
from vitascope.diffusion.guidance import GuidedDenoiser
from vitascope.models.codecs.causal_video.model import CausalVideoCodec
from vitascope.models.codecs.causal_video.stream import decode_progressively
from vitascope.models.codecs.causal_video.tiling import decode_tiled
from vitascope.nn.tiling import Tiling
from vitascope.tasks.known import start_tracks
from vitascope.tasks.load import load_pipeline
from vitascope.tasks.request import Given

POINTS = [(128, 25), (128, 49), (128, 97), (128, 193), (256, 25), (384, 25), (512, 25)]


@torch.no_grad()
def point(model: str, device: str, side_px: int, num_frames: int, decoder: str) -> dict[str, Any]:
    """One size and length: seconds of a denoiser call (batch 1, no guidance) and of decoding, and peak memory."""
    pipeline = load_pipeline(model, device)
    fmt = ClipFormat(side_px, side_px, num_frames=num_frames)
    tracks = start_tracks(pipeline, fmt, Given(), 0)
    with torch.autocast(pipeline.device.type, torch.bfloat16):
        text = pipeline.text_encoder(["a red ball bounces on a gray background"])
    guided = GuidedDenoiser(pipeline.denoiser, pipeline.path, text)
    codec = pipeline.video_codec
    assert isinstance(codec, CausalVideoCodec)
    latents = torch.randn(tracks["video"].values.shape, generator=generator(0, "growth")).to(pipeline.device)

    def decode() -> None:
        if decoder == "whole":
            codec.decode(latents)
        elif decoder == "tiled":
            decode_tiled(codec, latents, Tiling(16, 6))
        else:
            for _ in decode_progressively(codec, latents):
                pass

    row: dict[str, Any] = {"side_px": side_px, "num_frames": num_frames, "decoder": decoder}
    with torch.autocast(pipeline.device.type, torch.bfloat16):
        if decoder == "whole":
            row["denoiser_call_s"] = timed(lambda: guided(tracks), repeats=5, warmup=1).median_s
        row["decode_s"] = timed(decode, repeats=3, warmup=1).median_s
    row["peak_memory_bytes"] = peak_memory_bytes(pipeline.device)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        side_px, num_frames, decoder = arguments.point
        print(json.dumps(point(arguments.model, arguments.device, int(side_px), int(num_frames), decoder)))
        return
    rows = []
    for side_px, num_frames in POINTS:
        for decoder in ("whole", "streamed", "tiled"):
            command = [sys.executable, __file__, "--model", arguments.model, "--device", arguments.device]
            command += ["--point", str(side_px), str(num_frames), decoder]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    write_results("growth", torch.device(arguments.device), rows)


if __name__ == "__main__":
    main()
