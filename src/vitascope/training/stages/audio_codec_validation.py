"""What a waveform codec does to the sounds of the theatre, class by class.

B batch, S samples, T latents, F frames, M mel bands. Sounds are float32 in [-1, 1] at the codec's sample rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitascope.core.random import derive_seed
from vitascope.core.shapes import ClipFormat
from vitascope.media.pictures import spectrogram_picture
from vitascope.models.codecs.waveform.model import WaveformCodec
from vitascope.training.objectives.audio_codec import log_mel, stft_magnitude
from vitascope.world.casting import SceneMix, Split, draw_scene, place
from vitascope.world.motion import impact_times
from vitascope.world.scene import VOWELS, Scene, Subject
from vitascope.world.sound import synthesise
from vitascope.world.speech import speech_timeline

_NEPER_DB = 20.0 / math.log(10.0)
_QUIET = SceneMix(two_subjects=0, face=0, bounces=0, wind=0, rain=0, soft_music=0, silence=0)
CLASSES: dict[str, SceneMix] = {
    "speech": SceneMix(two_subjects=0, face=1, wind=0, rain=0, soft_music=0, silence=0),
    "thud": SceneMix(two_subjects=0, face=0, camera=0, bounces=1, wind=0, rain=0, soft_music=0, silence=0),
    "wind": SceneMix(two_subjects=0, face=0, camera=0, bounces=0, wind=1, rain=0, soft_music=0, silence=0),
    "rain": SceneMix(two_subjects=0, face=0, camera=0, bounces=0, wind=0, rain=1, soft_music=0, silence=0),
    "music": SceneMix(two_subjects=0, face=0, camera=0, bounces=0, wind=0, rain=0, soft_music=1, silence=0),
    "mixed": SceneMix(two_subjects=0.5, face=0.5, camera=0, bounces=1, wind=0.4, rain=0.3, soft_music=0.3, silence=0),
    "silence": _QUIET,
}
TONAL = ("speech", "thud", "music")
NOISY = ("wind", "rain")
PURE = (*TONAL, *NOISY, "silence")


@dataclass(frozen=True)
class ClassSounds:
    """Held-out sounds of one class (B, S), cut to whole latents, and the times of impacts in each."""

    samples: Tensor
    impacts_s: tuple[tuple[float, ...], ...]


def validation_sounds(num_clips: int, seed: int, hop: int, split: str = "validation") -> dict[str, ClassSounds]:
    """`num_clips` sounds of each of CLASSES; another `split` name gives other sounds."""
    fmt = ClipFormat()
    length = fmt.num_samples // hop * hop
    sounds = {}
    for name, mix in CLASSES.items():
        part: Split = "held_out" if split == "validation" else "train"
        scenes = [draw_scene(derive_seed(seed, split, name, i), mix=mix, split=part) for i in range(num_clips)]
        samples = torch.stack([synthesise(scene, fmt)[:length] for scene in scenes])
        impacts = tuple(
            tuple(time for subject in scene.subjects for time in impact_times(subject, fmt.duration_s))
            for scene in scenes
        )
        sounds[name] = ClassSounds(samples, impacts)
    return sounds


def validation_figures(codec: WaveformCodec, sounds: Mapping[str, ClassSounds]) -> dict[str, float]:
    """Errors by class in dB, onset errors in ms, shares told apart, level of silence, statistics of the latents."""
    device, rate_hz = next(codec.parameters()).device, codec.sample_rate_hz
    figures: dict[str, float] = {}
    decoded: dict[str, Tensor] = {}
    latents = []
    for name, group in sounds.items():
        coded = codec.encode(group.samples[:, None].to(device))
        decoded[name] = codec.decode(coded)[:, 0].cpu()
        latents.append(coded.movedim(1, 0).flatten(1))
        figures[f"mel_{name}_db"] = mel_error_db(group.samples, decoded[name], rate_hz)
        if name in TONAL:
            figures[f"si_sdr_{name}_db"] = float(si_sdr_db(group.samples, decoded[name]).median())
        if name in NOISY:
            figures[f"average_{name}_db"] = average_error_db(group.samples, decoded[name], rate_hz)
            figures[f"fluctuation_{name}_db"] = fluctuation_db(decoded[name]) - fluctuation_db(group.samples)
    figures["mel_db"] = sum(figures[f"mel_{name}_db"] for name in sounds) / len(sounds)
    figures["silence_db"] = 20.0 * math.log10(float(decoded["silence"].square().mean().sqrt()) + 1e-8)
    onsets = onset_errors_ms(sounds["thud"], decoded["thud"], rate_hz)
    figures["onset_median_ms"] = float(onsets.median())
    figures["onset_p95_ms"] = float(onsets.abs().quantile(0.95))
    figures["classes_told_apart"] = classes_told_apart(sounds, decoded, rate_hz)
    figures["vowels_told_apart"] = vowels_told_apart(codec)
    figures["latent_std"] = float(torch.cat(latents, dim=1).std())
    return figures


def mel_error_db(target: Tensor, decoded: Tensor, rate_hz: int) -> float:
    """Mean absolute difference of log-mel bands in dB, with a floor of -70 dB."""
    return _NEPER_DB * float((log_mel(target, rate_hz) - log_mel(decoded, rate_hz)).abs().mean())


def average_error_db(target: Tensor, decoded: Tensor, rate_hz: int) -> float:
    """As `mel_error_db` for powers averaged over 0.25 s, which do not depend on the draw of a noise."""
    powers = [(2.0 * log_mel(sound, rate_hz)).exp() for sound in (target, decoded)]
    smooth = [torch.nn.functional.avg_pool1d(power.transpose(1, 2), 16).log() for power in powers]
    return 0.5 * _NEPER_DB * float((smooth[0] - smooth[1]).abs().mean())


def fluctuation_db(sounds: Tensor) -> float:
    """How much the level of an STFT bin varies around its own short-time average: 5.6 dB for noise, less for tones."""
    level = _NEPER_DB * (stft_magnitude(sounds, 512, 512) + 1e-5).log()
    trend = torch.nn.functional.avg_pool1d(level.transpose(1, 2), 9, 1, 4, count_include_pad=False).transpose(1, 2)
    return float((level - trend).square().mean().sqrt())


def si_sdr_db(target: Tensor, decoded: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio (B,) in dB. Source: Le Roux et al. 2019, equation 5."""
    scale = (target * decoded).sum(dim=1, keepdim=True) / target.square().sum(dim=1, keepdim=True).clamp(min=1e-9)
    wanted = scale * target
    return 10.0 * torch.log10(wanted.square().sum(dim=1) / (wanted - decoded).square().sum(dim=1).clamp(min=1e-9))


