"""Public models against diffusers on the same random weights: denoising steps, codecs, and the start of a process.

    python benchmarks/public_models.py [--only "wan step" ...] [--rounds 3] [--dtypes bf16 fp32]

Every figure is of a process of its own, ours and theirs in turn, `--rounds` times each; figures of other cases that the
results hold already stay, with the commit that they are of. A step is what a sampler does
once: both branches of guidance, the guided velocity, and the sampler's own arithmetic; ours has the text's keys and
values ready, as a clip has from its first step on. Memory is how far the resident memory rises while the work runs.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, machine, write_results

Run = Callable[[], object]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GUIDANCE, WORDS = 5.0, {"wan": 512, "ltx": 128, "mochi": 256}


@dataclass(frozen=True)
class Case:
    """make(side, dtype): what to time. family: of the denoiser or codec. shape: what is said of it in the results."""

    make: Callable[[str, torch.dtype], Run]
    shape: dict[str, Any]
    repeats: int = 3


def _random(model: Any) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model.eval().requires_grad_(False)


# Denoising steps

STEPS = {
    "wan": ("WanTransformer3DModel", {
        "num_attention_heads": 12, "attention_head_dim": 64, "ffn_dim": 3072, "num_layers": 6, "text_dim": 4096,
    }, (16, 13, 40, 36)),
    "ltx": ("LTXVideoTransformer3DModel", {
        "num_attention_heads": 12, "attention_head_dim": 64, "cross_attention_dim": 768, "num_layers": 6,
    }, (128, 13, 20, 18)),
    "mochi": ("MochiTransformer3DModel", {
        "num_attention_heads": 12, "attention_head_dim": 64, "num_layers": 6, "pooled_projection_dim": 384,
    }, (12, 13, 40, 36)),
}  # fmt: skip
"""Class in diffusers, configuration, and latents (C, T, h, w) of 4,680 tokens."""


def _peer(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)


def step(family: str, side: str, dtype: torch.dtype) -> Run:
    """One guided step of a clip."""
    name, config, shape = STEPS[family]
    latents = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    text = torch.randn(2, WORDS[family], 4096, generator=torch.Generator().manual_seed(2)).to(dtype)
    model = _random(_peer(name)(**config))
    if side == "diffusers":
        return _their_step(family, model.to(dtype), latents, text)
    return _our_step(family, model, latents, text, dtype)


def _our_step(family: str, theirs: Any, latents: torch.Tensor, text: torch.Tensor, dtype: torch.dtype) -> Run:
    from vitascope.core.tracks import VIDEO, TextContext, Track
    from vitascope.diffusion.guidance import Guidance, GuidedDenoiser, busy_values
    from vitascope.diffusion.paths import RectifiedFlow
    from vitascope.diffusion.samplers import sampler_named
    from vitascope.models import named
    from vitascope.models.parts import Part
    from vitascope.models.published import PUBLISHED
    from vitascope.weights.sources import MemorySource

    published = PUBLISHED[type(theirs).__name__]
    config = named(published.config)(dict(theirs.config))
    part = Part(published.family, "diffusers", config, named(published.keys)(config), MemorySource(theirs.state_dict()))
    model: Any = part.load(dtype=dtype)
    mask = torch.ones(1, text.shape[1], dtype=torch.bool)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32)
    with torch.no_grad(), autocast:
        cond, uncond = (model.prepare(TextContext(text[i : i + 1], mask)) for i in range(2))
    guided = GuidedDenoiser(
        model, RectifiedFlow(), cond, uncond, Guidance(GUIDANCE), busy_values=busy_values(torch.device("cpu"))
    )
    noise = torch.ones(1, 1, *[1] * (latents.ndim - 2)) * 0.9
    track = Track(latents, noise, torch.arange(latents.shape[2]) / 3.0)

    def run() -> None:
        with torch.no_grad(), autocast:
            next(iter(sampler_named("euler")(guided, {VIDEO: track}, [0.9, 0.8], path=RectifiedFlow())))

    return run


def _their_step(family: str, model: Any, latents: torch.Tensor, text: torch.Tensor) -> Run:
    """As the pipelines of diffusers do it: Wan calls the model twice, the others once with both branches."""
    dtype = text.dtype
    hidden = latents.to(dtype)

    def call(hidden: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        times = torch.full((len(hidden),), 900.0)
        if family == "wan":
            return model(hidden, times, words, return_dict=False)[0]
        mask = torch.ones(words.shape[:2])
        if family == "mochi":
            return model(hidden, words, times, mask.bool(), return_dict=False)[0]
        frames, rows, columns = hidden.shape[2:]
        packed = hidden.flatten(2).transpose(1, 2)
        scale = (8 / 25, 32, 32)
        out = model(packed, words, times, mask, frames, rows, columns, scale, return_dict=False)[0]
        return out.transpose(1, 2).unflatten(2, (frames, rows, columns))

    def run() -> None:
        with torch.no_grad():
            if family == "wan":
                cond, uncond = call(hidden, text[:1]), call(hidden, text[1:])
            else:
                cond, uncond = call(hidden.expand(2, *hidden.shape[1:]), text).chunk(2)
            velocity = uncond.float() + GUIDANCE * (cond.float() - uncond.float())
            latents.add(velocity, alpha=-0.1)

    return run


# Codecs

CODECS = {"wan": "AutoencoderKLWan", "ltx": "AutoencoderKLLTXVideo", "mochi": "AutoencoderKLMochi"}


def codec(family: str, way: str, frames: int, side_px: int, side: str, dtype: torch.dtype) -> Run:
    """Encoding or decoding of a clip by the codec of full size."""
    theirs = _random(_peer(CODECS[family])())
    from vitascope.models import named
    from vitascope.models.parts import Part
    from vitascope.models.published import PUBLISHED
    from vitascope.weights.sources import MemorySource

    published = PUBLISHED[CODECS[family]]
    config = named(published.config)(dict(theirs.config))
    strides = config.strides
    video = torch.rand(1, 3, frames, side_px, side_px) * 2 - 1
    channels = theirs.config.get("z_dim", theirs.config.get("latent_channels"))
    rows = side_px // strides.height
    latents = torch.randn(1, channels, 1 + (frames - 1) // strides.time, rows, rows)
    if side == "diffusers":
        model = theirs.to(dtype)
        if way == "encode":
            return _without_gradients(lambda: model.encode(video.to(dtype)).latent_dist.mode())
        return _without_gradients(lambda: model.decode(latents.to(dtype), return_dict=False)[0])
    keys = named(published.keys)(config)
    ours: Any = Part(published.family, "diffusers", config, keys, MemorySource(theirs.state_dict())).load(dtype=dtype)
    del theirs
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32)
    given, act = (video, ours.encode) if way == "encode" else (latents, ours.decode)

    def run() -> None:
        with autocast:
            act(given)

    return _without_gradients(run)


def _without_gradients(run: Run) -> Run:
    def quiet() -> None:
        with torch.no_grad():
            run()

    return quiet


# The start of a process

START_OURS = """
import sys
from vitascope.tasks.load import load_pipeline
pipeline = load_pipeline(sys.argv[1], "cpu", sys.argv[2])
if sys.argv[3]:
    pipeline.text_encoder([sys.argv[3]])
