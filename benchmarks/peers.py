"""The same work by Vitascope and by diffusers, on the same random weights: steps and codecs.

Every function takes the side ("vitascope" or "diffusers") and a `Setting`, and gives what is to be timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

Run = Callable[[], object]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDES = ("vitascope", "diffusers")
GUIDANCE, WORDS = 5.0, {"wan": 512, "ltx": 128, "mochi": 256}
TRANSFORMERS = {
    "wan": "WanTransformer3DModel",
    "ltx": "LTXVideoTransformer3DModel",
    "mochi": "MochiTransformer3DModel",
}
CODECS = {"wan": "AutoencoderKLWan", "ltx": "AutoencoderKLLTXVideo", "mochi": "AutoencoderKLMochi"}
ATTENTIONS = ("native", "_native_cudnn", "_native_flash", "flash", "sage")
"""Of diffusers, on a GPU; the fastest that is there is taken."""


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """compiled: both sides compile their repeated blocks."""

    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    compiled: bool = False

    @property
    def autocast(self) -> AbstractContextManager[object]:
        """As our own tasks run a model of that dtype."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def peer(name: str) -> Any:
    """A class of diffusers."""
    import diffusers

    return getattr(diffusers, name)


def random_model(name: str, config: dict[str, Any], setting: Setting) -> Any:
    """A model of diffusers with random weights, made where it will run: in fp32 on a CPU (the codecs' own rounding
    starts from there), in its dtype on a GPU, where two copies in fp32 might not fit."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(usual if setting.device.type == "cpu" else setting.dtype)
    try:
        with torch.device(setting.device):
            model = peer(name)(**config)
    finally:
        torch.set_default_dtype(usual)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model.eval().requires_grad_(False)


def ours(theirs: Any, setting: Setting) -> Any:
    """Our model with the weights of one of diffusers."""
    from vitascope.models import named
    from vitascope.models.parts import Part
    from vitascope.models.published import PUBLISHED
    from vitascope.weights.sources import MemorySource

    published = PUBLISHED[type(theirs).__name__]
    config = named(published.config)(dict(theirs.config))
    part = Part(published.family, "diffusers", config, named(published.keys)(config), MemorySource(theirs.state_dict()))
    return part.load(device=setting.device, dtype=setting.dtype)


# Denoising steps


def step(family: str, config: dict[str, Any], shape: tuple[int, ...], side: str, setting: Setting) -> Run:
    """One guided step of a clip: both branches, the guided velocity, and what the sampler does with it.

    shape: of the latents, (C, T, h, w). Ours has the text's keys and values ready, as a clip has from its first step.
    """
    device = setting.device
    latents = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1)).to(device)
    width = {"wan": "text_dim", "ltx": "caption_channels", "mochi": "text_embed_dim"}[family]
    words = torch.Generator().manual_seed(2)
    text = torch.randn(2, WORDS[family], config.get(width, 4096), generator=words).to(device, setting.dtype)
    theirs = random_model(TRANSFORMERS[family], config, setting)
    if side == "diffusers":
        return _their_step(family, theirs.to(setting.dtype), latents, text, setting)
    return _our_step(ours(theirs, setting), latents, text, setting)


def _our_step(model: Any, latents: torch.Tensor, text: torch.Tensor, setting: Setting) -> Run:
    from vitascope.core.tracks import VIDEO, TextContext, Track
    from vitascope.diffusion.guidance import Guidance, GuidedDenoiser, busy_values
    from vitascope.diffusion.paths import RectifiedFlow
    from vitascope.diffusion.samplers import sampler_named

    device = setting.device
    if setting.compiled:
        for region in model.regions:
            region.compile(fullgraph=True)
    mask = torch.ones(1, text.shape[1], dtype=torch.bool, device=device)
    with torch.no_grad(), setting.autocast:
        cond, uncond = (model.prepare(TextContext(text[i : i + 1], mask)) for i in range(2))
    guided = GuidedDenoiser(
        model, RectifiedFlow(), cond, uncond, Guidance(GUIDANCE), busy_values=busy_values(device)
    )  # fmt: skip
    noise = torch.ones(1, 1, *[1] * (latents.ndim - 2), device=device) * 0.9
    track = Track(latents, noise, torch.arange(latents.shape[2], device=device) / 3.0)

    def run() -> None:
        with torch.no_grad(), setting.autocast:
            next(iter(sampler_named("euler")(guided, {VIDEO: track}, [0.9, 0.8], path=RectifiedFlow())))

    return run


def _their_step(family: str, model: Any, latents: torch.Tensor, text: torch.Tensor, setting: Setting) -> Run:
    """As the pipelines of diffusers do it: Wan calls the model twice, the others once with both branches."""
    hidden = latents.to(setting.dtype)

    def call(hidden: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        times = torch.full((len(hidden),), 900.0, device=hidden.device)
        if family == "wan":
            return model(hidden, times, words, return_dict=False)[0]
        mask = torch.ones(words.shape[:2], device=hidden.device)
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

    if setting.device.type == "cuda":
        _tune(model, run)
    if setting.compiled:
        for block in model.blocks if family == "wan" else model.transformer_blocks:
            block.compile(fullgraph=True)
    return run


def _tune(model: Any, run: Run) -> None:
    """Fused projections and the fastest attention that runs here."""
    if hasattr(model, "fuse_qkv_projections"):
        model.fuse_qkv_projections()
    seconds: dict[str, float] = {}
    for name in ATTENTIONS:
        try:
            model.set_attention_backend(name)
            run()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            run()
            torch.cuda.synchronize()
            seconds[name] = time.perf_counter() - begin
        except (RuntimeError, ValueError, ImportError, NotImplementedError):  # not installed, or not for this model
            continue
    model.set_attention_backend(min(seconds, key=lambda name: seconds[name]))


# Codecs


def codec(family: str, way: str, size: tuple[int, int, int], side: str, setting: Setting) -> Run:
    """Encoding or decoding of a clip of (frames, height, width) px by the codec of full size."""
    frames, height, width = size
    theirs = random_model(CODECS[family], {}, setting)
    model = theirs.to(setting.dtype) if side == "diffusers" else ours(theirs, setting)
    config = theirs.config
    time_stride, stride = {"wan": (4, 8), "ltx": (8, 32), "mochi": (6, 8)}[family]
    channels = config.get("z_dim", config.get("latent_channels"))
    draw = torch.Generator().manual_seed(1)
    video = torch.rand(1, 3, frames, height, width, generator=draw).to(setting.device) * 2 - 1
    shape = (1, channels, 1 + (frames - 1) // time_stride, height // stride, width // stride)
    latents = torch.randn(*shape, generator=draw).to(setting.device)
    if side == "diffusers":
        given = (video if way == "encode" else latents).to(setting.dtype)
        act = _their_encoding if way == "encode" else _their_decoding
        return _without_gradients(lambda: act(model, given))
    work = partial(model.encode, video) if way == "encode" else partial(model.decode, latents)
    return _without_gradients(work, setting.autocast)


def _their_encoding(model: Any, video: torch.Tensor) -> torch.Tensor:
    return model.encode(video).latent_dist.mode()


def _their_decoding(model: Any, latents: torch.Tensor) -> torch.Tensor:
    return model.decode(latents, return_dict=False)[0]


def _without_gradients(work: Run, around: AbstractContextManager[object] | None = None) -> Run:
    def run() -> None:
        with torch.no_grad(), around or nullcontext():
            work()

    return run
