"""Which pitches are tones, the error against them, and a codec that starts able to hold a tune."""

from __future__ import annotations

import math

import pytest
import torch

from vitascope.models.codecs.waveform.config import ToneBank, WaveformConfig, WaveLevel
from vitascope.models.codecs.waveform.model import WaveformCodec
from vitascope.models.codecs.waveform.tones import PitchInput, semitones_hz
from vitascope.training.objectives.tones import SILENT, TonalPeaks, tone_error

RATE_HZ, HOP = 16000, 320
BANK = ToneBank()


def sines(*semitones: int, level: float = 0.1, num_latents: int = 50) -> torch.Tensor:
    """Samples (1, S) of sines at these semitones of the bank."""
    time_s = torch.arange(num_latents * HOP, dtype=torch.float64) / RATE_HZ
    pitches = semitones_hz(BANK)[list(semitones)]
    return (level * torch.sin(2.0 * math.pi * pitches[:, None] * time_s).sum(0))[None].float()


@pytest.mark.parametrize("semitone", [12, 24, 40, 60])
def test_one_sine_is_one_tone_at_its_level(semitone: int) -> None:
    peaks = TonalPeaks(BANK, HOP, RATE_HZ)(sines(semitone))[0, :, 10:-10]
    assert ((peaks > SILENT).nonzero()[:, 0] == semitone).all()
    assert (peaks[semitone] > SILENT).all()
    # Windows of 1024 samples and more hold many turns of the sine: its level is read within 2%.
    assert torch.allclose(peaks[semitone].exp(), torch.tensor(0.1), rtol=0.02)


def test_a_chord_is_three_tones_and_noise_is_none() -> None:
    peaks = TonalPeaks(BANK, HOP, RATE_HZ)
    chord = (peaks(sines(24, 28, 31))[0, :, 10:-10] > SILENT).any(1).nonzero()[:, 0].tolist()
    assert chord == [24, 28, 31]
    noise = 0.1 * torch.randn(4, 50 * HOP, generator=torch.Generator().manual_seed(0))
    assert (peaks(noise) > SILENT).float().sum(1).mean() < 0.5
    assert (peaks(torch.zeros(1, 10 * HOP)) == SILENT).all()


def test_the_error_is_nought_for_the_truth_and_draws_up_a_silent_sine() -> None:
    peaks = torch.full((1, 4, 3), SILENT)
    peaks[0, 1] = -2.0
    right = peaks.repeat_interleave(2, dim=-1)
    assert tone_error(right, peaks) == 0
    assert tone_error(right - 5.0 * (right == SILENT), peaks) == 0  # softer than silent is as good
    missing = torch.full_like(right, -12.0).requires_grad_()
    error = tone_error(missing, peaks)
    # All cells: a quarter is off by 7 from SILENT to -2; tones: off by 10.
    assert error.detach().item() == pytest.approx(0.5 * 7.0 / 4 + 0.5 * 10.0)
    error.backward()
    assert missing.grad is not None
    assert (missing.grad[0, 1] < 0).all()
    assert (missing.grad[0, 0] == 0).all()


def test_pitches_are_heard_and_an_early_one_is_not_seen_before_it_sounds() -> None:
    sound = torch.cat([torch.zeros(1, 20 * HOP), sines(30, num_latents=30)], 1)[:, None]
    heard = PitchInput(BANK, HOP, RATE_HZ)(sound)[0]
    assert heard[:, -1].argmax() == 30
    assert torch.equal(heard[:, :20], heard[:, :1].expand(-1, 20))
    assert heard[30, 22] > heard[30, 19] + 1.0  # 60 ms later it is plain


def test_a_codec_that_starts_from_pitches_sounds_the_note_it_hears() -> None:
    torch.manual_seed(0)
    levels = (WaveLevel(16, 16, decoder_blocks=1), WaveLevel(16, 20, decoder_blocks=1, kernel=3))
    codec = WaveformCodec(WaveformConfig(8, levels, noisy_blocks=1, tones=ToneBank(channels=16))).eval()
    notes = (20, 26, 32, 38, 44, 50)
    codec.start_from_pitches(torch.stack([sines(note) for note in notes]), 8)
    tones = codec.decoder.tones
    assert tones is not None
    for note in notes:
        with torch.no_grad():
            controls = tones.decode_controls(codec.posterior(sines(note)[:, None])[0])[0, : BANK.num_sines, 100:]
        assert controls.mean(1).argmax() == note
