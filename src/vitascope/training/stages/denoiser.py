"""Training a denoiser of any family and its text encoder on a pool of encoded clips, with a mixture of tasks.

B clips, C channels, T latent frames, N audio latents, S words of text, W bytes of a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitascope.core.protocols import TemporalStrategy
from vitascope.core.random import derive_seed, generator
from vitascope.core.shapes import latent_frames
from vitascope.core.tracks import AUDIO, VIDEO, Tracks
from vitascope.models.text.bytes.model import ByteTokens, tokenize
from vitascope.training.codecs import CodecFiles
from vitascope.training.data import EpochOrder
from vitascope.training.focus import subject_focus
from vitascope.training.objectives.denoising import STILL, ClipCells, check_tasks, draw_cells, track_losses
from vitascope.training.pool import Builder, LatentPool, PoolSpec, build_pool
from vitascope.training.recipe import Recipe
from vitascope.training.stage import Batch
from vitascope.training.stages.denoiser_export import complete_folder, export_parts, usual_defaults
from vitascope.training.stages.denoiser_model import TEXT_FAMILY, TextAndDenoiser, build_net
from vitascope.training.stages.denoiser_options import DenoiserOptions, fitted, packaged
from vitascope.training.stages.denoiser_validation import Validator, opening_beside
from vitascope.weights.checkpoint import file_digest
from vitascope.world.captions import write_caption


def build(recipe: Recipe, device: torch.device) -> DenoiserStage:
    """The stage of a recipe. Raises InputError or CheckpointError when it names what is not there or does not fit."""
    return DenoiserStage(recipe.options, recipe.seed, recipe.loop.compile, device)


class DenoiserStage:
    """Text encoder, denoiser, latent pool, mixture of tasks; see `training.stage.Stage`."""

    def __init__(self, options: DenoiserOptions, seed: int, compile_loss: bool, device: torch.device) -> None:
        check_tasks(options.tasks)
        self.seed, self.device = seed, device
        self.files = CodecFiles(
            packaged(options.video_codec, "video_codec.safetensors"),
            packaged(options.audio_codec, "audio_codec.safetensors"),
        )
        codecs = self.files.load(torch.device("cpu"))
        weights = self.files.digests()
        self.net = build_net(options, seed, codecs)
        self.can = self.net.denoise.capabilities
        self.strides = codecs.video.strides
        options = self.options = fitted(options, self.can, self.strides.time + codecs.video.latent_channels)
        # Models without sound are trained on the pools of those that have it.
        patch = getattr(self.net.denoiser.config, "audio_patch", PoolSpec.audio_patch)
        clip, pool = options.clip, options.pool
        counts, openings = (pool.num_clips, pool.shard_clips), self.can.condition_channels > 0
        self.spec = PoolSpec(weights, pool.mix, clip, patch, pool.seed, "train", *counts, openings)
        starts = {name: getattr(options, name) for name in ("text_encoder", "denoiser") if getattr(options, name)}
        self.inputs = {
            "pool": self.spec.digest,
            **{name: file_digest(packaged(path, f"{name}.safetensors")) for name, path in starts.items()},
        }
        per_s = codecs.audio.sample_rate_hz / codecs.audio.hop
        frames = latent_frames(clip.num_frames, codecs.video.strides.time)
        self.cells = ClipCells.of(frames, codecs.video.strides.time, clip.fps, per_s, patch)
        self.order = EpochOrder(pool.num_clips, derive_seed(seed, "order"))
        self.pool: LatentPool | None = None
        self.focus: dict[int, Tensor] = {}
        if compile_loss:
            # Part by part: equal layers share one graph, which compiles several times faster than the whole.
            for part in self.net.regions:
                part.compile(dynamic=False)
        self.validator = Validator(options.validation, self.spec, self.files, self.cells, device)

    @property
    def model(self) -> nn.Module:
        return self.net

    def prepare(self, say: Callable[[str], None]) -> None:
        """Build what is missing of the latent pool and open it."""
        options = self.options.pool
        builder = Builder(self.files, self.device, options.num_workers)
        folder = build_pool(
            Path(options.folder), self.spec, builder, lambda done, total: say(f"encoding clips: {done} of {total}")
        )
        self.pool = LatentPool(folder, self.spec)

    def batch(self, index: int) -> dict[str, Any]:
        """Latents, cameras (NaN where not given), captions, levels and marks of micro-batch `index`, and a strategy; of
        the tracks that the model has, and cameras where it takes them."""
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
        camera = data["camera"].masked_fill(~shown[:, None, None], float("nan"))
        return {
            **{name: data[name] for name in self.can.tracks},
            **({"camera": camera} if self.can.camera else {}),
            **({"beside": opening_beside(data["opening"], self.strides.time)} if self.spec.openings else {}),
            "words": tokens.words_UW,
            "index": tokens.index_BS,
            "mask": tokens.mask_BS,
            **{f"{name}_levels": cells.levels[name] for name in self.can.tracks},
            **{f"{name}_marked": cells.marked(name) for name in self.can.tracks},
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
        clean = {name: batch[name].float() for name in self.can.tracks}
        noise = {
            name: torch.randn(value.shape, generator=generator, device=value.device) for name, value in clean.items()
        }
        marks = {name: (batch[f"{name}_levels"], batch[f"{name}_marked"]) for name in clean}
        tokens = ByteTokens(batch["words"], batch["index"], batch["mask"])
        shares = {VIDEO: batch["share"].float()} if "share" in batch else {}
        given = (batch.get("camera"), batch["strategy"], batch.get("beside"))
        losses = self.losses(clean, noise, marks, tokens, *given, shares)
        weights = {VIDEO: self.options.video_weight, AUDIO: self.options.audio_weight}
        total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        return total, {f"loss_{name}": loss.detach() for name, loss in losses.items()}

    def losses(
        self,
        clean: dict[str, Tensor],
        noise: dict[str, Tensor],
        marks: dict[str, tuple[Tensor, Tensor]],
        tokens: ByteTokens,
        camera: Tensor | None,
        strategy: TemporalStrategy,
        beside: Tensor | None,
        shares: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Velocity loss of each track."""
        text = self.net.text(tokens)

        def denoise(tracks: Tracks) -> dict[str, Tensor]:
            return self.net.denoise(tracks, text, camera, strategy)

        kind, min_level = self.can.prediction, self.options.min_level
        return track_losses(denoise, self.cells, clean, noise, marks, min_level, shares, kind, beside)

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        assert isinstance(model, TextAndDenoiser)
        return self.validator.run(model.text, model.denoise, folder)

    def export(self, model: nn.Module, folder: Path) -> list[Path]:
        """Write denoiser.safetensors and text_encoder.safetensors in half precision; with what is put beside them the
        folder is a model for `generate`."""
        assert isinstance(model, TextAndDenoiser)
        parts = {"text_encoder": (model.text, TEXT_FAMILY), "denoiser": (model.denoiser, self.options.family)}
        paths = export_parts(folder, parts, self.spec.weights)
        complete_folder(folder, self.files, usual_defaults(self.options.clip, self.can), self.can)
        return paths
