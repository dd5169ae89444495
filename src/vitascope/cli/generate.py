"""`vitascope generate`: a sentence, pictures, sound or video to video with sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitascope.cli.reporting import plain, print_json, say, stderr_console
from vitascope.core.errors import InputError, MediaError, PromptError

if TYPE_CHECKING:
    from vitascope.core.shapes import ClipFormat
    from vitascope.diffusion.samplers import Step
    from vitascope.tasks.generate import Generated
    from vitascope.tasks.pipeline import Pipeline
    from vitascope.tasks.request import GenerateRequest, Given

RECIPE_TAG = "vitascope"
"""The tag of a file that holds its recipe, as JSON."""


@dataclass(frozen=True)
class Sources:
    """The files a clip is made from, and the name of a camera move; recorded in its recipe."""

    image: str = ""
    keyframes: tuple[str, ...] = ()
    audio: str = ""
    video: str = ""
    extend: str = ""
    camera: str = ""


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What the clip shows and sounds like.", show_default=False)] = None,
    output: Annotated[Path | None, typer.Option(help="File to write: .mp4, .mov, .mkv, .webm or .gif.")] = None,
    negative_prompt: Annotated[str, typer.Option(help="What the clip should be guided away from.")] = "",
    image: Annotated[str, typer.Option(help="Picture to start from.")] = "",
    keyframe: Annotated[
        list[str] | None, typer.Option(help="TIME:FILE[:STRENGTH], a picture at a time in seconds; repeatable.")
    ] = None,
    audio: Annotated[str, typer.Option(help="Sound that the video follows.")] = "",
    video: Annotated[str, typer.Option(help="Silent clip to give sound to.")] = "",
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
    model: Annotated[str, typer.Option(help="Model: pocket, or a folder.")] = "pocket",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    preview: Annotated[Path | None, typer.Option(help="Picture kept up to date with the clip as it forms.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File with a prompt a line.")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Folder for the clips of --prompts: 0001.mp4 and so on.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print what was made as JSON on stdout.")] = False,
) -> None:
    """Make video with sound from a sentence, pictures, sound or video; the whole recipe is kept inside the file."""
    jobs = _jobs(prompt, output, prompts, output_dir)
    sources = Sources(image, tuple(keyframe or ()), audio, video, extend, camera)
    pipeline = _load(model, device, [path for _, path in jobs])
    lengths = _Lengths(seconds, num_frames, width, height, fps)
    made = []
    for number, (text, path) in enumerate(jobs, start=1):
        request = _request(pipeline, text, lengths, sources)
        request = replace(
            request,
            negative_prompt=negative_prompt,
            seed=seed,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            sampler=sampler,
        )
        with _progress(f"{number}/{len(jobs)} {text}" if len(jobs) > 1 else text) as advance:
            watch = _watcher(pipeline, preview, advance)
            result = make(pipeline, request, sources, watch)
        made.append(write(result, path, sources))
        if not json_output:
            say(f"{path}: {describe(result)}")
    if json_output:
        print_json(made if prompts is not None else made[0])


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
        lines = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{prompts} cannot be read as a list of prompts: {error}") from error
    if not lines:
        raise PromptError(f"{prompts} holds no prompts")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MediaError(f"{output_dir} cannot be made: {error.strerror}") from error
    jobs = [(line, output_dir / f"{number:04}.mp4") for number, line in enumerate(lines, start=1)]
    check_output(jobs[0][1])
    return jobs


def _load(model: str, device: str, outputs: list[Path]) -> Pipeline:
    from vitascope.tasks.load import load_pipeline

    return load_pipeline(model, device)


@dataclass(frozen=True)
class _Lengths:
    seconds: float | None
    num_frames: int | None
    width: int | None
    height: int | None
    fps: float | None


def _request(pipeline: Pipeline, prompt: str, lengths: _Lengths, sources: Sources) -> GenerateRequest:
    """The request of one clip, with what its sources hold. Raises InputError or MediaError."""
    from vitascope.tasks.request import GenerateRequest

    fmt = clip_format(pipeline, lengths)
    if sources.video or sources.audio and lengths.seconds is None and lengths.num_frames is None:
        fmt = _format_of_source(pipeline, fmt, sources.video or sources.audio, lengths)
    return GenerateRequest(prompt, format=fmt, given=read_given(sources, fmt))


def clip_format(pipeline: Pipeline, lengths: _Lengths) -> ClipFormat:
    """The format asked for, over the pipeline's own. Raises InputError (ShapeError)."""
    base = pipeline.defaults.clip
    if lengths.seconds is not None and lengths.num_frames is not None:
        raise InputError("give --seconds or --num-frames, not both")
    fmt = replace(
        base, width_px=lengths.width or base.width_px, height_px=lengths.height or base.height_px, fps=lengths.fps or base.fps
    )
    if lengths.num_frames is not None:
        fmt = replace(fmt, num_frames=lengths.num_frames)
    if lengths.seconds is not None:
        fmt = replace(fmt, num_frames=pipeline.frames_for(lengths.seconds, fmt.fps))
    pipeline.check_format(fmt)
    return fmt


