"""Training the causal video codec on crops of rendered clips."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitascope.core.errors import choice
from vitascope.core.random import derive_seed, generator
from vitascope.core.shapes import ClipFormat
from vitascope.media.pictures import contact_sheet, write_picture
from vitascope.models.codecs.causal_video.config import PRESETS
from vitascope.models.codecs.causal_video.model import CausalVideoCodec
from vitascope.training.objectives.kl import kl_divergence
from vitascope.training.objectives.video_codec import VideoCodecWeights, psnr, reconstruction_terms
from vitascope.training.recipe import Recipe
from vitascope.weights.checkpoint import save_checkpoint
from vitascope.world.casting import draw_scene
from vitascope.world.render import render


@dataclass(frozen=True)
class VideoCodecOptions:
    """What the codec is and what it sees.

    batch_size crops of crop_frames (1 + k*time) x crop_px x crop_px, `crops_per_clip` from each rendered clip of
    `clip_px` px; recoloured_fraction of the clips have their colour channels permuted and scaled, so that the codec
    meets more colours than the world has. Validation: that many whole held-out clips. balance: see `channel_scales`.
    """

    preset: str = "pocket"
    batch_size: int = 16
    crops_per_clip: int = 2
    clip_px: int = 128
    crop_px: int = 64
    crop_frames: int = 17
    recoloured_fraction: float = 0.2
    validation_clips: int = 16
    balance: float = 0.5
    weights: VideoCodecWeights = field(default_factory=VideoCodecWeights)


def build(recipe: Recipe, device: torch.device) -> VideoCodecStage:
    """The stage of a recipe."""
    options: VideoCodecOptions = recipe.options
    choice("video_codec.preset", options.preset, PRESETS)
    return VideoCodecStage(options, recipe.seed, recipe.loop.compile)


class VideoCodecStage:
    """Codec, crops, reconstruction loss; see `training.stage.Stage`."""

    def __init__(self, options: VideoCodecOptions, seed: int, compile_loss: bool) -> None:
        self.options = options
        self.seed = seed
        self.format = ClipFormat(width_px=options.clip_px, height_px=options.clip_px)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "init"))
            self.codec = CausalVideoCodec(PRESETS[options.preset])
            self.codec.start_from_components(self._frames("components", 32))
        self._terms = torch.compile(self.terms) if compile_loss else self.terms

    @property
    def model(self) -> nn.Module:
        return self.codec

    def batch(self, index: int) -> dict[str, Any]:
        """Crops (B, 3, T, h, w) uint8 of freshly rendered clips."""
        opts = self.options
        num_clips = -(-opts.batch_size // opts.crops_per_clip)
        seeds = [derive_seed(self.seed, "clip", index * num_clips + i) for i in range(num_clips)]
        clips = render([draw_scene(seed) for seed in seeds], self.format).movedim(2, -1)
        draw = generator(self.seed, "crop", index)
        crops = []
        for number in range(opts.batch_size):
            clip = clips[number % num_clips]
            start = [self._place(length, size, draw) for length, size in zip(clip.shape, self._crop(), strict=False)]
            t, y, x = (slice(first, first + size) for first, size in zip(start, self._crop(), strict=True))
            crops.append(self._recolour(clip[t, y, x], draw))
        return {"frames": torch.stack(crops)}

    def _frames(self, purpose: str, num_clips: int, split: Literal["train", "held_out"] = "train") -> Tensor:
        """Whole clips (B, 3, T, H, W) in [-1, 1], others for every purpose."""
        scenes = [draw_scene(derive_seed(self.seed, purpose, number), split=split) for number in range(num_clips)]
        return render(scenes, self.format).movedim(1, 2).float() / 127.5 - 1.0

    def _crop(self) -> tuple[int, int, int]:
        return self.options.crop_frames, self.options.crop_px, self.options.crop_px

    @staticmethod
    def _place(length: int, size: int, draw: torch.Generator) -> int:
        return int(torch.randint(length - size + 1, (), generator=draw))

    def _recolour(self, crop: Tensor, draw: torch.Generator) -> Tensor:
        chance, gain, lift = torch.rand(3, generator=draw).tolist()
        order = torch.randperm(3, generator=draw)
        if chance >= self.options.recoloured_fraction:
            return crop
        return (
            (crop[..., order].float() * (0.4 + 0.6 * gain) + 100.0 * (1.0 - gain) * lift).clamp(0, 255).to(torch.uint8)
        )

    def loss(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        frames = batch["frames"].movedim(-1, 1).float() / 127.5 - 1.0
        shape = (len(frames), self.codec.latent_channels, *self._latent_grid())
        noise = torch.randn(shape, generator=generator, device=frames.device)
        terms = self._terms(frames, noise)
        weights = self.options.weights
        loss = torch.stack([getattr(weights, name) * term for name, term in terms.items()]).sum()
        metrics = {name: term.detach() for name, term in terms.items()}
        return loss, {**metrics, "psnr_db": psnr(metrics["squared"])}

    def _latent_grid(self) -> tuple[int, int, int]:
        strides, side = self.codec.strides, self.options.crop_px
        return 1 + (self.options.crop_frames - 1) // strides.time, side // strides.height, side // strides.width

    def terms(self, frames: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Loss terms by the names of VideoCodecWeights; `noise` draws from the posterior."""
        mean, log_variance = self.codec.posterior(frames)
        mean, log_variance = mean.float(), log_variance.float()
        latents = mean + noise * torch.exp(0.5 * log_variance)
        terms = reconstruction_terms(frames, self.codec.decode(latents).float())
        small = self.codec.preview(latents.detach()).float()
        preview = (small - _shrink(frames, small)).square().mean()
        return {**terms, "kl": kl_divergence(mean, log_variance), "preview": preview}

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        assert isinstance(model, CausalVideoCodec)
        squared, shown, previews = [], [], []
        device = next(model.parameters()).device
        for number, clip in enumerate(self._frames("validation", self.options.validation_clips, "held_out")):
            frames = clip[None].to(device)
            latents = model.encode(frames)
            decoded = ((model.decode(latents).clamp(-1, 1) + 1.0) * 127.5).round() / 127.5 - 1.0
            squared.append((decoded - frames).square().mean())
            small = model.preview(latents)
            previews.append((small - _shrink(frames, small)).square().mean())
            if number < 8:
                both = torch.cat([frames, decoded], dim=3)[0].movedim(1, 0)
                shown.append(((both + 1.0) * 127.5).round().to(torch.uint8).cpu())
        write_picture(folder / "codec.png", contact_sheet(shown))
        per_clip = psnr(torch.stack(squared))
        figures = {
            "psnr_db": per_clip.mean(),
            "psnr_min_db": per_clip.min(),
            "preview_db": psnr(torch.stack(previews)).mean(),
        }
        return {name: float(value) for name, value in figures.items()}

    def export(self, model: nn.Module, folder: Path) -> list[Path]:
        """Write the codec in half precision, with the statistics of its latents."""
        assert isinstance(model, CausalVideoCodec)
        self._measure_latents(model)
        path = folder / "video_codec.safetensors"
        tensors = {name: value.half() for name, value in model.state_dict().items()}
        save_checkpoint(path, tensors, "causal_video", model.config)
        return [path]

    def _measure_latents(self, model: CausalVideoCodec, num_clips: int = 48) -> None:
        """Set the mean and standard deviation of every latent channel over clips of the training split; the latter so
        that latents come out at the scales of `channel_scales`."""
        device = next(model.parameters()).device
        model.latent_mean.zero_()
        model.latent_std.fill_(1.0)
        frames = self._frames("statistics", num_clips)
        latents = torch.cat([model.encode(clip[None].to(device)) for clip in frames])
        values = latents.movedim(1, 0).flatten(1)
        model.latent_mean.copy_(values.mean(dim=1))
        model.latent_std.copy_(values.std(dim=1))
        gains = channel_gains(model, latents[: max(1, num_clips // 8), :, :4])
        model.latent_std.div_(channel_scales(gains, self.options.balance))


@torch.no_grad()
def channel_gains(codec: CausalVideoCodec, raw: Tensor, step: float = 0.2) -> Tensor:
    """How much each latent channel shows: RMS change of the frames that `raw` latents (B, C, N, h, w) of mean 0 decode
    to, per unit of its own standard deviation, (C,)."""
    latents, draw = codec.normalise(raw), generator(0, "gains")
    shown = codec.decode(latents)
    gains = []
    for channel in range(codec.latent_channels):
        moved = latents.clone()
        moved[:, channel] += step * torch.randn(moved[:, channel].shape, generator=draw).to(moved)
        gains.append((codec.decode(moved) - shown).square().mean().sqrt() / step)
    return torch.stack(gains)


def channel_scales(gains: Tensor, balance: float) -> Tensor:
    """Standard deviation that each channel is given, at most 1, from how much it shows.

    balance 0: 1 for all; then a channel of faint detail, which is nothing on most of a frame and large on its edges, is
    seen through more noise than the colours are, and weighs as much in the loss. balance 1: in proportion to `gains`,
    as in the pixels themselves; a denoiser then settles colours and places first and detail last.
    """
    return (gains / gains.max()) ** balance


def _shrink(frames: Tensor, like: Tensor) -> Tensor:
    """Frames averaged down to the size of `like`."""
    scale = frames.shape[-1] // like.shape[-1]
    return nn.functional.avg_pool3d(frames, (1, scale, scale))