"""
START_THEIRS = """
import sys, torch
from diffusers import WanPipeline
dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[sys.argv[2]]
pipeline = WanPipeline.from_pretrained(sys.argv[1], torch_dtype=dtype)
if sys.argv[3]:
    pipeline.encode_prompt(sys.argv[3], do_classifier_free_guidance=False)
"""
STARTS = {"wan start": "", "wan start, a prompt read": "w1 w2 w3"}
"""What is read after loading. Ours opens the text encoder for the first prompt that it has no embedding of."""


def start_folder(root: Path) -> None:
    """A Wan pipeline of about a gigabyte: a fifth of the layers of 1.3B, the whole codec, a small text encoder."""
    from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁w{i}", -float(i)) for i in range(100))]
    text: Any = UMT5EncoderModel(
        UMT5Config(vocab_size=32_000, d_model=512, d_kv=64, d_ff=1024, num_heads=8, num_layers=4)
    )
    transformer = _peer("WanTransformer3DModel")(
        num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=6, text_dim=512
    )
    scheduler = _peer("UniPCMultistepScheduler")
    _peer("WanPipeline")(
        transformer=transformer.to(torch.bfloat16),
        vae=_peer("AutoencoderKLWan")(),
        text_encoder=text.to(torch.bfloat16),
        tokenizer=T5Tokenizer(vocab=pieces, extra_ids=0),
        scheduler=scheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    ).save_pretrained(root)


def start(folder: Path, prompt: str, side: str, dtype: str) -> dict[str, float]:
    """Wall time of a process that imports and loads a pipeline, reads a prompt if there is one, and ends."""
    program = START_OURS if side == "vitascope" else START_THEIRS
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", program, str(folder), dtype, prompt], check=True, capture_output=True)
    return {"seconds": time.perf_counter() - begin}


# Running

CASES = {
    **{f"{family} step": Case(lambda side, dtype, family=family: step(family, side, dtype),
                              {"tokens": 4680, "width": 768, "layers": 6, "words": WORDS[family]})
       for family in STEPS},
    **{f"{family} {way}": Case(
        lambda side, dtype, family=family, way=way, frames=frames: codec(family, way, frames, 256, side, dtype),
        {"frames": frames, "px": 256})
       for family, frames in (("wan", 17), ("ltx", 33), ("mochi", 13)) for way in ("encode", "decode")},
}  # fmt: skip


def work(case: Case, side: str, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of each run and the rise of resident memory in the first, in this process."""
    run = case.make(side, dtype)
    gc.collect()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
    run()
    rise = _resident("VmHWM") - before
    seconds = []
    for _ in range(case.repeats):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return {"seconds": statistics.median(seconds), "rise_bytes": rise}


