"""Looking at a denoiser in training: clips for held-out prompts, and losses on held-out clips by task and by level."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vitascope.core.protocols import Denoiser, Prepares
from vitascope.core.random import generator
from vitascope.core.tracks import AUDIO, VIDEO, TextContext, Track, Tracks
from vitascope.diffusion.guidance import Guidance, GuidedDenoiser
from vitascope.diffusion.samplers import sampler_named
from vitascope.diffusion.schedules import shifted_levels
from vitascope.media.pictures import contact_sheet, write_picture
from vitascope.media.writing import write_clip
from vitascope.models.text.bytes.model import ByteTextEncoder
from vitascope.tasks.condition import frame_mask
from vitascope.training.codecs import CodecFiles, Codecs
from vitascope.training.objectives.denoising import (
    PATH,
    STILL,
    ClipCells,
    NoiseLevels,
    draw_cells,
    tasks_of,
    track_losses,
)
from vitascope.training.pool import PoolSpec, encode_clips, pool_scene
from vitascope.world.captions import core_caption

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
CHUNK = 32


@dataclass(frozen=True)
class ValidationOptions:
    """num_shown clips on the sheet, num_videos of them as mp4 too, sampled in num_steps with guidance_scale;
    num_scored clips for the losses. shift: of the sampling levels towards noise."""

    num_shown: int = 8
    num_videos: int = 2
    num_scored: int = 64
    num_steps: int = 16
    guidance_scale: float = 2.0
    shift: float = 1.0
    sampler: str = "euler"


def opening_beside(opening: Tensor, stride: int) -> Tensor:
    """Of clips (B, C, T, h, w) of which the first frame is shown, what a model reads beside its latents: a mask, and
    these, (B, stride + C, T, h, w)."""
    batch, _, frames, *grid = opening.shape
    known = torch.arange(1 + (frames - 1) * stride, device=opening.device) == 0
    mask = frame_mask(known, stride)[None, :, :, None, None].to(opening)
    return torch.cat([mask.expand(batch, -1, -1, *grid), opening], 1).float()


class Validator:
    """Held-out clips (encoded at the first use) and what is measured on them."""

    def __init__(
        self, options: ValidationOptions, spec: PoolSpec, files: CodecFiles, cells: ClipCells, device: torch.device
    ) -> None:
        sampler_named(options.sampler)
        self.options, self.files, self.cells, self.device = options, files, cells, device
        self.spec = replace(spec, split="held_out")
        self._codecs: Codecs | None = None
        self._chunks: list[dict[str, Tensor]] | None = None
        self._shown: Tensor | None = None

    def codecs(self) -> Codecs:
        """The codecs on the device, loaded once."""
        if self._codecs is None:
            self._codecs = self.files.load(self.device)
        return self._codecs

    def run(self, text: ByteTextEncoder, denoiser: Denoiser, folder: Path) -> dict[str, float]:
        """Write samples.png and clips to `folder`; return losses by track, task and level."""
        self._show(text, denoiser, folder)
        return self.score(text, denoiser)

    def _prompts(self, numbers: range) -> list[str]:
        return [core_caption(pool_scene(self.spec, number)) for number in numbers]

    def _show(self, text: ByteTextEncoder, denoiser: Denoiser, folder: Path) -> None:
        if not self.options.num_shown:
            return
        prompts = self._prompts(range(self.options.num_shown))
        frames, sounds = self.sample(text, denoiser, prompts)
        rate_hz = self.codecs().audio.sample_rate_hz
        write_picture(folder / "samples.png", contact_sheet(frames, prompts, sounds, sample_rate_hz=rate_hz))
        for number in range(min(self.options.num_videos, len(prompts))):
            path = folder / f"sample_{number:02d}.mp4"
            write_clip(path, frames[number], self.spec.fmt.fps, sounds[number], rate_hz, {"comment": prompts[number]})

    def sample(
        self, text: ByteTextEncoder, denoiser: Denoiser, prompts: list[str]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Clips (T, 3, H, W) uint8 and their sounds (N,), None of a model without, for `prompts`, from pure noise."""
        options, codecs = self.options, self.codecs()
        texts = [text(prompts), text([""])]
        if isinstance(denoiser, Prepares):
            texts = [denoiser.prepare(part) for part in texts]
        denoise = GuidedDenoiser(denoiser, PATH, texts[0], texts[1], Guidance(options.guidance_scale))
        levels = shifted_levels(options.num_steps, options.shift)
        tracks: Tracks = self._noise(len(prompts), denoiser.capabilities.tracks)
        for step in sampler_named(options.sampler)(denoise, tracks, levels, path=PATH):
            tracks = step.tracks
        num_samples = self.spec.fmt.num_samples
        clips, sounds = [], []
        for row, video in enumerate(tracks[VIDEO].values):
            frames = codecs.video.decode(video[None])[0].movedim(0, 1)
            clips.append(((frames.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8))
            sound = None
            if AUDIO in tracks:
                sound = codecs.audio.decode(tracks[AUDIO].values[row][None])[0, 0, :num_samples].clamp(-1, 1).cpu()
            sounds.append(sound)
        return clips, sounds

    def _noise(self, count: int, names: tuple[str, ...]) -> dict[str, Track]:
        tracks = {}
        for name, value in self._held_out()[0].items():
            if name in names:
                shape = (count, *value.shape[1:])
                values = torch.randn(shape, generator=generator(self.spec.seed, "sample", name)).to(self.device)
                level = torch.ones(count, 1, value.shape[2], *(1,) * (value.ndim - 3), device=self.device)
                beside = self._openings(count) if name == VIDEO and self.spec.openings else None
                times_s = torch.tensor(self.cells.times_s(name), device=self.device)
                tracks[name] = Track(values, level, times_s, beside)
        return tracks

    def _openings(self, count: int) -> Tensor:
        """What the first held-out clips have beside their latents."""
        if self._shown is None or len(self._shown) < count:
            made = encode_clips(range(count), self.spec, self.codecs(), self.device)
            self._shown = self._beside(made)
        return self._shown[:count]

    def _beside(self, chunk: dict[str, Tensor]) -> Tensor:
        return opening_beside(chunk["opening"], self.codecs().video.strides.time).to(self.device)

    def _held_out(self) -> list[dict[str, Tensor]]:
        if self._chunks is None:
            count = max(1, self.options.num_scored)
            chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
            self._chunks = [encode_clips(numbers, self.spec, self.codecs(), self.device) for numbers in chunks]
        return self._chunks

    def score(self, text: ByteTextEncoder, denoiser: Denoiser) -> dict[str, float]:
        """Mean losses: all unknown cells at one level each of LEVELS ("level_0.5_video"), and at 0.5 each task that the
        model can be given. Two models are shown the same clips with the same noise."""
        sums: dict[str, list[float]] = {}
        first = 0
        for chunk in self._held_out():
            count = len(chunk[VIDEO])
            context = text(self._prompts(range(first, first + count)))
            first += count
            tasks = tasks_of(denoiser.capabilities)
            for level in LEVELS:
                for track, loss in self._losses(denoiser, chunk, context, tasks[0], level).items():
                    sums.setdefault(f"level_{level}_{track}", []).append(loss)
            for task in tasks:
                for track, loss in self._losses(denoiser, chunk, context, task, 0.5).items():
                    sums.setdefault(f"{task}_{track}", []).append(loss)
        return {name: sum(values) / len(values) for name, values in sums.items()}

    def _losses(
        self, denoiser: Denoiser, chunk: dict[str, Tensor], context: TextContext, task: str, level: float
    ) -> dict[str, float]:
        """Losses of the tracks that have something unknown, with noise that is the same at every call."""
        draw = generator(self.spec.seed, "score", task)
        count, still_frame = len(chunk[VIDEO]), chunk["still_frame"]
        shared = NoiseLevels(per_track_share=0.0, per_frame_share=0.0, soft_known_share=0.0)
        cells = draw_cells(count, self.cells, {task: 1.0}, shared, draw, still_frame)
        clean = {name: chunk[name].float() for name in denoiser.capabilities.tracks}
        rows = (cells.task == STILL).nonzero()[:, 0]
        clean[VIDEO][rows, :, still_frame[rows]] = chunk["still"][rows].float()
        noise = {name: torch.randn(value.shape, generator=draw) for name, value in clean.items()}
        marks = {}
        for name in clean:
            levels = torch.full_like(cells.levels[name], level).masked_fill(cells.known[name], 0.0)
            silent = cells.silent[:, [VIDEO, AUDIO].index(name), None]
            marks[name] = (levels.masked_fill(silent, 1.0).to(self.device), cells.marked(name).to(self.device))
        clean, noise = ({name: value.to(self.device) for name, value in group.items()} for group in (clean, noise))
        kind, beside = denoiser.capabilities.prediction, self._beside(chunk) if self.spec.openings else None
        losses = track_losses(
            lambda tracks: denoiser(tracks, context), self.cells, clean, noise, marks, 0.05, None, kind, beside
        )
        return {name: float(loss) for name, loss in losses.items() if bool(cells.marked(name).any())}
