"""What a denoiser is asked to do with a clip: which cells it is given, how noisy the others are, and how it is marked.

B clips, T latent frames of video, N latents of audio, C channels. Levels lie in [0, 1]: 0 known, 1 pure noise.
Everything is drawn from a generator on the CPU, for a whole batch at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitascope.core.errors import InputError, choice
from vitascope.core.protocols import Capabilities, Prediction
from vitascope.core.shapes import latent_frame_times, num_audio_latents, pixel_frames
from vitascope.core.tracks import AUDIO, VIDEO, Track, Tracks
from vitascope.diffusion.paths import RectifiedFlow
from vitascope.diffusion.schedules import LevelDistribution, x0_weight

PATH = RectifiedFlow()

Known = tuple[Tensor, Tensor]
"""Known cells (True) of both tracks: video (B, T), audio (B, N)."""


@dataclass(frozen=True)
class ClipCells:
    """The cells of a clip: T, N, when each video frame ends and each audio latent is, in seconds, and N per token."""

    num_frames: int
    num_audio: int
    frame_times_s: tuple[float, ...]
    frame_ends_s: tuple[float, ...]
    audio_times_s: tuple[float, ...]
    audio_patch: int = 1

    @staticmethod
    def of(num_frames: int, stride: int, fps: float, audio_per_s: float, audio_patch: int) -> ClipCells:
        """Cells of a clip of `num_frames` latent frames of a causal codec with that time stride."""
        num_audio = num_audio_latents(pixel_frames(num_frames, stride) / fps, audio_per_s, audio_patch)
        return ClipCells(
            num_frames,
            num_audio,
            tuple(latent_frame_times(num_frames, stride, fps)),
            tuple(pixel_frames(i + 1, stride) / fps for i in range(num_frames)),
            tuple((i + 0.5) / audio_per_s for i in range(num_audio)),
            audio_patch,
        )

    def times_s(self, track: str) -> tuple[float, ...]:
        """Centre of each latent frame of a track, in seconds."""
        return self.frame_times_s if track == VIDEO else self.audio_times_s

    def audio_frame(self) -> Tensor:
        """For each audio latent the first video frame that ends no earlier than its token does, (N,): what the causal
        strategy of the models goes by. What goes past the last frame counts as of that frame."""
        period_s = 2 * self.audio_times_s[0]
        last = torch.tensor(self.audio_times_s)[self.audio_patch - 1 :: self.audio_patch]
        ends = (last + period_s / 2).repeat_interleave(self.audio_patch)
        return torch.searchsorted(torch.tensor(self.frame_ends_s) + 1e-3, ends).clamp_max(self.num_frames - 1)


def _nothing(count: int, cells: ClipCells, draw: torch.Generator) -> Known:
    return torch.zeros(count, cells.num_frames, dtype=torch.bool), torch.zeros(count, cells.num_audio, dtype=torch.bool)


def _first_image(count: int, cells: ClipCells, draw: torch.Generator) -> Known:
    video, audio = _nothing(count, cells, draw)
    video[:, 0] = True
    return video, audio


def _keyframes(count: int, cells: ClipCells, draw: torch.Generator) -> Known:
    """One to three frames anywhere; the first one in half of the clips as well."""
    video, audio = _nothing(count, cells, draw)
    rank = torch.rand(video.shape, generator=draw).argsort(1).argsort(1)
    video = rank < torch.randint(1, min(3, cells.num_frames - 1) + 1, (count, 1), generator=draw)
    video[:, 0] |= torch.rand(count, generator=draw) < 0.5
    video[:, -1] &= ~video.all(1)
    return video, audio


def _still(count: int, cells: ClipCells, draw: torch.Generator) -> Known:
    """The first frame in half of the clips, beside the frame that the data bring."""
    video, audio = _nothing(count, cells, draw)
    video[:, 0] = torch.rand(count, generator=draw) < 0.5
    return video, audio


def _extend(count: int, cells: ClipCells, draw: torch.Generator) -> Known:
    """The first 1 to T - 2 frames, and the audio up to their end."""
    length = torch.randint(1, max(2, cells.num_frames - 1), (count, 1), generator=draw)
    return torch.arange(cells.num_frames) < length, cells.audio_frame() < length


def _audio_to_video(count: int, cells: ClipCells, draw: torch.Generator) -> Known:
    video, audio = _nothing(count, cells, draw)
    return video, ~audio


def _video_to_audio(count: int, cells: ClipCells, draw: torch.Generator) -> Known:
    video, audio = _nothing(count, cells, draw)
    return ~video, audio


def _audio_and_image_to_video(count: int, cells: ClipCells, draw: torch.Generator) -> Known:
    video, audio = _first_image(count, cells, draw)
    return video, ~audio


@dataclass(frozen=True)
class Task:
    """The cells that are known. frames: some frames of a track are, others not. sound: it needs an audio track.
    beside: what is known is read from channels beside the latents."""

    known: Callable[[int, ClipCells, torch.Generator], Known]
    frames: bool = False
    sound: bool = False
    beside: bool = False


TASKS: dict[str, Task] = {
    "text": Task(_nothing),
    "image": Task(_first_image, frames=True),
    "keyframes": Task(_keyframes, frames=True),
    "still": Task(_still, frames=True),
    "extend": Task(_extend, frames=True),
    "audio_to_video": Task(_audio_to_video, sound=True),
    "audio_and_image": Task(_audio_and_image_to_video, frames=True, sound=True),
    "video_to_audio": Task(_video_to_audio, sound=True),
    "one_track": Task(_nothing, sound=True),
    "image_beside": Task(_nothing, beside=True),
}
"""Tasks by name. "still" knows one frame from a single picture of it (the latent of a frozen clip, which the data must
bring; `draw_cells` is told where). "one_track" leaves the other track at pure noise, or draws the two levels apart.
"image_beside" has the first frame in channels beside the latents, of which every cell is to be made."""

STILL = list(TASKS).index("still")
ONE_TRACK = list(TASKS).index("one_track")


@dataclass(frozen=True)
class NoiseLevels:
    """How levels are drawn: from `distribution`, or uniformly for a share of the clips.

    per_track_share: of the clips whose audio has a level of
    its own. per_frame_share: of the clips with a level for each frame (audio with the frame it sounds in), one half
    independent, one half rising over time. soft_known_share: of the clips whose known cells carry a little noise, up to
    soft_known_level, as guides of a strength below 1 do.
    """

    distribution: LevelDistribution = field(default_factory=LevelDistribution)
    uniform_share: float = 0.1
    per_track_share: float = 0.15
    per_frame_share: float = 0.2
    soft_known_share: float = 0.15
    soft_known_level: float = 0.6


@dataclass(frozen=True)
class Cells:
    """What is drawn for a batch: task numbers (B,), levels and known cells of both tracks, (B, T) and (B, N).

    `silent` (B, 2): True where a track (video, audio) is pure noise throughout and is not marked.
    """

    task: Tensor
    levels: dict[str, Tensor]
    known: dict[str, Tensor]
    silent: Tensor

    def marked(self, name: str) -> Tensor:
        """Cells (B, T or N) whose prediction counts."""
        column = self.silent[:, [VIDEO, AUDIO].index(name)]
        return ~self.known[name] & ~column[:, None]


def tasks_of(can: Capabilities) -> tuple[str, ...]:
    """The tasks that a model can be given: with sound where it has a track of it, with known frames where it takes a
    level for each frame; those with known frames beside the latents where it reads these, and then no others."""
    by_frame, sounds, beside = can.noise != "clip", AUDIO in can.tracks, can.condition_channels > 0
    return tuple(
        name
        for name, task in TASKS.items()
        if task.frames <= by_frame and task.sound <= sounds and task.beside == beside
    )


def check_tasks(weights: Mapping[str, float], valid: Iterable[str] = tuple(TASKS)) -> None:
    """Raise InputError unless `weights` names valid tasks and has a positive sum."""
    valid = tuple(valid)
    for name, weight in weights.items():
        choice("task", name, TASKS)
        if weight > 0 and name not in valid:
            raise InputError(f"this model cannot be given the task {name!r}; valid values: {', '.join(valid)}")
        if weight < 0:
            raise InputError(f"task weight {name} must not be negative, got {weight}")
    if not sum(weights.values()) > 0:
        raise InputError("at least one task must have a positive weight")


def draw_cells(
    count: int,
    cells: ClipCells,
    weights: Mapping[str, float],
    noise: NoiseLevels,
    draw: torch.Generator,
    still_frame: Tensor | None = None,
) -> Cells:
    """Tasks, known cells and levels of `count` clips. `still_frame` (B,): the frame that a "still" clip knows."""
    chances = torch.tensor([weights.get(name, 0.0) for name in TASKS])
    task = torch.multinomial(chances, count, replacement=True, generator=draw)
    video, audio = _nothing(count, cells, draw)
    for number, asked in enumerate(TASKS.values()):
        rows = (task == number).nonzero()[:, 0]
        if len(rows):
            video[rows], audio[rows] = asked.known(len(rows), cells, draw)
    if still_frame is not None:
        video |= (task == STILL)[:, None] & (torch.arange(cells.num_frames) == still_frame[:, None])
    video_levels, audio_levels, silent = _levels(task, cells, noise, draw)
    soft = torch.rand(count, 1, generator=draw) < noise.soft_known_share
    soft_level = torch.rand(count, 1, generator=draw) * noise.soft_known_level * soft
    # A known cell is never noisier than the unknown ones: that is how a sampler meets a guide of strength below 1.
    levels = {
        VIDEO: torch.where(video, torch.minimum(soft_level, video_levels), video_levels),
        AUDIO: torch.where(audio, 0.0, audio_levels),
    }
    return Cells(task, levels, {VIDEO: video, AUDIO: audio}, silent)


def _levels(task: Tensor, cells: ClipCells, noise: NoiseLevels, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    count = len(task)
    video = _draw_level((count, 1), noise, draw).expand(-1, cells.num_frames)
    audio = video[:, :1].expand(-1, cells.num_audio)

    def chosen(share: float) -> Tensor:
        return torch.rand(count, 1, generator=draw) < share

    own = _draw_level((count, 1), noise, draw)
    audio = torch.where(chosen(noise.per_track_share) | (task == ONE_TRACK)[:, None], own, audio)
    frames = _draw_level((count, cells.num_frames), noise, draw)
    frames = torch.where(chosen(0.5), frames, frames.sort(1).values)
    per_frame = chosen(noise.per_frame_share) & (task != ONE_TRACK)[:, None]
    video = torch.where(per_frame, frames, video)
    audio = torch.where(per_frame, frames[:, cells.audio_frame()], audio)
    # one third each: sound without a picture, a picture without sound, two levels drawn apart
    which = torch.randint(3, (count,), generator=draw)
    silent = torch.stack([which == 0, which == 1], 1) & (task == ONE_TRACK)[:, None]
    return video.masked_fill(silent[:, :1], 1.0), audio.masked_fill(silent[:, 1:], 1.0), silent


def _draw_level(shape: tuple[int, int], noise: NoiseLevels, draw: torch.Generator) -> Tensor:
    level = noise.distribution.sample(shape, draw)
    uniform = torch.rand(shape, generator=draw)
    return torch.where(torch.rand(shape, generator=draw) < noise.uniform_share, uniform, level)


def velocity_weighted_error(
    x0: Tensor, clean: Tensor, level: Tensor, marked: Tensor, min_level: float, share: Tensor | None = None
) -> Tensor:
    """Mean over the marked cells of |x0 - clean|^2 / max(t, min_level)^2, that is the error of the velocity
    (noise - x0) = (x_t - x0) / t, with its weight held down where t is small.

    x0, clean (B, C, ...); level and marked (B, 1, ...) with as many axes, broadcastable over the rest. share:
    how much each cell counts in the mean, (B, 1, ...); alike if not given.
    """
    error = (x0.float() - clean.float()).square().mean(1, keepdim=True)
    counted = marked.expand_as(error) if share is None else marked * share
    weight = counted * x0_weight(PATH, level, "velocity", min_level=min_level)
    return (error * weight).sum() / counted.sum().clamp_min(1.0)


def track_losses(
    denoise: Callable[[Tracks], dict[str, Tensor]],
    cells: ClipCells,
    clean: Mapping[str, Tensor],
    noise: Mapping[str, Tensor],
    marks: Mapping[str, tuple[Tensor, Tensor]],
    min_level: float,
    shares: Mapping[str, Tensor] | None = None,
    prediction: Prediction = "x0",
    beside: Tensor | None = None,
) -> dict[str, Tensor]:
    """Loss of each track: `denoise` is shown the clean values with noise at their levels, and gives `prediction`.

    clean and noise: video (B, C, T, h, w), audio (B, C, N). marks: levels and marked cells, both (B, T or N).
    shares: of the tracks that have them, how much each cell counts, (B, 1, ...). beside: channels that the model reads
    beside those of the video, (B, K, T, h, w).
    """
    shares = shares or {}
    tracks, marked = {}, {}
    for name, value in clean.items():
        shape = (len(value), 1, -1) + (1,) * (value.ndim - 3)
        level, marked[name] = (mark.reshape(shape) for mark in marks[name])
        times_s = torch.tensor(cells.times_s(name), device=value.device)
        more = beside if name == VIDEO else None
        tracks[name] = Track(PATH.add_noise(value, noise[name], level), level, times_s, more)
    answers = denoise(tracks)
    x0 = {name: PATH.to_x0(prediction, answers[name], track.values, track.noise) for name, track in tracks.items()}
    return {
        name: velocity_weighted_error(x0[name], clean[name], track.noise, marked[name], min_level, shares.get(name))
        for name, track in tracks.items()
    }
