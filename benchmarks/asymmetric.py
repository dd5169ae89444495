"""What it costs and saves that text sees text alone: two trained dual-stream denoisers, alike but for `text_sees`.

    python benchmarks/asymmetric.py JOINT_FOLDER ASYMMETRIC_FOLDER [--repeats 30] [--clips 64] [--precision bf16]

The folders hold denoiser.safetensors and text_encoder.safetensors, as training exports them from
recipes/pocket_dual_joint.toml and recipes/pocket_dual_asymmetric.toml. Times are of one guided step of one clip with
its texts prepared, both variants in turn, and of preparing both texts, once a clip: with the trained weights and a
prompt of the world, and with untrained weights of the same shape and long texts. Losses are those that training
reports, for both on the same held-out clips with the same noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import timed_in_turn, write_results

from vitascope.core.random import generator
from vitascope.core.tracks import VIDEO, TextContext, Track
from vitascope.diffusion.guidance import Guidance, GuidedDenoiser
from vitascope.diffusion.paths import RectifiedFlow
from vitascope.diffusion.samplers import sampler_named
from vitascope.models import load_model
from vitascope.nn.precision import store_matrices
from vitascope.training.recipe import read_recipe
from vitascope.training.stage import stage_kind

RECIPE = Path(__file__).parents[1] / "recipes" / "pocket_dual_joint.toml"
SEES = {"joint": "all", "asymmetric": "text"}
PROMPT = "a red ball bounces on a gray background, the camera pans left, with soft music"
GUIDANCE = 2.5


@dataclass(frozen=True)
class Setting:
    """Where and how it is timed. latents: of a clip, (C, T, h, w)."""

    device: torch.device
    dtype: torch.dtype
    latents: tuple[int, int, int, int]
    repeats: int

    def autocast(self) -> torch.autocast:
        reduced = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype if reduced else torch.bfloat16, enabled=reduced)


def load_variant(folder: Path, name: str) -> tuple[Any, Any]:
    """The text encoder and the denoiser of a variant. Ends the program for a denoiser of another kind."""
    text, denoiser = (load_model(folder / f"{part}.safetensors") for part in ("text_encoder", "denoiser"))
    found = getattr(denoiser.config, "text_sees", None)
    if found != SEES[name]:
        raise SystemExit(f"{folder} holds a denoiser with text_sees {found!r}; {SEES[name]!r} belongs there")
    return text, denoiser


def untrained(denoiser: Any) -> Any:
    """Another one of the same shape."""
    torch.manual_seed(0)
    fresh = type(denoiser)(denoiser.config)
    for parameter in fresh.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return fresh.eval().requires_grad_(False)


def long_texts(width: int, num_words: int) -> list[TextContext]:
    """A prompt and a negative prompt of so many words."""
    mask = torch.ones(1, num_words, dtype=torch.bool)
    words = torch.randn(2, 1, num_words, width, generator=generator(0, "words"))
    return [TextContext(each, mask) for each in words]


def runs_of(denoiser: Any, texts: list[TextContext], setting: Setting) -> dict[str, Callable[[], object]]:
    """What to time: preparing both texts, and a step of a sampler with them prepared."""
    device, path = setting.device, RectifiedFlow()
    denoiser = deepcopy(denoiser).to(device)
    if setting.dtype != torch.float32:
        store_matrices(denoiser, setting.dtype)  # as a pipeline does
    texts = [TextContext(text.embeddings.to(device), text.mask.to(device)) for text in texts]
    values = torch.randn(1, *setting.latents, generator=generator(0, "latents")).to(device)
    frames = setting.latents[1]
    track = Track(values, torch.full((1, 1, frames, 1, 1), 0.9, device=device), torch.arange(frames, device=device) / 3)

    def prepare() -> list[TextContext]:
        with torch.no_grad(), setting.autocast():
            return [denoiser.prepare(text) for text in texts]

    cond, uncond = prepare()
    guided = GuidedDenoiser(denoiser, path, cond, uncond, Guidance(GUIDANCE))

    def step() -> None:
        with torch.no_grad(), setting.autocast():
            next(iter(sampler_named("euler")(guided, {VIDEO: track}, [0.9, 0.8], path=path)))

    return {"step": step, "prepare": prepare}


def time_rows(variants: dict[str, tuple[Any, Any]], setting: Setting, words: list[int]) -> list[dict[str, Any]]:
    """Rows of times by what is timed: both variants, and the asymmetric one's share of the joint one's."""
    rows = []
    for num_words in (0, *words):
        runs: dict[str, dict[str, Callable[[], object]]] = {}
        for name, (text, denoiser) in variants.items():
            if num_words:
                texts, model = long_texts(denoiser.config.text_width, num_words), untrained(denoiser)
            else:
                with torch.no_grad():
                    texts, model = [text([PROMPT]), text([""])], denoiser
            runs[name] = runs_of(model, texts, setting)
        for what in ("step", "prepare"):
            times = timed_in_turn({name: run[what] for name, run in runs.items()}, setting.repeats, warmup=3)
            label = f"{what}, {num_words} words, untrained" if num_words else f"{what}, a prompt, trained"
            ratio = times["asymmetric"].median_s / times["joint"].median_s
            rows.append({"what": label, **times, "asymmetric_over_joint": ratio})
    return rows


def loss_rows(variants: dict[str, tuple[Any, Any]], validator: Any) -> list[dict[str, Any]]:
    """Rows of validation losses."""
    scores = {}
    for name, (text, denoiser) in variants.items():
        with torch.no_grad():
            scores[name] = validator.score(text.to(validator.device), denoiser.to(validator.device))
    return [
        {
            "what": f"loss, {key}",
            **{name: score[key] for name, score in scores.items()},
            "asymmetric_over_joint": scores["asymmetric"][key] / scores["joint"][key],
        }
        for key in scores["joint"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("joint", type=Path)
    parser.add_argument("asymmetric", type=Path)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--clips", type=int, default=64, help="held-out clips of the losses; 0 leaves these out")
    parser.add_argument("--words", type=int, nargs="*", default=[256, 512], help="lengths of the long texts")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="says which clips and codecs")
    parser.add_argument("--set", dest="settings", nargs="*", default=[], help="KEY=VALUE of the recipe")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    settings = [*arguments.settings, "denoiser.text_encoder=", "denoiser.denoiser=", "loop.compile=false"]
    settings.append(f"denoiser.validation.num_scored={arguments.clips}")
    recipe = read_recipe(arguments.recipe, lambda name: stage_kind(name).options, settings)
    stage: Any = stage_kind(recipe.stage).build(recipe, device)
    variants = {name: load_variant(getattr(arguments, name), name) for name in SEES}
    clip, strides = recipe.options.clip, stage.strides
    channels = variants["joint"][1].config.video_channels
    shape = (channels, stage.cells.num_frames, clip.height_px // strides.height, clip.width_px // strides.width)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.precision]
    rows = time_rows(variants, Setting(device, dtype, shape, arguments.repeats), arguments.words)
    if arguments.clips:
        rows += loss_rows(variants, stage.validator)
    write_results(
        "asymmetric", device, rows, precision=arguments.precision, latents=list(shape), repeats=arguments.repeats,
        num_scored=arguments.clips, guidance=GUIDANCE, prompt=PROMPT,
    )  # fmt: skip


if __name__ == "__main__":
    main()