def onset_errors_ms(group: ClassSounds, decoded: Tensor, rate_hz: int) -> Tensor:
    """For every impact: when the decoding's thud sets in, minus when the original's does."""
    errors = []
    for original, copy, impacts_s in zip(group.samples, decoded, group.impacts_s, strict=True):
        for impact_s in impacts_s:
            first, last = round((impact_s - 0.06) * rate_hz), round((impact_s + 0.06) * rate_hz)
            if first >= 0 and last <= len(original):
                times = [onset_s(sound[first:last], rate_hz) for sound in (original, copy)]
                errors.append(1000.0 * (times[1] - times[0]))
    return torch.tensor(errors)


def onset_s(samples: Tensor, rate_hz: int) -> float:
    """When the level of (S,) samples, over 1 ms, first reaches a quarter of its highest."""
    width = rate_hz // 1000
    level = samples.square().unfold(0, width, 1).mean(dim=-1).sqrt()
    return float((level >= 0.25 * level.max()).nonzero()[0]) / rate_hz


def classes_told_apart(sounds: Mapping[str, ClassSounds], decoded: Mapping[str, Tensor], rate_hz: int) -> float:
    """Share of decodings whose nearest class, by the mean feature of that class's other originals, is their own."""
    features = {name: _features(sounds[name].samples, rate_hz) for name in PURE}
    right = total = 0
    for name in PURE:
        for i, feature in enumerate(_features(decoded[name], rate_hz)):
            distances = {}
            for other, values in features.items():
                rest = torch.cat([values[:i], values[i + 1 :]]) if other == name and len(values) > 1 else values
                distances[other] = float((rest.mean(dim=0) - feature).abs().mean())
            right += min(distances, key=lambda key: distances[key]) == name
            total += 1
    return right / total


