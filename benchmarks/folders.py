"""Folders of pipelines with random weights, as diffusers writes them, and processes of both sides that make clips of
them: a fifth of a published denoiser, the whole codec, and a small text encoder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peers import CODECS, TRANSFORMERS, peer

TEXT_WIDTH, NUM_WORDS = 512, 100
DENOISERS: dict[str, dict[str, Any]] = {
    "wan": {
        "num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 6, "text_dim": TEXT_WIDTH,
    },
    "ltx": {
        "num_attention_heads": 32, "attention_head_dim": 64, "num_layers": 6, "cross_attention_dim": 2048,
        "caption_channels": TEXT_WIDTH,
    },
    "mochi": {"num_attention_heads": 24, "attention_head_dim": 64, "num_layers": 6, "text_embed_dim": TEXT_WIDTH,
              "pooled_projection_dim": 768},
}  # fmt: skip
"""Widths of Wan 1.3B and LTX-Video 2B, and half that of Mochi 1; few layers."""


def _scheduler(family: str) -> Any:
    if family == "wan":
        kind = peer("UniPCMultistepScheduler")
        return kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return peer("FlowMatchEulerDiscreteScheduler")(invert_sigmas=family == "mochi")


def write_folder(family: str, root: Path) -> None:
    """The pipeline of a family, about a gigabyte in all; the denoiser and text encoder in bf16."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

    shape: dict[str, Any] = {
        "vocab_size": 32_000,
        "d_model": TEXT_WIDTH,
        "d_kv": 64,
        "d_ff": 1024,
        "num_heads": 8,
        "num_layers": 4,
    }
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁w{i}", -float(i)) for i in range(NUM_WORDS))]
    text: Any = UMT5EncoderModel(UMT5Config(**shape)) if family == "wan" else T5EncoderModel(T5Config(**shape))
    name = {"wan": "WanPipeline", "ltx": "LTXPipeline", "mochi": "MochiPipeline"}[family]
    torch.manual_seed(0)
    peer(name)(
        transformer=peer(TRANSFORMERS[family])(**DENOISERS[family]).to(torch.bfloat16),
        vae=peer(CODECS[family])(),
        text_encoder=text.to(torch.bfloat16),
        tokenizer=T5Tokenizer(vocab=pieces, extra_ids=0),
        scheduler=_scheduler(family),
    ).save_pretrained(root)


START = """
import json, os, sys, time
begin = time.perf_counter()
folder, dtype, prompt, steps, width, height, frames = sys.argv[1:8]
"""
START_OURS = (
    START
    + """
from vitascope.tasks.load import load_pipeline
pipeline = load_pipeline(folder, "cpu", dtype)
if prompt and steps == "0":
    pipeline.text_encoder([prompt])
loaded = time.perf_counter() - begin
if int(steps):
    from vitascope.core.shapes import ClipFormat
    from vitascope.tasks.generate import generate
    from vitascope.tasks.request import GenerateRequest
    fmt = ClipFormat(int(width), int(height), 24.0, int(frames))
    request = GenerateRequest(prompt, format=fmt, num_inference_steps=int(steps), guidance_scale=5.0)
    frames = generate(pipeline, request).clip.frames
"""
)
START_THEIRS = (
    START
    + """
import diffusers, torch
kind = getattr(diffusers, json.load(open(os.path.join(folder, "model_index.json")))["_class_name"])
dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
pipeline = kind.from_pretrained(folder, torch_dtype=dtype)
pipeline.set_progress_bar_config(disable=True)
if prompt and steps == "0":
    pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
loaded = time.perf_counter() - begin
if int(steps):
    frames = pipeline(
        prompt=prompt, negative_prompt="", width=int(width), height=int(height), num_frames=int(frames),
        num_inference_steps=int(steps), guidance_scale=5.0, output_type="np",
    ).frames
"""
)
END = """
mark = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"load_s": loaded, "rise_bytes": 1024 * int(mark.split()[1])}))
"""


def whole(folder: Path, side: str, dtype: str, prompt: str, steps: int, size: tuple[int, int, int]) -> dict[str, Any]:
    """A process that imports, loads, reads a prompt and makes a clip (none for 0 steps): seconds of the whole process
    and of what comes before the clip, and the highest resident memory. Embeddings of prompts are not kept."""
    program = (START_OURS if side == "vitascope" else START_THEIRS) + END
    frames, height, width = size
    arguments = [str(folder), dtype, prompt, *map(str, (steps, width, height, frames))]
    with tempfile.TemporaryDirectory() as cache:
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], check=True, capture_output=True, text=True,
            env={**os.environ, "XDG_CACHE_HOME": cache},
        )  # fmt: skip
        seconds = time.perf_counter() - begin
    said = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": [seconds], "load_s": said["load_s"], "rise_bytes": said["rise_bytes"]}
