"""How well a limit of memory is kept and foretold: public families with random weights, each under three limits.

    python benchmarks/memory.py [--only "wan" ...] [--device cpu] [--lossy]

Limits are the whole (what is predicted where nothing has to move, and a little more), the least (what is named where a
limit is refused, and a little more) and the middle of both. Each is kept in a process of its own, which loads a folder
as diffusers writes it, as the command does, and says what it predicted for every stage and what it measured: on a GPU
what the allocator gave out at most, on a CPU the growth of the memory that the process holds for itself. Codecs have
the channels of the published ones, LTX's and Mochi's half of them. Limits count from the start of the process's models,
without the interpreter and its libraries. Rows of other cases stay, with the commit that they are of.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from measure import earlier_rows, machine, write_results
from torch import nn

from vitascope.caches.steps import StepCaching
from vitascope.core.errors import InputError
from vitascope.core.freed_memory import return_freed_memory
from vitascope.core.memory import held_bytes, parse_bytes
from vitascope.core.shapes import ClipFormat
from vitascope.tasks.discover import UPSAMPLER
from vitascope.tasks.fitting import MemoryLimit
from vitascope.tasks.generate import generate
from vitascope.tasks.load import load_pipeline
from vitascope.tasks.lora import apply_loras
from vitascope.tasks.memory import MemoryPlan
from vitascope.tasks.request import GenerateRequest, Given, Keyframe
from vitascope.tasks.two_passes import generate_in_two_passes, load_upsampler

PROMPT = "a red ball"
SLACK = 1.02
"""Of limits, above what is predicted: processes do not start with the same to the byte."""
TOO_LITTLE = 180 * 10**6
"""More than is taken before a model, and less than any clip here takes."""
TEXT_WIDTH = 512
UPSAMPLERS = "diffusers.pipelines.ltx.modeling_latent_upsampler"


def _peer(name: str, package: str = "diffusers") -> Any:
    return getattr(import_module(package), name)


# Folders as diffusers writes them

HEADS = {"num_attention_heads": 16, "attention_head_dim": 64}
LTX_CODEC: dict[str, Any] = {
    "block_out_channels": (64, 128, 256, 256), "decoder_block_out_channels": (64, 128, 256, 256),
    "latent_channels": 128,
}  # fmt: skip
MOCHI_CODEC: dict[str, Any] = {
    "encoder_block_out_channels": (32, 64, 128, 192), "decoder_block_out_channels": (64, 128, 256, 384),
}  # fmt: skip


def _wan(**more: Any) -> nn.Module:
    return _peer("WanTransformer3DModel")(**HEADS, ffn_dim=4096, num_layers=7, text_dim=TEXT_WIDTH, **more)


def _ltx(**more: Any) -> nn.Module:
    return _peer("LTXVideoTransformer3DModel")(
        **HEADS, cross_attention_dim=1024, num_layers=7, caption_channels=TEXT_WIDTH, **more
    )


def _mochi(**more: Any) -> nn.Module:
    return _peer("MochiTransformer3DModel")(
        **HEADS, num_layers=6, pooled_projection_dim=512, text_embed_dim=TEXT_WIDTH, **more
    )


def _pictures() -> dict[str, Any]:
    """An encoder of pictures of 60 MB."""
    encoder = _peer("CLIPVisionModel", "transformers")(
        _peer("CLIPVisionConfig", "transformers")(
            hidden_size=512, intermediate_size=2048, num_hidden_layers=5, num_attention_heads=8, patch_size=14
        )
    )
    return {"image_encoder": encoder, "image_processor": _peer("CLIPImageProcessor", "transformers")()}


def _text(kind: str, layers: int) -> dict[str, Any]:
    """A T5 with 7.3 MB a layer and 61 MB of table, in bf16, and its tokeniser."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁w{i}", -float(i)) for i in range(100))]
    sizes = {"vocab_size": 60_000, "d_model": TEXT_WIDTH, "d_kv": 64, "d_ff": 1792, "num_heads": 8}
    config = _peer(f"{kind}Config", "transformers")(**sizes, num_layers=layers, feed_forward_proj="gated-gelu")
    encoder = _peer(f"{kind}EncoderModel", "transformers")(config)
    return {"text_encoder": encoder, "tokenizer": _peer("T5Tokenizer", "transformers")(vocab=pieces, extra_ids=0)}


# Cases


