"""Training the denoiser and its text encoder on a pool of encoded clips, with a mixture of tasks.

B clips, C channels, T latent frames, N audio latents, S words of text, W bytes of a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vitascope
from vitascope.core.errors import InputError, choice
from vitascope.core.protocols import FULL, TemporalStrategy
from vitascope.core.random import derive_seed, generator
from vitascope.core.shapes import ClipFormat, latent_frames
from vitascope.core.tracks import AUDIO, VIDEO, Tracks
from vitascope.models.factorised.config import FactorisedConfig
from vitascope.models.factorised.model import FactorisedDenoiser
from vitascope.models.factorised.presets import PRESETS
from vitascope.models.text.bytes.config import BytesConfig
from vitascope.models.text.bytes.model import ByteTextEncoder, ByteTokens, tokenize
from vitascope.training.codecs import CodecFiles, Codecs
from vitascope.training.data import EpochOrder
from vitascope.training.focus import subject_focus
from vitascope.training.objectives.denoising import (
    STILL,
    ClipCells,
    NoiseLevels,
    check_tasks,
    draw_cells,
    track_losses,
)
from vitascope.training.pool import Builder, LatentPool, PoolSpec, build_pool
from vitascope.training.recipe import Recipe, free
from vitascope.training.stage import Batch
from vitascope.training.stages.denoiser_validation import ValidationOptions, Validator
from vitascope.weights.checkpoint import file_digest, load_checkpoint, load_into, save_checkpoint
from vitascope.weights.config import config_from_dict, config_to_dict
from vitascope.world.captions import write_caption
from vitascope.world.casting import SceneMix

POCKET = "pocket"
"""In place of a path: the file that ships with the package."""

FAMILIES = {"text_encoder": "bytes", "denoiser": "factorised"}
"""Family names in the files written by `export`."""

TASK_WEIGHTS = {
    "text": 0.45,
    "image": 0.12,
    "keyframes": 0.06,
    "still": 0.06,
    "extend": 0.08,
    "audio_to_video": 0.06,
    "audio_and_image": 0.03,
    "video_to_audio": 0.09,
    "one_track": 0.05,
}


@dataclass(frozen=True)
class PoolOptions:
    """The clips to train on: how many, of what, and where they are kept. num_workers: processes that encode them."""

    num_clips: int = 8192
    shard_clips: int = 256
    seed: int = 0
    mix: SceneMix = field(default_factory=SceneMix)
    folder: str = free("pools")
    num_workers: int = free(1)


@dataclass(frozen=True)
class ConditionOptions:
    """empty_share: clips whose caption is left out. camera_share: clips whose camera path is given.

    causal, window: shares of batches with that temporal strategy; the others see all frames. window_frames and
    anchor_every: of the window strategy, in latent frames.
    """

    empty_share: float = 0.1
    camera_share: float = 0.3
    causal: float = 0.2
    window: float = 0.0
    window_frames: int = 3
    anchor_every: int = 4

    def __post_init__(self) -> None:
        for name in ("empty_share", "camera_share", "causal", "window"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must lie in [0, 1], got {getattr(self, name)}")

    def strategies(self) -> dict[TemporalStrategy, float]:
        """Strategies and their shares."""
        window = TemporalStrategy("window", self.window_frames, self.anchor_every)
        return {FULL: 1 - self.causal - self.window, TemporalStrategy("causal"): self.causal, window: self.window}


@dataclass(frozen=True)
class DenoiserOptions:
    """What is trained, on what, and how it is marked.

    preset: of the denoiser, `model` the fields of its configuration that differ; `text` the shape of its text encoder.
    video_codec, audio_codec: files, or "pocket" for those in the package. text_encoder: a file to start from, denoiser
    likewise; empty starts afresh. num_words: every caption is padded to it. min_level: see `velocity_weighted_error`.
    focus: how much more the cells of a medium subject count in the loss than others, see `subject_focus`; 0 not at all.
    """

    batch_size: int = 64
    preset: str = "pocket"
    model: dict[str, Any] = field(default_factory=dict)
    text: BytesConfig = field(default_factory=BytesConfig)
    num_words: int = 40
    text_encoder: str = ""
    denoiser: str = ""
    video_codec: str = POCKET
    audio_codec: str = POCKET
    clip: ClipFormat = field(default_factory=ClipFormat)
    pool: PoolOptions = field(default_factory=PoolOptions)
    tasks: dict[str, float] = field(default_factory=lambda: dict(TASK_WEIGHTS))
    noise: NoiseLevels = field(default_factory=NoiseLevels)
    condition: ConditionOptions = field(default_factory=ConditionOptions)
    min_level: float = 0.05
    video_weight: float = 1.0
    audio_weight: float = 0.5
    focus: float = 0.0
    validation: ValidationOptions = field(default_factory=ValidationOptions)


class TextAndDenoiser(nn.Module):
    """The text encoder and the denoiser, trained as one."""

    def __init__(self, text: ByteTextEncoder, denoiser: FactorisedDenoiser) -> None:
        super().__init__()
        self.text = text
        self.denoiser = denoiser


def build(recipe: Recipe, device: torch.device) -> DenoiserStage:
    """The stage of a recipe. Raises InputError or CheckpointError when it names what is not there or does not fit."""
    return DenoiserStage(recipe.options, recipe.seed, recipe.loop.compile, device)


def packaged(name: str, file: str) -> Path:
    """The path that a recipe names; "pocket" is `file` in the package."""
    return Path(vitascope.__path__[0]) / "pocket" / file if name == POCKET else Path(name)


class DenoiserStage:
    """Text encoder, denoiser, latent pool, mixture of tasks; see `training.stage.Stage`."""

    def __init__(self, options: DenoiserOptions, seed: int, compile_loss: bool, device: torch.device) -> None:
        check_tasks(options.tasks)
        self.options, self.seed, self.device = options, seed, device
        self.files = CodecFiles(
            packaged(options.video_codec, "video_codec.safetensors"),
            packaged(options.audio_codec, "audio_codec.safetensors"),
        )
        codecs = self.files.load(torch.device("cpu"))
        weights = self.files.digests()
        self.net = self._build_model(codecs)
        for strategy, share in options.condition.strategies().items():
            if share > 0:
                choice("the model's strategy", strategy.kind, self.net.denoiser.config.strategies)
        clip, pool, patch = options.clip, options.pool, self.net.denoiser.config.audio_patch
        self.spec = PoolSpec(weights, pool.mix, clip, patch, pool.seed, "train", pool.num_clips, pool.shard_clips)
        starts = {name: getattr(options, name) for name in ("text_encoder", "denoiser") if getattr(options, name)}
        self.inputs = {
            "pool": self.spec.digest,
            **{name: file_digest(packaged(path, f"{name}.safetensors")) for name, path in starts.items()},
        }
        per_s = codecs.audio.sample_rate_hz / codecs.audio.hop
        frames = latent_frames(clip.num_frames, codecs.video.strides.time)
        self.strides = codecs.video.strides
        self.cells = ClipCells.of(frames, codecs.video.strides.time, clip.fps, per_s, patch)
        self.order = EpochOrder(pool.num_clips, derive_seed(seed, "order"))
        self.pool: LatentPool | None = None
        self.focus: dict[int, Tensor] = {}
        if compile_loss:
            # Part by part: equal layers share one graph, which compiles several times faster than the whole.
            for part in (self.net.text, *self.net.denoiser.regions):
                part.compile(dynamic=False)
        self._validator = Validator(options.validation, self.spec, self.files, self.cells, device)

    @property
    def model(self) -> nn.Module:
        return self.net

    def _build_model(self, codecs: Codecs) -> TextAndDenoiser:
        options = self.options
        config = config_to_dict(PRESETS[choice("denoiser.preset", options.preset, PRESETS)])
        channels = {"video_channels": codecs.video.latent_channels, "audio_channels": codecs.audio.latent_channels}
        config |= {**channels, "text_width": options.text.width, **options.model}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "init"))
            text = ByteTextEncoder(options.text)
            denoiser = FactorisedDenoiser(config_from_dict(FactorisedConfig, config))
        for module, name in ((text, "text_encoder"), (denoiser, "denoiser")):
            if getattr(options, name):
                path = packaged(getattr(options, name), f"{name}.safetensors")
                load_into(module, load_checkpoint(path, family=FAMILIES[name]).tensors, name=path.name)
        return TextAndDenoiser(text, denoiser)

    def prepare(self, say: Callable[[str], None]) -> None:
        """Build what is missing of the latent pool and open it."""
        options = self.options.pool
        builder = Builder(self.files, self.device, options.num_workers)
        folder = build_pool(
            Path(options.folder), self.spec, builder, lambda done, total: say(f"encoding clips: {done} of {total}")
        )
        self.pool = LatentPool(folder, self.spec)

    def batch(self, index: int) -> dict[str, Any]:
        """Latents, cameras (NaN where not given), captions, levels and marks of micro-batch `index`, and a strategy."""
        assert self.pool is not None, "prepare() comes first"
        options, condition = self.options, self.options.condition
        numbers = self.order.items(index, options.batch_size)
        draw = generator(self.seed, "batch", index)
        data = self.pool.take(numbers)
        cells = draw_cells(len(numbers), self.cells, options.tasks, options.noise, draw, data["still_frame"])
        rows = (cells.task == STILL).nonzero()[:, 0]
        video = data["video"]
        video[rows, :, data["still_frame"][rows]] = data["still"][rows]
        shown = torch.rand(len(numbers), generator=draw) < condition.camera_share
        empty = (torch.rand(len(numbers), generator=draw) < condition.empty_share).tolist()
        captions = [
            "" if empty[row] else write_caption(self.pool.scene(number), derive_seed(self.seed, "caption", index, row))
            for row, number in enumerate(numbers)
        ]
        tokens = tokenize(captions, options.text, options.num_words)
        strategies = condition.strategies()
        strategy = int(torch.multinomial(torch.tensor(list(strategies.values())), 1, generator=draw))
        return {
            VIDEO: video,
            AUDIO: data["audio"],
            "camera": data["camera"].masked_fill(~shown[:, None, None], float("nan")),
            "words": tokens.words_UW,
            "index": tokens.index_BS,
            "mask": tokens.mask_BS,
            **{f"{name}_levels": cells.levels[name] for name in (VIDEO, AUDIO)},
            **{f"{name}_marked": cells.marked(name) for name in (VIDEO, AUDIO)},
            **({"share": self._shares(numbers)} if options.focus > 0 else {}),
            "strategy": list(strategies)[strategy],
        }

    def _shares(self, numbers: Sequence[int]) -> Tensor:
        """How much the cells of these clips count, (B, 1, T, h, w), fp16. Kept: 2 kB a clip, a millisecond to make."""
        assert self.pool is not None
        for number in numbers:
            if number not in self.focus:
                self.focus[number] = subject_focus(self.pool.scene(number), self.options.clip, self.strides).half()
        return 1.0 + self.options.focus * torch.stack([self.focus[number] for number in numbers])[:, None]

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        clean = {name: batch[name].float() for name in (VIDEO, AUDIO)}
        noise = {
            name: torch.randn(value.shape, generator=generator, device=value.device) for name, value in clean.items()
        }
        marks = {name: (batch[f"{name}_levels"], batch[f"{name}_marked"]) for name in clean}
        tokens = ByteTokens(batch["words"], batch["index"], batch["mask"])
        shares = {VIDEO: batch["share"].float()} if "share" in batch else {}
        losses = self.losses(clean, noise, marks, tokens, batch["camera"], batch["strategy"], shares)
        weights = {VIDEO: self.options.video_weight, AUDIO: self.options.audio_weight}
        total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        return total, {f"loss_{name}": loss.detach() for name, loss in losses.items()}

    def losses(
        self,
        clean: dict[str, Tensor],
        noise: dict[str, Tensor],
        marks: dict[str, tuple[Tensor, Tensor]],
        tokens: ByteTokens,
        camera: Tensor,
        strategy: TemporalStrategy,
        shares: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Velocity loss of each track."""
        text = self.net.text(tokens)

        def denoise(tracks: Tracks) -> dict[str, Tensor]:
            return self.net.denoiser(tracks, text, camera, strategy)

        return track_losses(denoise, self.cells, clean, noise, marks, self.options.min_level, shares)

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        assert isinstance(model, TextAndDenoiser)
        return self._validator.run(model.text, model.denoiser, folder)

    def export(self, model: nn.Module, folder: Path) -> list[Path]:
        """Write denoiser.safetensors and text_encoder.safetensors in half precision."""
        assert isinstance(model, TextAndDenoiser)
        modules = {"text_encoder": model.text, "denoiser": model.denoiser}
        paths = []
        for name, module in modules.items():
            paths.append(folder / f"{name}.safetensors")
            tensors = {key: value.half() for key, value in module.state_dict().items()}
            save_checkpoint(paths[-1], tensors, FAMILIES[name], module.config, self.spec.weights)
        return paths
