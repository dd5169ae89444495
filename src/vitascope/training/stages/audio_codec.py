"""Training the waveform codec on crops of the theatre's sounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitascope.core.errors import InputError, choice
from vitascope.core.random import derive_seed, generator
from vitascope.core.shapes import ClipFormat
from vitascope.media.pictures import write_picture
from vitascope.models.codecs.waveform.config import PRESETS
from vitascope.models.codecs.waveform.model import WaveformCodec
from vitascope.training.objectives.audio_codec import AudioCodecWeights, SpectralScales, SpectralScore
from vitascope.training.objectives.kl import kl_divergence
from vitascope.training.objectives.tones import TonalPeaks, tone_error
from vitascope.training.recipe import Recipe
from vitascope.training.stages.audio_codec_validation import spectrogram_pairs, validation_figures, validation_sounds
from vitascope.weights.checkpoint import load_checkpoint, load_into, save_checkpoint
from vitascope.world.casting import SceneMix, draw_scene
from vitascope.world.sound import synthesise, synthesise_batch

_AUDIBLE = 1e-3


def _rich_in_sounds() -> SceneMix:
    return SceneMix(two_subjects=0.15, face=0.4, bounces=0.5, wind=0.2, rain=0.2, soft_music=0.22, silence=0.03)


@dataclass(frozen=True)
class AudioCodecOptions:
    """What the codec is and what it hears.

    batch_size crops of crop_latents latents from a pool of `pool_clips` clips, made when first needed; varied_fraction
    of the crops are played faster or slower, louder or softer, or two at once, so that the codec meets more sounds
    than the world has. silent_fraction of the crops may be silent, others are drawn again a few times. tune_channels:
    latent channels that start as `start_from_pitches` says, 0 for none. `mix`: what the clips show, rich in sounds.
    Validation: that many held-out clips of each class of sound.
    """

    preset: str = "pocket"
    batch_size: int = 8
    crop_latents: int = 32
    pool_clips: int = 3000
    varied_fraction: float = 0.35
    silent_fraction: float = 0.06
    tune_channels: int = 16
    start: str = ""
    freeze_encoder: bool = False
    validation_clips: int = 6
    weights: AudioCodecWeights = field(default_factory=AudioCodecWeights)
    scales: SpectralScales = field(default_factory=SpectralScales)
    mix: SceneMix = field(default_factory=_rich_in_sounds)

    def __post_init__(self) -> None:
        for name in ("batch_size", "crop_latents", "pool_clips", "validation_clips"):
            if getattr(self, name) < 1:
                raise InputError(f"audio_codec.{name} must be at least 1, got {getattr(self, name)}")


def build(recipe: Recipe, device: torch.device) -> AudioCodecStage:
    """The stage of a recipe."""
    options: AudioCodecOptions = recipe.options
    choice("audio_codec.preset", options.preset, PRESETS)
    return AudioCodecStage(options, recipe.seed, recipe.loop.compile, device)


class AudioCodecStage:
    """Codec, crops of sound, energy score; see `training.stage.Stage`."""

    def __init__(self, options: AudioCodecOptions, seed: int, compile_loss: bool, device: torch.device) -> None:
        self.options = options
        self.seed = seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "init"))
            self.codec = WaveformCodec(PRESETS[options.preset])
        self.format = ClipFormat(sample_rate_hz=self.codec.sample_rate_hz)
        if options.start:
            path = Path(options.start)
            load_into(self.codec, load_checkpoint(path, family="waveform").tensors, name=path.name)
        elif options.tune_channels:
            self.codec.start_from_pitches(self._start_sounds(), options.tune_channels)
        self.codec.encoder.requires_grad_(not options.freeze_encoder)
        self.score = SpectralScore(options.scales).to(device)
        bank = self.codec.config.tones
        self.peaks = None
        if options.weights.tones and bank is not None:
            self.peaks = TonalPeaks(bank, self.codec.hop, self.codec.sample_rate_hz).to(device)
        self._pool: dict[int, Tensor] = {}
        self._autoencode = torch.compile(self.autoencode) if compile_loss else self.autoencode
        self._score = torch.compile(self.score) if compile_loss else self.score

    @property
    def model(self) -> nn.Module:
        return self.codec

    def _start_sounds(self, num_clips: int = 96) -> Tensor:
        """Sounds (B, 1, S) for the start of the linear paths."""
        scenes = [draw_scene(derive_seed(self.seed, "start", i), mix=self.options.mix) for i in range(num_clips)]
        sounds = synthesise_batch(scenes, self.format)
        return sounds[:, None, : sounds.shape[1] // self.codec.hop * self.codec.hop]

    def clip(self, number: int) -> Tensor:
        """Clip `number` of the pool, (S,) int16; kept once made."""
        if number not in self._pool:
            scene = draw_scene(derive_seed(self.seed, "clip", number), mix=self.options.mix)
            self._pool[number] = (synthesise(scene, self.format) * 32767.0).round().to(torch.int16)
        return self._pool[number]

    def batch(self, index: int) -> dict[str, Any]:
        """Crops (B, S) of clips of the pool, float32 in [-1, 1]."""
        draw = generator(self.seed, "crop", index)
        return {"samples": torch.stack([self._crop(draw) for _ in range(self.options.batch_size)])}

    def _crop(self, draw: torch.Generator) -> Tensor:
        varied, may_be_silent, doubled, speed, loudness = torch.rand(5, generator=draw).tolist()
        if varied >= self.options.varied_fraction:
            return self._part(draw, 1.0, may_be_silent < self.options.silent_fraction)
        crop = self._part(draw, 2.0 ** (speed - 0.5), False)
        if doubled < 0.4:
            crop = crop + self._part(draw, 1.0, False)
        return (crop * 10.0 ** (-24.0 * loudness / 20.0 + 0.2)).clamp(-1.0, 1.0)

    def _part(self, draw: torch.Generator, speed: float, may_be_silent: bool) -> Tensor:
        """A crop played `speed` times as fast; of four draws the first that can be heard, unless silence will do."""
        wanted = self.options.crop_latents * self.codec.hop
        taken = round(wanted * speed)
        part = torch.zeros(taken, dtype=torch.int16)
        for _ in range(1 if may_be_silent else 4):
            clip = self.clip(int(torch.randint(self.options.pool_clips, (), generator=draw)))
            start = int(torch.randint(max(1, len(clip) - taken + 1), (), generator=draw))
            part = F.pad(clip[start : start + taken], (0, max(0, taken - len(clip))))
            if part.abs().max() > 32767.0 * _AUDIBLE:
                break
        samples = part.float() / 32767.0
        if taken == wanted:
            return samples
        return F.interpolate(samples[None, None], size=wanted, mode="linear", align_corners=False)[0, 0]

    def loss(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        samples = batch["samples"]
        noises = self._noises(samples, generator)
        mean, log_variance, decoded, log_levels = self._autoencode(samples, *noises)
        with torch.autocast(samples.device.type, enabled=False):
            terms = self._score(samples, *decoded.float().chunk(2))
            if self.peaks is not None and log_levels is not None:
                terms["tones"] = tone_error(log_levels, self.peaks(samples))
            terms["kl"] = kl_divergence(mean.float(), log_variance.float())
        weights = self.options.weights
        loss = torch.stack([getattr(weights, name) * term for name, term in terms.items()]).sum()
        spread = (0.5 * log_variance.detach().float()).exp().mean() / mean.detach().float().std()
        return loss, {**{name: term.detach() for name, term in terms.items()}, "posterior_spread": spread}

    def _noises(self, samples: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Standard normal noise of the posterior, and of the decoder for two decodings of each crop."""
        config, batch = self.codec.config, len(samples)
        stride = config.levels[0].stride
        shapes = (
            (batch, config.latent_channels, samples.shape[1] // config.hop),
            (2 * batch, stride, samples.shape[1] // stride),
        )
        first, second = (torch.randn(shape, generator=generator, device=samples.device) for shape in shapes)
        return first, second

    def autoencode(
        self, samples: Tensor, posterior_noise: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Moments (B, C, T) of the posterior, both decodings (2B, S) of one draw from it, and the logarithms of the
        levels of its sines (B, K, G) if it has any."""
        mean, log_variance = self.codec.posterior(samples[:, None])
        latents = mean.float() + posterior_noise * torch.exp(0.5 * log_variance.float())
        features = self.codec.decoder.trunk(latents)
        decoded = self.codec.decoder.finish(torch.cat([features, features]), noise)
        tones = self.codec.decoder.tones
        if tones is None:
            return mean, log_variance, decoded[:, 0], None
        controls = tones.decode_controls(latents)
        decoded = decoded + tones.sound(controls).repeat(2, 1, 1)
        return mean, log_variance, decoded[:, 0], controls[:, : tones.bank.num_sines]

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        assert isinstance(model, WaveformCodec)
        self._measure_latents(model)
        sounds = validation_sounds(self.options.validation_clips, self.seed, model.hop)
        write_picture(folder / "codec.png", spectrogram_pairs(model, sounds))
        return validation_figures(model, sounds)

    def export(self, model: nn.Module, folder: Path) -> list[Path]:
        """Write the codec in half precision, with the statistics of its latents."""
        assert isinstance(model, WaveformCodec)
        self._measure_latents(model)
        path = folder / "audio_codec.safetensors"
        tensors = {name: value.half() for name, value in model.state_dict().items()}
        save_checkpoint(path, tensors, "waveform", model.config)
        return [path]

    def _measure_latents(self, model: WaveformCodec, num_clips: int = 192) -> None:
        """Set the mean and standard deviation of every latent channel over clips of the world's usual mix; what a
        frozen encoder came with stays."""
        if self.options.freeze_encoder:
            return
        device = next(model.parameters()).device
        model.latent_mean.zero_()
        model.latent_std.fill_(1.0)
        latents = []
        for number in range(num_clips):
            sound = synthesise(draw_scene(derive_seed(self.seed, "statistics", number)), self.format)
            if sound.abs().amax() < _AUDIBLE and number % 4:
                continue  # silence is one point: a few of them are enough
            sound = sound[: len(sound) // model.hop * model.hop].to(device)
            latents.append(model.encode(sound[None, None])[0])
        values = torch.cat(latents, dim=1)
        model.latent_mean.copy_(values.mean(dim=1))
        model.latent_std.copy_(values.std(dim=1).clamp(min=1e-3))
