"""Signal measures against values known in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from vitascope.core.errors import ShapeError
from vitascope.evaluation.fidelity import (
    MAX_DB,
    log_spectral_distance_db,
    psnr_db,
    seam_error,
    snr_per_band_db,
    ssim,
)


def test_psnr_of_a_constant_error() -> None:
    frames = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    assert psnr_db(frames, frames) == MAX_DB
    assert psnr_db(frames, frames + 5) == pytest.approx(20 * math.log10(255 / 5), abs=1e-6)
    with pytest.raises(ShapeError):
        psnr_db(frames, frames[:1])


def test_ssim_is_one_for_the_same_and_falls_with_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(1, 3, 32, 32, generator=generator) * 255
    levels = [ssim(frames, frames + s * torch.randn(frames.shape, generator=generator)) for s in (0, 5, 40)]
    assert levels[0] == pytest.approx(1.0, abs=1e-5)  # fp32 sums over 121 weights
    assert 1 > levels[1] > levels[2] > 0


def test_noise_of_one_band_is_found_in_that_band() -> None:
    x = torch.arange(64)
    coarse = 100 + 50 * torch.cos(2 * math.pi * 4 * x / 64)  # 4 of 32 cycles: the lowest band of four
    fine = 5 * torch.cos(2 * math.pi * 24 * x / 64)  # three quarters of Nyquist: the highest
    frames = coarse.expand(1, 3, 64, 64)
    bands = snr_per_band_db(frames, frames + fine)
    assert len(bands) == 4
    assert min(bands) == bands[3] < 0 < bands[0]


def test_log_spectral_distance_of_a_gain_is_the_gain() -> None:
    samples = 0.5 * torch.randn(16000, generator=torch.Generator().manual_seed(1))
    assert log_spectral_distance_db(samples, samples) == 0
    # White noise this loud lies far above the floor in nearly all bins, so halving it moves every bin by 6.02 dB.
    assert log_spectral_distance_db(samples, samples / 2) == pytest.approx(20 * math.log10(2), abs=0.05)


def test_a_seam_shows_in_the_ratio() -> None:
    reference = torch.zeros(1, 3, 32, 32)
    noisy = reference + 1
    assert seam_error(reference, noisy, [16], []).ratio == pytest.approx(1.0)
    noisy[..., 15:17] += 4
    error = seam_error(reference, noisy, [16], [])
    assert error.interior == pytest.approx(1.0)
    assert error.seam == pytest.approx(math.sqrt((2 * 25 + 2 * 1) / 4))
    with pytest.raises(ShapeError):
        seam_error(reference, noisy, [], [])
