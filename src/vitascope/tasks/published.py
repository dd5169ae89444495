"""Pipelines of public models from a folder as diffusers writes it: model_index.json and a folder for every part.

What a family is told (sizes, steps, guidance, levels) is what its authors and diffusers sample with. Nothing that a
folder names is imported: classes are looked up in tables.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vitascope.core.errors import CheckpointError, choice
from vitascope.core.protocols import Denoiser, VideoCodec
from vitascope.core.shapes import ClipFormat
from vitascope.diffusion.guidance import Guidance
from vitascope.diffusion.paths import RectifiedFlow
from vitascope.diffusion.sampling_schedule import SamplingSchedule, ShiftBySize
from vitascope.models.image.clip.encoder import load_clip
from vitascope.models.published import load_published
from vitascope.models.text.t5.encoder import open_t5
from vitascope.models.text.t5.options import T5_OPTIONS, T5Options
from vitascope.tasks.pipeline import Defaults, Pipeline
from vitascope.tasks.tea import tea_coefficients
from vitascope.weights.foreign import ForeignConfig, read_object

INDEX = "model_index.json"
FOLDERS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler", "image_encoder", "image_processor")
"""What is read of such a pipeline."""
_NOTES = ("num_train_timesteps", "timestep_spacing", "steps_offset", "trained_betas", "beta_start", "beta_end")


@dataclass(frozen=True)
class PublishedPipeline:
    """A class of pipelines of diffusers: the classes of its parts, how it reads prompts, its defaults, and what its
    scheduler means beside them."""

    denoiser: str
    codec: str
    text: T5Options
    defaults: Defaults
    schedule: Callable[[ForeignConfig, Defaults], SamplingSchedule]


def _wan_schedule(theirs: ForeignConfig, own: Defaults) -> SamplingSchedule:
    theirs.only(_class_name="UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True)
    theirs.only(solver_order=2, solver_type="bh2", predict_x0=True, lower_order_final=True, final_sigmas_type="zero")
    theirs.only(use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False, thresholding=False)
    theirs.only(disable_corrector=(), solver_p=None, rescale_betas_zero_snr=False, use_dynamic_shifting=False)
    theirs.ignore(*_NOTES, "beta_schedule", "dynamic_thresholding_ratio", "sample_max_value", "time_shift_type")
    theirs.ignore("sigma_min", "sigma_max", "shift_terminal")
    shift = theirs.take("flow_shift", 1.0)
    # levels as integer timesteps of 1000; one short of 1 keeps log(alpha) finite
    return replace(own.schedule, shift=shift, end=0.001, below_one=1e-6, grid=1000)


def _euler_schedule(theirs: ForeignConfig, own: Defaults, inverted: bool = False) -> SamplingSchedule:
    """inverted: the scheduler counts from data to noise, as Mochi's does; ours does not, so nothing follows from it."""
    theirs.only(_class_name="FlowMatchEulerDiscreteScheduler", stochastic_sampling=False, time_shift_type="exponential")
    theirs.only(use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False)
    theirs.only(invert_sigmas=inverted)
    theirs.ignore(*_NOTES)
    by_size = None
    if theirs.take("use_dynamic_shifting", False):
        by_size = ShiftBySize(
            theirs.take("base_image_seq_len", 256),
            theirs.take("base_shift", 0.5),
            theirs.take("max_image_seq_len", 4096),
            theirs.take("max_shift", 1.15),
        )
    theirs.ignore("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    terminal = theirs.take("shift_terminal", None) or 0.0
    return replace(own.schedule, shift=theirs.take("shift", 1.0), by_size=by_size, terminal=terminal)


_WAN = Defaults(ClipFormat(832, 480, 16.0, 81), 50, Guidance(5.0, rescale_on="velocity"), "unipc")
PIPELINES: dict[str, PublishedPipeline] = {
    "WanPipeline": PublishedPipeline(
        "WanTransformer3DModel",
        "AutoencoderKLWan",
        T5_OPTIONS["wan"],
        _WAN,
        _wan_schedule,
    ),
    "WanImageToVideoPipeline": PublishedPipeline(
        "WanTransformer3DModel",
        "AutoencoderKLWan",
        T5_OPTIONS["wan"],
        _WAN,
        _wan_schedule,
    ),
    "LTXPipeline": PublishedPipeline(
        "LTXVideoTransformer3DModel",
        "AutoencoderKLLTXVideo",
        T5_OPTIONS["ltx"],
        Defaults(
            ClipFormat(704, 512, 25.0, 161), 50, Guidance(3.0, rescale_on="velocity"), "euler", frame_times="begin"
        ),
        _euler_schedule,
    ),
    "LTXConditionPipeline": PublishedPipeline(
        "LTXVideoTransformer3DModel",
        "AutoencoderKLLTXVideo",
        replace(T5_OPTIONS["ltx"], max_tokens=256, attention="words"),
        Defaults(
            ClipFormat(704, 512, 25.0, 161),
            50,
            Guidance(3.0, rescale_on="velocity"),
            "euler",
            SamplingSchedule("linear_quadratic"),
            frame_times="begin_causal",
            keyframes="beside",
        ),
        _euler_schedule,
    ),
    "MochiPipeline": PublishedPipeline(
        "MochiTransformer3DModel",
        "AutoencoderKLMochi",
        T5_OPTIONS["mochi"],
        Defaults(
            ClipFormat(848, 480, 30.0, 163),
            64,
            Guidance(4.5, rescale_on="velocity"),
            "euler",
            SamplingSchedule("linear_quadratic"),
        ),
        partial(_euler_schedule, inverted=True),
    ),
}
"""By class name, as `_class_name` in model_index.json has it."""


def is_published(folder: Path) -> bool:
    """Whether a folder is a pipeline as diffusers writes it."""
    return (folder / INDEX).is_file()


def load_published_pipeline(
    folder: Path,
    name: str,
    device: torch.device,
    precision: torch.dtype,
    *,
    variant: str = "",
    text_cache: Path | None = None,
) -> Pipeline:
    """The pipeline in a folder, its matrices in `precision`; the text encoder is loaded when a prompt asks for it.

    name: in messages and recipes. variant: such as "fp16", part of the weights' file names. text_cache: where
    embeddings are kept; None keeps none. Raises CheckpointError, and CapabilityError
    without `transformers`.
    """
    index = read_object(folder / INDEX)
    kind = PIPELINES[choice("kind of pipeline", str(index.get("_class_name")), PIPELINES)]
    defaults = replace(kind.defaults, schedule=read_schedule(folder, kind))
    text_encoder = open_t5(folder, kind.text, cache=text_cache, dtype=precision, device=device)
    denoiser: Any = load_published(
        folder / "transformer", [kind.denoiser], device=device, dtype=precision, variant=variant
    )
    codec: Any = load_published(folder / "vae", [kind.codec], device=device, variant=variant)
    _check_parts(folder, denoiser, codec, text_encoder.width)
    defaults = replace(defaults, tea_coefficients=tea_coefficients(kind.denoiser, denoiser.config.width, denoiser))
    return Pipeline(
        name=name,
        denoiser=denoiser,
        text_encoder=text_encoder,
        video_codec=codec,
        audio_codec=None,
        path=RectifiedFlow(),
        defaults=defaults,
        device=device,
        precision=precision,
        patch=denoiser.patch[1:],
        fingerprint=_fingerprint(folder),
        image_encoder=load_clip(folder, device=device) if getattr(denoiser.config, "image_width", 0) else None,
        num_pictures=2 if getattr(denoiser.config, "image_positions", 0) else 1,
    )


def read_schedule(folder: Path, kind: PublishedPipeline) -> SamplingSchedule:
    """The levels that the folder's scheduler stands for. Raises CheckpointError for a scheduler that is not known."""
    values = read_object(folder / "scheduler" / "scheduler_config.json")
    theirs = ForeignConfig(values, str(folder / "scheduler" / "scheduler_config.json"))
    schedule = kind.schedule(theirs, kind.defaults)
    theirs.done()
    return schedule


def _check_parts(folder: Path, denoiser: Denoiser, codec: VideoCodec, text_width: int) -> None:
    config: Any = getattr(denoiser, "config", None)
    channels = getattr(config, "out_channels", getattr(config, "video_channels", 0))
    for what, own, other in (
        ("latent channels", channels, codec.latent_channels),
        ("text", config.text_width, text_width),
    ):
        if own != other:
            raise CheckpointError(
                f"the parts in {folder} do not fit: {what} {own} of the transformer, {other} beside it"
            )


def _fingerprint(folder: Path) -> str:
    """Of the names, sizes and heads of all weights; hashing tens of gigabytes would take longer than reading them."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            head = file.read(8)
            head += file.read(min(int.from_bytes(head, "little"), 1 << 24)) + file.read(1 << 16)
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size}".encode() + head)
    return digest.hexdigest()