@dataclass(frozen=True)
class Case:
    """A pipeline of diffusers with what makes its denoiser and codec, the clip, and what is asked for beside it.

    text_layers: of its T5. cached: the prompts' embeddings are on the disk. lora: one for all layers is merged.
    keyframes: times of given pictures in s. passes: made small, its latents enlarged, and made anew.
    """

    pipeline: str
    denoiser: Callable[[], nn.Module]
    codec: tuple[str, dict[str, Any]]
    clip: ClipFormat
    precision: str = "fp32"
    text_layers: int = 2
    cached: bool = True
    lora: bool = False
    keyframes: tuple[float, ...] = ()
    passes: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    extra: Callable[[], dict[str, Any]] = dict

    @property
    def family(self) -> str:
        return self.pipeline.split("Pipeline")[0].replace("Condition", "").replace("ImageToVideo", "")

    def write(self, root: Path) -> None:
        """The folder, with random weights."""
        torch.manual_seed(0)
        name, settings = self.codec
        scheduler: Any
        if self.family == "Wan":
            scheduler = _peer("UniPCMultistepScheduler")(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            )
        else:
            scheduler = _peer("FlowMatchEulerDiscreteScheduler")(invert_sigmas=self.family == "Mochi")
        parts = {"transformer": self.denoiser(), "vae": _peer(name)(**settings), **self.extra()}
        parts |= _text("UMT5" if self.family == "Wan" else "T5", self.text_layers)
        for part in parts.values():
            if isinstance(part, nn.Module):
                for parameter in part.parameters():
                    nn.init.normal_(parameter, std=0.02)
        if self.precision == "bf16":
            parts["transformer"].to(torch.bfloat16)
        parts["text_encoder"].to(torch.bfloat16)
        if self.lora:
            _write_lora(root, parts["transformer"])
        if self.passes:
            _peer("LTXLatentUpsamplerModel", UPSAMPLERS)(mid_channels=256, num_blocks_per_stage=2).save_pretrained(
                root / UPSAMPLER
            )
        _peer(self.pipeline)(scheduler=scheduler, **parts).save_pretrained(root)

    def request(self) -> GenerateRequest:
        """The clip, in two steps unless more are asked for."""
        shape = (3, self.clip.height_px, self.clip.width_px)
        picture = torch.full(shape, 99, dtype=torch.uint8)
        given = Given(tuple(Keyframe(time, picture) for time in self.keyframes))
        settings = {"num_inference_steps": 2, **self.options}
        return GenerateRequest(PROMPT, format=self.clip, given=given, **settings)


def _write_lora(root: Path, model: Any) -> None:
    """Factors of rank 16 for every matrix inside the blocks."""
    from safetensors.torch import save_file

    factors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "blocks" in name:
            factors[f"transformer.{name}.lora_A.weight"] = 0.01 * torch.randn(16, module.in_features)
            factors[f"transformer.{name}.lora_B.weight"] = 0.01 * torch.randn(module.out_features, 16)
    root.mkdir(exist_ok=True)
    save_file(factors, root / "lora.safetensors")


STG = {"stg_scale": 1.0, "stg_layers": (3,)}
WAN = Case("WanPipeline", _wan, ("AutoencoderKLWan", {}), ClipFormat(192, 96, 16.0, 9))
WAN_IMAGE = replace(
    WAN, pipeline="WanImageToVideoPipeline", keyframes=(0.0,), extra=_pictures,
    denoiser=lambda: _wan(in_channels=36, out_channels=16, image_dim=512, added_kv_proj_dim=1024),
)  # fmt: skip
LTX = Case("LTXPipeline", _ltx, ("AutoencoderKLLTXVideo", LTX_CODEC), ClipFormat(320, 192, 24.0, 33))
MOCHI = Case("MochiPipeline", _mochi, ("AutoencoderKLMochi", MOCHI_CODEC), ClipFormat(192, 128, 24.0, 13))
CASES: dict[str, Case] = {
    "wan": WAN,
    "wan bf16": replace(WAN, precision="bf16"),
    "wan text": replace(WAN, text_layers=28, cached=False),
    "wan long": replace(WAN, codec=("AutoencoderKLWan", {"base_dim": 48}), clip=ClipFormat(192, 128, 16.0, 33)),
    "wan options": replace(
        WAN, lora=True, options={"step_cache": StepCaching("first_block", 0.05), **STG, "num_inference_steps": 3}
    ),
    "wan image": WAN_IMAGE,
    "wan image bf16": replace(WAN_IMAGE, precision="bf16"),
    "ltx": LTX,
    "ltx options": replace(
        LTX, pipeline="LTXConditionPipeline", keyframes=(0.0, 1.0), lora=True,
        options={"step_cache": StepCaching("tea", 0.05), **STG, "stg_by": "block", "num_inference_steps": 3},
    ),
    "ltx in two passes": replace(LTX, clip=ClipFormat(576, 384, 24.0, 33), passes=True),
    "mochi": MOCHI,
    "mochi options": replace(MOCHI, lora=True, options={"step_cache": StepCaching("first_block", 0.05), **STG}),
}  # fmt: skip