def _features(sounds: Tensor, rate_hz: int) -> Tensor:
    """Mean and spread over time of log-mel bands, and mean flux: (B, 3M)."""
    mel = log_mel(sounds, rate_hz)
    return torch.cat([mel.mean(dim=1), mel.std(dim=1), mel.diff(dim=1).abs().mean(dim=1)], dim=1)


def vowels_told_apart(codec: WaveformCodec) -> float:
    """Share of decoded vowels whose spectrum is nearest to the original of the same vowel, said in another clip."""
    fmt, rate_hz = ClipFormat(), codec.sample_rate_hz
    device = next(codec.parameters()).device
    right = total = 0
    templates = torch.stack([_vowels(_spoken((vowel,) * 4, 1, fmt), fmt, rate_hz, 4).mean(dim=0) for vowel in VOWELS])
    for shift in range(len(VOWELS)):
        order = [(shift + 2 * i) % len(VOWELS) for i in range(4)]
        sound = _spoken(tuple(VOWELS[i] for i in order), 100 + shift, fmt)
        whole = sound[: len(sound) // codec.hop * codec.hop]
        decoded = codec.decode(codec.encode(whole[None, None].to(device)))[0, 0].cpu()
        for heard, meant in zip(_vowels(decoded, fmt, rate_hz, 4), order, strict=True):
            right += int((templates - heard).abs().mean(dim=1).argmin()) == meant
            total += 1
    return right / total


def _spoken(syllables: Sequence[str], seed: int, fmt: ClipFormat) -> Tensor:
    scene = Scene((Subject("red", "face", syllables=tuple(syllables)),), "gray")
    return synthesise(place(scene, seed, fmt), fmt)


def _vowels(sound: Tensor, fmt: ClipFormat, rate_hz: int, count: int) -> Tensor:
    """Mean log-mel spectrum (count, M), without its mean level, of each vowel of a clip that says `count` of them."""
    segments = [s for s in speech_timeline(("a",) * count, fmt.duration_s).segments if s.phoneme == "a"]
    mel = log_mel(sound[None], rate_hz)[0]
    frames = rate_hz / 256
    parts = [mel[math.ceil((s.start_s + 0.04) * frames) : int((s.end_s - 0.04) * frames)].mean(dim=0) for s in segments]
    spectra = torch.stack(parts)
    return spectra - spectra.mean(dim=1, keepdim=True)


def spectrogram_pairs(codec: WaveformCodec, sounds: Mapping[str, ClassSounds]) -> Tensor:
    """(3, H, W) uint8: for each class one original, and its decoding to the right of it."""
    device, rows = next(codec.parameters()).device, []
    for group in sounds.values():
        original = group.samples[0]
        decoded = codec.decode(codec.encode(original[None, None].to(device)))[0, 0].cpu()
        pictures = [spectrogram_picture(sound, codec.sample_rate_hz, 480, 128) for sound in (original, decoded)]
        gap = torch.full((3, 128, 6), 255, dtype=torch.uint8)
        rows += [torch.cat([pictures[0], gap, pictures[1]], dim=2), torch.full((3, 6, 966), 255, dtype=torch.uint8)]
    return torch.cat(rows[:-1], dim=1)
