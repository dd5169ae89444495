"""Losses of the audio codec: an energy score over spectra at several resolutions, mel bands and the waveform itself.

B batch, S samples, F frames, K frequency bins, M mel bands. Samples are (B, S) in [-1, 1].

The decoder draws noise, so its output is a distribution, and it is scored as one: twice decoded with different noise,
    score = (d(x, y) + d(x, y')) / 2 - d(y, y') / 2
is smallest when y is distributed as x given the latent. A plain distance d(x, y) is smallest at a median instead, which
for wind and rain sounds like a chord. Source: Gritsenko et al. 2020 ("A Spectral Energy Distance for Parallel Speech
Synthesis"), equation 4; the spectra at several resolutions: Yamamoto et al. 2020 (Parallel WaveGAN).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitascope.core.errors import InputError


@dataclass(frozen=True)
class AudioCodecWeights:
    """Weights of the terms: log magnitudes, magnitudes, log mel bands, waveform, KL, and `tones.tone_error`."""

    log_spectrum: float = 1.0
    spectrum: float = 1.0
    mel: float = 1.0
    waveform: float = 0.2
    kl: float = 2e-3
    tones: float = 0.0


@dataclass(frozen=True)
class SpectralScales:
    """What is compared: STFT windows in samples (hop a half), and (window, bands) of the mel spectra.

    floor: amplitude below which magnitudes count as silence (3e-4 is -70 dB of full scale, for white noise).
    """

    sample_rate_hz: int = 16000
    windows: tuple[int, ...] = (64, 256, 512, 1024, 2048)
    mels: tuple[tuple[int, int], ...] = ((256, 24), (1024, 80))
    floor: float = 3e-4

    def __post_init__(self) -> None:
        unknown = [window for window, _ in self.mels if window not in self.windows]
        if unknown:
            raise InputError(f"mel windows {unknown} must be among the STFT windows {self.windows}")


DEFAULT_SCALES = SpectralScales()


class SpectralScore(nn.Module):
    """The energy score of two decodings of each sound, term by term."""

    def __init__(self, scales: SpectralScales = DEFAULT_SCALES) -> None:
        super().__init__()
        self.scales = scales
        for window, bands in scales.mels:
            self.register_buffer(f"bank_{window}", mel_bank(bands, window, scales.sample_rate_hz), persistent=False)

    def forward(self, target: Tensor, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        """Terms by the names of AudioCodecWeights (without KL) for samples (B, S) and two decodings of them.

        Magnitudes and waveform are relative to each target's loudness. With first and second the same this is the
        plain distance.
        """
        batch = len(target)
        sounds = torch.cat([target, first, second]).float()
        loudness = target.float().square().mean(dim=1).sqrt() + 0.02
        scale = loudness.repeat(3)[:, None, None]
        banks = dict(self.scales.mels)
        terms: dict[str, list[Tensor]] = {"log_spectrum": [], "spectrum": [], "mel": []}
        for window in self.scales.windows:
            magnitude = stft_magnitude(sounds, window, window // 2)
            terms["log_spectrum"].append(energy_score((magnitude + self.scales.floor).log(), batch))
            terms["spectrum"].append(energy_score(magnitude / scale, batch))
            if window in banks:
                bank = self.get_buffer(f"bank_{window}")
                terms["mel"].append(energy_score((magnitude @ bank + self.scales.floor).log(), batch))
        means = {name: torch.stack(values).mean() for name, values in terms.items() if values}
        return {**means, "waveform": energy_score(sounds / scale[:, 0], batch)}


def energy_score(features: Tensor, batch: int) -> Tensor:
    """(d(x, y) + d(x, y') - d(y, y')) / 2 with d the mean absolute difference; features (3 * batch, ...): x, y, y'."""
    target, first, second = features.split(batch)
    to_target = (target - first).abs().mean() + (target - second).abs().mean()
    return 0.5 * (to_target - (first - second).abs().mean())


def stft_magnitude(samples: Tensor, window: int, hop: int | None = None) -> Tensor:
    """Magnitudes (B, F, K) of samples (B, S), Hann window, hop a quarter of it unless given.

    Scaled so that white noise of standard deviation s has a root mean square of s in every bin.
    """
    weights = torch.hann_window(window, device=samples.device)
    spectrum = torch.stft(
        samples, window, window // 4 if hop is None else hop, window=weights, return_complex=True, pad_mode="constant"
    )
    power = torch.view_as_real(spectrum).square().sum(dim=-1)
    return (power / weights.square().sum() + 1e-12).sqrt().transpose(1, 2)


def mel_bank(num_bands: int, window: int, sample_rate_hz: int) -> Tensor:
    """Triangular weights (K, M) that average STFT bins into bands spaced evenly in mel up to half the sample rate.

    Each band's weights sum to 1. Source: O'Shaughnessy 1987 for the scale.
    """
    top_mel = 2595.0 * math.log10(1.0 + 0.5 * sample_rate_hz / 700.0)
    edges_hz = 700.0 * (10.0 ** (torch.linspace(0.0, top_mel, num_bands + 2) / 2595.0) - 1.0)
    bins_hz = torch.linspace(0.0, 0.5 * sample_rate_hz, window // 2 + 1)[:, None]
    low, centre, high = edges_hz[:-2], edges_hz[1:-1], edges_hz[2:]
    # A band narrower than a bin still gets the bins next to its centre.
    least = 0.5 * sample_rate_hz / (window // 2)
    rise = (bins_hz - torch.minimum(low, centre - least)) / torch.maximum(centre - low, torch.tensor(least))
    fall = (torch.maximum(high, centre + least) - bins_hz) / torch.maximum(high - centre, torch.tensor(least))
    weights = torch.minimum(rise, fall).clamp(min=0.0)
    return weights / weights.sum(dim=0)


def log_mel(samples: Tensor, sample_rate_hz: int, window: int = 1024, num_bands: int = 80) -> Tensor:
    """Natural logarithm of mel-band magnitudes (B, F, M) of samples (B, S), with a floor of -70 dB."""
    bank = mel_bank(num_bands, window, sample_rate_hz).to(samples.device)
    return (stft_magnitude(samples, window) @ bank + DEFAULT_SCALES.floor).log()