# A point


def warm_up(device: torch.device) -> None:
    """Load the libraries that kernels come from: their memory is not that of a model."""
    with torch.no_grad():
        image = torch.randn(1, 8, 4, 16, 16, device=device)
        nn.Conv3d(8, 8, 3, device=device)(image)
        nn.Conv2d(8, 8, 3, device=device)(image[:, :, 0])
        nn.Linear(16, 16, device=device)(image)
        nn.functional.scaled_dot_product_attention(image, image, image)


class _Enough(Exception):
    """The plan is known, and nothing else was asked for."""

    def __init__(self, plan: MemoryPlan) -> None:
        super().__init__()
        self.plan = plan


def _enough(plan: MemoryPlan) -> None:
    raise _Enough(plan)


def point(case: Case, folder: Path, device: torch.device, limit: int, lossy: bool, dry: bool) -> dict[str, Any]:
    """A clip under a limit of `limit` bytes for models and what is worked out with them; `dry`: its plan's peak."""
    return_freed_memory()
    warm_up(device)
    kept = MemoryLimit(held_bytes(device) + limit, lossy, _enough if dry else lambda plan: None)
    try:
        pipeline = load_pipeline(
            str(folder), str(device), case.precision, text_cache=folder / "texts" if case.cached else None, memory=kept
        )
        pipeline = apply_loras(pipeline, [str(folder / "lora.safetensors")] if case.lora else [])
        if case.passes:
            upsampler = load_upsampler(folder, device, memory=pipeline.memory)
            use = generate_in_two_passes(pipeline, upsampler, case.request()).memory
        else:
            use = generate(pipeline, case.request()).memory
    except _Enough as enough:
        plan = enough.plan
        return {"peak": plan.peak, "taken": limit - plan.limit}
    except InputError as error:
        return {"limit_bytes": limit, "refused": str(error), "before": kept.num_bytes - limit}
    assert use is not None
    print("\n".join(use.lines()), file=sys.stderr, flush=True)
    predicted = {stage.name: stage.total for stage in use.plan.stages}
    measured = dict(use.measured)
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


# Running


def limits_of(run: Callable[[int, bool], dict[str, Any]]) -> dict[str, int]:
    """The whole, the middle and the least, in bytes."""
    plan = run(10**13, True)
    whole = int(SLACK * plan["peak"]) + plan["taken"]
    refused = run(TOO_LITTLE, True)
    found = re.search(r"give ([\d.]+ [MG]B)", refused["refused"])
    assert found is not None, refused
    least = int(SLACK * (parse_bytes(found[1]) - refused["before"]))
    return {"whole": whole, "middle": (whole + least) // 2, "least": least}


def measure(name: str, device: str, lossy: bool, places: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a case, as they come."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        CASES[name].write(folder)
        if CASES[name].cached:
            pipeline = load_pipeline(place, "cpu", CASES[name].precision, text_cache=folder / "texts")
            pipeline.fill_texts([PROMPT, ""])

        def run(limit: int, dry: bool) -> dict[str, Any]:
            command = [sys.executable, __file__, "--device", device, "--point", name, place, str(limit)]
            command += ["--lossy"] * lossy + ["--dry"] * dry
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            return json.loads(done.stdout.splitlines()[-1])

        for at, limit in limits_of(run).items():
            if at in places:
                yield {"case": name, "at": at, **run(limit, False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--at", nargs="+", default=["whole", "middle", "least"])
    parser.add_argument("--lossy", action="store_true", help="let layers be kept in fp8")
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--dry", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.point:
        name, folder, limit = arguments.point
        print(json.dumps(point(CASES[name], Path(folder), device, int(limit), arguments.lossy, arguments.dry)))
        return
    for name in arguments.only:
        for row in measure(name, arguments.device, arguments.lossy, arguments.at):
            rows = [{**row, "commit": machine(device)["commit"]}]
            write_results("memory", device, [*earlier_rows("memory", rows, "case", "at"), *rows])


if __name__ == "__main__":
    main()