def _format_of_source(pipeline: Pipeline, fmt: ClipFormat, path: str, lengths: _Lengths) -> ClipFormat:
    """As long as the given sound or video, as far as whole latent frames and the model's own length go."""
    from vitascope.media.reading import read_audio, read_video

    if path.lower().endswith((".wav", ".mp3", ".flac", ".ogg", ".m4a")):
        duration_s = len(read_audio(path, fmt.sample_rate_hz)) / fmt.sample_rate_hz
    else:
        duration_s = read_video(path).duration_s
    stride = pipeline.video_codec.strides.time
    limit = lengths.num_frames or (fmt.num_frames if lengths.seconds is not None else pipeline.defaults.clip.num_frames)
    fitting = 1 + max(0, int(duration_s * fmt.fps + 1e-6) - 1) // stride * stride
    return replace(fmt, num_frames=min(limit, fitting))


def read_given(sources: Sources, fmt: ClipFormat) -> Given:
    """Read the files that a clip of format `fmt` is made from."""
    from vitascope.media.frames import fit_samples, resample_frames
    from vitascope.media.reading import read_audio, read_image, read_video
    from vitascope.tasks.camera import named_camera_path
    from vitascope.tasks.request import Given, Keyframe

    keyframes = [Keyframe(0.0, read_image(sources.image), 1.0, sources.image)] if sources.image else []
    for text in sources.keyframes:
        time_s, path, strength = parse_keyframe(text)
        keyframes.append(Keyframe(time_s, read_image(path), strength, path))
    video = None
    if sources.video:
        clip = read_video(sources.video)
        video = resample_frames(clip.frames, clip.fps, fmt.fps, fmt.num_frames)
    audio = fit_samples(read_audio(sources.audio, fmt.sample_rate_hz), fmt.num_samples) if sources.audio else None
    camera = named_camera_path(sources.camera, fmt) if sources.camera else None
    return Given(tuple(keyframes), audio=audio, video=video, camera=camera)


def parse_keyframe(text: str) -> tuple[float, str, float]:
    """TIME:FILE[:STRENGTH] to its parts; colons inside FILE are kept. Raises InputError."""
    time, _, rest = text.partition(":")
    path, _, strength = rest.rpartition(":")
    if not path or not _is_number(strength):
        path, strength = rest, "1"
    if not _is_number(time) or not path:
        raise InputError(f"keyframe {text!r} is not TIME:FILE[:STRENGTH], for example 1.0:ball.png:0.8")
    return float(time), path, float(strength)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def make(
    pipeline: Pipeline, request: GenerateRequest, sources: Sources, report: Callable[[Step], None] = lambda step: None
) -> Generated:
    """The clip of a request; with `sources.extend`, that clip and what comes after it."""
    from vitascope.media.frames import resample_frames
    from vitascope.media.reading import Clip, read_video
    from vitascope.tasks.long import extend, generate_any_length

    if not sources.extend:
        return generate_any_length(pipeline, request, report)
    fmt = request.format
    clip = read_video(sources.extend, sample_rate_hz=fmt.sample_rate_hz)
    frames = resample_frames(clip.frames, clip.fps, fmt.fps)
    return extend(pipeline, request, Clip(frames, fmt.fps, clip.samples, fmt.sample_rate_hz), report)


def write(result: Generated, path: Path, sources: Sources) -> dict[str, Any]:
    """Write the clip with its recipe inside; returns what was made, for --json."""
    import json

    from vitascope.media.writing import write_clip

    recipe = {**result.recipe, "sources": plain(sources)}
    clip = result.clip
    tags = {RECIPE_TAG: json.dumps(recipe), "comment": str(result.recipe.get("prompt", ""))}
    write_clip(path, clip.frames, clip.fps, clip.samples, clip.sample_rate_hz, tags)
    return {"output": str(path), "recipe": recipe, "seconds": result.seconds}


def describe(result: Generated) -> str:
    """Size, length and the time each stage took, in one line."""
    clip = result.clip
    height, width = clip.frames.shape[-2:]
    stages = ", ".join(f"{name} {spent:.2f} s" for name, spent in result.seconds.items())
    return f"{width}x{height}, {len(clip.frames)} frames, {clip.duration_s:.2f} s ({stages})"


@contextmanager
def _progress(text: str) -> Iterator[Callable[[Step], None]]:
    """A bar with the time left, on a terminal; nothing elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = stderr_console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
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