def _resident(mark: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(mark)).split()[1])


def compare(name: str, dtype: str, rounds: int, run: Callable[[str], dict[str, float]]) -> list[dict[str, Any]]:
    """Rows of both sides, in turn."""
    found: dict[str, list[dict[str, float]]] = {"vitascope": [], "diffusers": []}
    for _ in range(rounds):
        for side, results in found.items():
            results.append(run(side))
    rows = []
    for side, results in found.items():
        seconds = [result["seconds"] for result in results]
        row: dict[str, Any] = {"what": name, "side": side, "dtype": dtype, "median_s": statistics.median(seconds)}
        row |= {"worst_s": max(seconds), "rounds": rounds}
        if "rise_bytes" in results[0]:
            row["rise_bytes"] = statistics.median(result["rise_bytes"] for result in results)
        rows.append(row)
    for key in ("median_s", "rise_bytes"):
        if key in rows[0]:
            rows[0][f"{key.partition('_')[0]}_ratio"] = rows[0][key] / rows[1][key]
    print("  ".join(f"{key}={value}" for key, value in rows[0].items()), flush=True)
    return rows


def apart(name: str, side: str, dtype: str) -> dict[str, float]:
    """`work` in a process of its own."""
    command = [sys.executable, __file__, "--worker", name, side, dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[*CASES, *STARTS])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=DTYPES)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        name, side, dtype = arguments.worker
        print(json.dumps(work(CASES[name], side, DTYPES[dtype])))
        return
    rows: list[dict[str, Any]] = []
    for name in arguments.only:
        for dtype in arguments.dtypes:
            if name in STARTS:
                with tempfile.TemporaryDirectory() as folder:
                    start_folder(Path(folder))
                    rows += compare(
                        name, dtype, arguments.rounds,
                        lambda side, folder=folder, name=name, dtype=dtype: start(
                            Path(folder), STARTS[name], side, dtype
                        ),
                    )  # fmt: skip
                continue
            both = compare(name, dtype, arguments.rounds, lambda side, name=name, dtype=dtype: apart(name, side, dtype))
            rows += [{**row, **CASES[name].shape} for row in both]
    device = torch.device("cpu")
    rows = [{**row, "commit": machine(device)["commit"]} for row in rows]
    write_results("public_models", device, [*_earlier(rows), *rows])


def _earlier(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the results that are not measured anew."""
    path = RESULTS / "public_models.json"
    anew = {(row["what"], row["dtype"]) for row in rows}
    known = json.loads(path.read_text())["rows"] if path.is_file() else []
    return [row for row in known if (row["what"], row["dtype"]) not in anew]


if __name__ == "__main__":
    main()
