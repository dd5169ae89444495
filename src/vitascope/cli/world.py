"""`vitascope world`: sample clips of the procedural theatre, each with its caption, sound and ground truth."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitascope.cli.reporting import plain, print_json, say, track, whole_frames
from vitascope.core.errors import MediaError, ShapeError
from vitascope.core.shapes import ClipFormat

if TYPE_CHECKING:
    from torch import Tensor

    from vitascope.world.casting import Split

MAX_SHEET_CLIPS = 24


@dataclass(frozen=True)
class Sample:
    """One clip of the world: its caption, ground truth, frames (T, 3, H, W) uint8 and sound (N,)."""

    caption: str
    truth: Any
    frames: Tensor
    samples: Tensor


def world(
    output_dir: Annotated[Path, typer.Option(help="Folder for the clips; made if it is not there.")],
    num_clips: Annotated[int, typer.Option(min=1, help="How many random clips.")] = 8,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A clip of this sentence instead of random ones; repeatable.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first clip; the next one has the next seed.")] = 0,
    split: Annotated[str, typer.Option(help="train or held_out: whether training may see the combination.")] = "train",
    width: Annotated[int, typer.Option(help="Width in px, even.")] = 128,
    height: Annotated[int, typer.Option(help="Height in px, even.")] = 128,
    fps: Annotated[float, typer.Option(help="Frames a second.")] = 12.0,
    seconds: Annotated[float | None, typer.Option(help="Length [25 frames].")] = None,
    arrays: Annotated[bool, typer.Option("--arrays", help="Also write masks and optical flow (NNNN.npz).")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print what was written as JSON on stdout.")] = False,
) -> None:
    """Render captioned sample clips of the procedural theatre, with sound, ground truth and a contact sheet.

    Writes NNNN.mp4 and NNNN.json (caption, attributes, paths, camera, impacts, speech) per clip, and contact_sheet.png.
    """
    from vitascope.media.pictures import contact_sheet, write_picture
    from vitascope.tasks.pipeline import MAX_FPS

    fmt = ClipFormat(width, height, fps, 25 if seconds is None else whole_frames(seconds, fps))
    if not 1 <= fps <= MAX_FPS:
        raise ShapeError(f"the frame rate lies in 1..{MAX_FPS:g} fps, got {fps:g}")
    _make_folder(output_dir)
    scenes = _scenes(prompt or [], num_clips, seed, split, fmt)
    written, shown = [], []
    for number, (caption, scene) in enumerate(track(scenes, "rendering", len(scenes)), start=1):
        sample = render_sample(caption, scene, fmt)
        written.append(_write_sample(output_dir / f"{number:04}", sample, fmt, arrays))
        if number <= MAX_SHEET_CLIPS:
            shown.append(sample)
    sheet = contact_sheet(
        [sample.frames for sample in shown],
        [sample.caption for sample in shown],
        [sample.samples for sample in shown],
        sample_rate_hz=fmt.sample_rate_hz,
    )
    write_picture(output_dir / "contact_sheet.png", sheet)
    if json_output:
        print_json({"clips": written, "contact_sheet": str(output_dir / "contact_sheet.png")})
    else:
        say(f"{len(written)} clips and contact_sheet.png in {output_dir}")


def render_sample(caption: str, scene: Any, fmt: ClipFormat) -> Sample:
    """Render one scene with its sound and truth."""
    from vitascope.world.render import render
    from vitascope.world.sound import synthesise
    from vitascope.world.truth import ground_truth

    return Sample(caption, ground_truth(scene, fmt), render([scene], fmt)[0], synthesise(scene, fmt))


def _scenes(prompts: list[str], num_clips: int, seed: int, split: str, fmt: ClipFormat) -> list[tuple[str, Any]]:
    """Captions and scenes: of the prompts, or random ones of the split."""
    from vitascope.core.errors import choice
    from vitascope.world.captions import parse_caption, write_caption
    from vitascope.world.casting import draw_scene, place

    if prompts:
        return [(text, place(parse_caption(text), seed + index, fmt)) for index, text in enumerate(prompts)]
    wanted: Split = "held_out" if choice("split", split, ("train", "held_out")) == "held_out" else "train"
    scenes = [draw_scene(seed + index, split=wanted, fmt=fmt) for index in range(num_clips)]
    return [(write_caption(scene, seed + index), scene) for index, scene in enumerate(scenes)]


def _write_sample(stem: Path, sample: Sample, fmt: ClipFormat, arrays: bool) -> dict[str, Any]:
    """Write the files of one clip; returns their names and the caption."""
    import numpy as np

    from vitascope.media.files import atomic_file
    from vitascope.media.writing import write_clip

    clip, truth_file = stem.with_suffix(".mp4"), stem.with_suffix(".json")
    tags = {"comment": sample.caption}
    write_clip(clip, sample.frames, fmt.fps, sample.samples, fmt.sample_rate_hz, tags)
    document = {"caption": sample.caption, "attributes": sample.truth.attributes(), **plain(sample.truth)}
    with atomic_file(truth_file) as file:
        file.write((json.dumps(document, ensure_ascii=False, indent=1) + "\n").encode())
    entry: dict[str, Any] = {"clip": str(clip), "truth": str(truth_file), "caption": sample.caption}
    if arrays:
        dense = stem.with_suffix(".npz")
        masks = (sample.truth.masks() * 255).round().byte().numpy()
        with atomic_file(dense) as file:
            np.savez_compressed(file, masks=masks, flow=sample.truth.flow().half().numpy())
        entry["arrays"] = str(dense)
    return entry


def _make_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise MediaError(f"{path} is a file, not a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MediaError(f"the folder {path} cannot be made: {error.strerror}") from None
