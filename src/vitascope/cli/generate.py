"""`vitascope generate`: a sentence, pictures, sound or video to video with sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitascope.cli.models import ModelChoice, Opened, open_model
from vitascope.cli.reporting import plain, print_json, say, stderr_console
from vitascope.cli.sampling import Sampling, SecondPass, make_clip
from vitascope.cli.sources import Lengths, Material, Sources, clip_format, given_of, read_material
from vitascope.core.errors import InputError, MediaError, PromptError

if TYPE_CHECKING:
    from vitascope.core.shapes import ClipFormat
    from vitascope.diffusion.samplers import Step
    from vitascope.media.reading import Clip
    from vitascope.tasks.generate import Generated
    from vitascope.tasks.load import Beside
    from vitascope.tasks.pipeline import Pipeline
    from vitascope.tasks.request import GenerateRequest

RECIPE_TAG = "vitascope"
"""The tag of a file that holds its recipe, as JSON."""


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="What the clip shows and sounds like.", show_default=False)
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File to write: .mp4, .mov, .mkv, .webm or .gif.")] = None,
    negative_prompt: Annotated[str, typer.Option(help="What the clip should be guided away from.")] = "",
    image: Annotated[str, typer.Option(help="Picture to start from.")] = "",
    keyframe: Annotated[
        list[str] | None, typer.Option(help="TIME:FILE[:STRENGTH], a picture at a time in seconds; repeatable.")
    ] = None,
    shot: Annotated[
        list[str] | None, typer.Option(help="TIME:FILE[:STRENGTH], a clip at a time (LTX-Video); repeatable.")
    ] = None,
    audio: Annotated[str, typer.Option(help="Sound that the video follows.")] = "",
    video: Annotated[str, typer.Option(help="Clip to give sound to; its frames are kept.")] = "",
    extend: Annotated[str, typer.Option(help="Clip to go on from; --seconds is then what is added.")] = "",
    camera: Annotated[str, typer.Option(help='Camera move as a path, such as "pans right" or "zooms in".')] = "",
    seconds: Annotated[float | None, typer.Option(help="Length.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Length in frames, instead of --seconds.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in px.")] = None,
    height: Annotated[int | None, typer.Option(help="Height in px.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same clip.")] = 0,
    num_inference_steps: Annotated[int | None, typer.Option(help="Steps of the sampler.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="w in uncond + w (cond - uncond).")] = None,
    sampler: Annotated[str | None, typer.Option(help="euler, heun, dpmpp_2m, unipc or few_step.")] = None,
    model: Annotated[str, typer.Option(help="pocket, a folder or file, or OWNER/NAME[@REVISION].")] = "pocket",
    text_encoder: Annotated[str, typer.Option(help="Folder or OWNER/NAME of T5, where --model has none.")] = "",
    vae: Annotated[str, typer.Option(help="Folder or file of a codec, where --model has none.")] = "",
    variant: Annotated[str, typer.Option(help='Which of several weights in a folder, such as "fp16".')] = "",
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read tensors of .pth files too.")] = False,
    lora: Annotated[list[str] | None, typer.Option(help="FILE[:SCALE], a LoRA for the denoiser; repeatable.")] = None,
    levels: Annotated[str, typer.Option(help="Levels to pass through, such as 1,0.9,0.5, or ltx-distilled.")] = "",
    guidance_rescale: Annotated[float | None, typer.Option(help="Spread given back after guidance, 0 to 1.")] = None,
    guidance_interval: Annotated[str, typer.Option(help="LOW,HIGH: guide between these levels only.")] = "",
    stg_scale: Annotated[float | None, typer.Option(help="Scale of spatio-temporal guidance.")] = None,
    stg_layers: Annotated[str, typer.Option(help="Layers disabled for it, counted from 0, such as 19.")] = "",
    stg_by: Annotated[str, typer.Option(help="What of them is disabled: attention or block.")] = "",
    step_cache: Annotated[str, typer.Option(help="first_block or tea, with :THRESHOLD; skips blocks.")] = "",
    image_cond_noise_scale: Annotated[float, typer.Option(help="Noise on known frames for more motion, 0 to 1.")] = 0.0,
    decode_timestep: Annotated[float | None, typer.Option(help="Noise level a conditioned decoder is told.")] = None,
    decode_noise_scale: Annotated[float | None, typer.Option(help="Noise in what it decodes, 0 to 1.")] = None,
    upsampler: Annotated[str, typer.Option(help="Folder of a latent up-sampler: two passes (LTX-Video).")] = "",
    second_levels: Annotated[str, typer.Option(help="Levels of the second pass.")] = "",
    adain: Annotated[float, typer.Option(help="Statistics of the first pass kept by the second, 0 to 1.")] = 1.0,
    tone_map: Annotated[float, typer.Option(help="How far the second pass presses large values, 0 to 1.")] = 0.0,
    memory: Annotated[str, typer.Option(help="Memory models may take, such as 12GB; how to fit is chosen.")] = "",
    lossy: Annotated[bool, typer.Option("--lossy", help="With --memory: layers may be kept in fp8.")] = False,
    parallel: Annotated[str, typer.Option(help="With torchrun: share a clip by tensor, ulysses or ring.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, bf16, or auto.")] = "auto",
    preview: Annotated[Path | None, typer.Option(help="Picture kept up to date with the clip as it forms.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File with a prompt a line.")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Folder for the clips of --prompts: 0001.mp4, ...")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print what was made as JSON on stdout.")] = False,
) -> None:
    """Make video with sound from a sentence, pictures, sound or video; the whole recipe is kept inside the file."""
    from vitascope.tasks.load import Beside
    from vitascope.tasks.request import GenerateRequest

    jobs = _jobs(prompt, output, prompts, output_dir)
    _check_preview(preview)
    # What is wrong in the request itself is told before the model is read.
    sampling = Sampling(
        levels, guidance_rescale, guidance_interval, stg_scale, stg_layers, stg_by, step_cache, image_cond_noise_scale,
        decode_timestep, decode_noise_scale,
    )  # fmt: skip
    settings = GenerateRequest(
        jobs[0][0],
        negative_prompt,
        seed=seed,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        sampler=sampler,
        **sampling.fields(),
    )
    second = SecondPass(upsampler, second_levels, adain, tone_map)
    sources = Sources(image, tuple(keyframe or ()), audio, video, extend, camera, tuple(shot or ()))
    second.check(sources)
    beside = Beside(text_encoder, vae, allow_pickle, variant)
    choice = ModelChoice(model, device, precision, beside, tuple(lora or ()), memory, lossy, parallel)
    choice.check()
    requests = [replace(settings, prompt=text) for text, _ in jobs]
    lengths = Lengths(seconds, num_frames, width, height, fps)
    with open_model(choice) as opened:
        job = _Job(opened, sources, beside, second, preview if opened.speaks else None, json_output)
        made = _make_all(job, requests, [path for _, path in jobs], lengths)
    if json_output and opened.speaks:
        print_json(made if prompts is not None else made[0])


@dataclass(frozen=True)
class _Job:
    """What all clips of a call have in common."""

    opened: Opened
    sources: Sources
    beside: Beside
    second: SecondPass
    preview: Path | None
    quiet: bool


def _make_all(
    job: _Job, requests: Sequence[GenerateRequest], paths: Sequence[Path], lengths: Lengths
) -> list[dict[str, Any]]:
    """Make and write the clips one by one; returns what was made, for --json."""
    from vitascope.tasks.settings import resolve

    pipeline, speaks = job.opened.pipeline, job.opened.speaks
    material = read_material(job.sources, pipeline.defaults.clip.sample_rate_hz)
    fmt = clip_format(pipeline, lengths, material)
    given = given_of(material, job.sources.camera, fmt, pipeline.video_codec.strides.time)
    resolve(pipeline, requests[0])
    upsampler = job.second.load(pipeline)
    pipeline.fill_texts([*(request.prompt for request in requests), requests[0].negative_prompt])
    made = []
    for number, (request, path) in enumerate(zip(requests, paths, strict=True), start=1):
        title = f"{number}/{len(requests)} {request.prompt}" if len(requests) > 1 else request.prompt
        with _progress(title, speaks) as advance:
            watch = _watcher(pipeline, job.preview, advance)
            make_one = partial(make_clip, second=job.second, upsampler=upsampler)
            result = make(pipeline, replace(request, format=fmt, given=given), material, watch, make_one)
        if not speaks:
            continue
        made.append(write(result, path, job.sources, job.beside, job.second))
        if not job.quiet:
            say(f"{path}: {describe(result)}")
        if result.memory is not None:
            say("\n".join(result.memory.lines()))
    return made


def _jobs(
    prompt: str | None, output: Path | None, prompts: Path | None, output_dir: Path | None
) -> list[tuple[str, Path]]:
    """Prompts and the files they become. Raises InputError for half-given pairs, PromptError for empty prompts."""
    from vitascope.media.writing import check_output

    if prompts is None:
        if prompt is None:
            raise PromptError('give a prompt, for example "a red ball bounces on a gray background", or --prompts FILE')
        if output_dir is not None:
            raise InputError("--output-dir goes with --prompts; one clip is written to --output")
        path = output or Path("output.mp4")
        check_output(path)
        return [(prompt, path)]
    if prompt is not None or output is not None or output_dir is None:
        raise InputError("--prompts FILE goes with --output-dir DIR, without a prompt or --output")
    try:
        lines = [line.strip() for line in prompts.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{prompts} cannot be read as a list of prompts: {reason}") from error
    if not lines:
        raise PromptError(f"{prompts} holds no prompts")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MediaError(f"{output_dir} cannot be made: {error.strerror}") from error
    jobs = [(line, output_dir / f"{number:04}.mp4") for number, line in enumerate(lines, start=1)]
    for _, path in jobs:
        check_output(path)
    return jobs


def _check_preview(preview: Path | None) -> None:
    """Raise MediaError unless the preview can be written."""
    if preview is None:
        return
    from vitascope.media.files import check_writable
    from vitascope.media.pictures import PICTURE_SUFFIXES

    if preview.suffix.lower() not in PICTURE_SUFFIXES:
        raise MediaError(f"{preview} is not the name of a picture; valid suffixes: {', '.join(PICTURE_SUFFIXES)}")
    check_writable(preview)


def make(
    pipeline: Pipeline,
    request: GenerateRequest,
    material: Material,
    report: Callable[[Step], None],
    make_one: Callable[..., Generated],
) -> Generated:
    """The clip of a request: after the clip to extend, or with the frames of the clip to give sound to."""
    from vitascope.tasks.long import extend

    if material.extend is not None:
        return extend(pipeline, request, before(material.extend, request.format), report)
    made = make_one(pipeline, request, report=report)
    return made if material.video is None else replace(made, clip=_sounding(material.video, made.clip))


def before(clip: Clip, fmt: ClipFormat) -> Clip:
    """The clip to extend at the frame rate of `fmt`."""
    from vitascope.media.frames import resample_frames

    if abs(clip.fps - fmt.fps) < 1e-3:
        return replace(clip, fps=fmt.fps)
    say(f"note: the clip to extend is brought from {clip.fps:g} to {fmt.fps:g} fps")
    return replace(clip, frames=resample_frames(clip.frames, clip.fps, fmt.fps), fps=fmt.fps)


def _sounding(video: Clip, made: Clip) -> Clip:
    """The frames of `video` at their own size and rate, as long as what was made, with the sound that was made."""
    from vitascope.media.frames import fit_samples

    assert made.samples is not None
    assert made.sample_rate_hz is not None
    frames = video.frames[: max(1, round(made.duration_s * video.fps))]
    num_samples = round(len(frames) / video.fps * made.sample_rate_hz)
    return replace(made, frames=frames, fps=video.fps, samples=fit_samples(made.samples, num_samples))


def write(result: Generated, path: Path, sources: Sources, beside: Beside, second: SecondPass) -> dict[str, Any]:
    """Write the clip with its recipe inside; returns what was made, for --json."""
    import json

    from vitascope.media.writing import write_clip

    recipe = {**result.recipe, "sources": plain(sources), "beside": plain(beside), "second": plain(second)}
    clip = result.clip
    tags = {RECIPE_TAG: json.dumps(recipe), "comment": str(result.recipe.get("prompt", ""))}
    write_clip(path, clip.frames, clip.fps, clip.samples, clip.sample_rate_hz, tags)
    return {"output": str(path), "recipe": recipe, "seconds": result.seconds}


def describe(result: Generated) -> str:
    """Size, length and the time each stage took, in one line."""
    clip = result.clip
    height, width = clip.frames.shape[-2:]
    stages = ", ".join(f"{name} {spent:.2f} s" for name, spent in result.seconds.items())
    skipped = f", {result.skipped_share:.0%} of the blocks skipped" if result.skipped_share else ""
    return f"{width}x{height}, {len(clip.frames)} frames, {clip.duration_s:.2f} s ({stages}){skipped}"


@contextmanager
def _progress(text: str, shown: bool = True) -> Iterator[Callable[[Step], None]]:
    """A bar with the time left, on a terminal; nothing elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = stderr_console()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        job = bar.add_task(text[:60], total=None)
        yield lambda step: bar.update(job, total=step.num_steps, completed=step.index + 1)


def _watcher(pipeline: Pipeline, preview: Path | None, advance: Callable[[Step], None]) -> Callable[[Step], None]:
    """What to do after every step: move the bar and, if asked, draw the preview."""
    if preview is None:
        return advance
    from vitascope.tasks.preview import write_preview

    def watch(step: Step) -> None:
        advance(step)
        write_preview(pipeline, step, preview)

    return watch
