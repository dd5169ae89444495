"""How near one signal is to another: pixels, bands of frequency, sound, keyframes and tile seams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vitascope.core.errors import ShapeError

PEAK = 255.0
MAX_DB = 100.0


def _same_shape(reference: Tensor, other: Tensor) -> None:
    if reference.shape != other.shape:
        raise ShapeError(f"both sides must have one shape, got {tuple(reference.shape)} and {tuple(other.shape)}")


def psnr_db(reference: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of values in [0, 255], over all of them; 100 dB at most."""
    _same_shape(reference, other)
    error = (reference.double() - other.double()).square().mean().item()
    return MAX_DB if error <= 0 else min(MAX_DB, 10 * float(torch.log10(torch.tensor(PEAK**2 / error))))


def luma(frames: Tensor) -> Tensor:
    """Rec. 601 luma (..., H, W) float32 of colour frames (..., 3, H, W) in [0, 255]."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=frames.device)
    return (frames.float() * weights[:, None, None]).sum(-3)


def ssim(reference: Tensor, other: Tensor) -> float:
    """Mean structural similarity of the luma of frames (..., 3, H, W) in [0, 255].

    Gaussian window of 11 px, deviation 1.5 px, K = (0.01, 0.03), valid area only. Source: Wang et al., IEEE TIP 2004.
    """
    _same_shape(reference, other)
    if min(reference.shape[-2:]) < 11:
        raise ShapeError(f"frames of at least 11 x 11 px are needed, got {tuple(reference.shape[-2:])}")
    offset = torch.arange(11, device=reference.device) - 5.0
    window = torch.exp(-(offset**2) / (2 * 1.5**2))
    window = window / window.sum()
    height, width = reference.shape[-2:]
    x, y = (luma(side).reshape(-1, 1, height, width) for side in (reference, other))

    def smooth(image: Tensor) -> Tensor:
        return functional.conv2d(functional.conv2d(image, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))

    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean().item()


def snr_per_band_db(reference: Tensor, other: Tensor, num_bands: int = 4) -> list[float]:
    """Signal-to-noise ratio in dB in octaves of spatial frequency, lowest first.

    Frames (..., 3, H, W) in [0, 255]. The last band reaches from half to all of the Nyquist frequency and beyond it in
    the corners; each band before it covers half of the next; the first goes down to (but leaves out) the mean.
    """
    _same_shape(reference, other)
    height, width = reference.shape[-2:]
    fy, fx = torch.fft.fftfreq(height).abs() * 2, torch.fft.rfftfreq(width) * 2
    radius = torch.sqrt(fy[:, None] ** 2 + fx[None] ** 2).to(reference.device)
    bands = (num_bands + torch.floor(torch.log2(radius.clamp(min=1e-9)))).clamp(0, num_bands - 1).long()
    clean, noisy = luma(reference), luma(other)
    signal, error = (torch.fft.rfft2(image).abs().square() for image in (clean, clean - noisy))
    levels = []
    for band in range(num_bands):
        chosen = (bands == band) & (radius > 0)
        kept, lost = signal[..., chosen].sum().item(), error[..., chosen].sum().item()
        levels.append(MAX_DB if lost <= 0 else min(MAX_DB, 10 * float(torch.log10(torch.tensor((kept + 1e-9) / lost)))))
    return levels


def log_spectral_distance_db(
    reference: Tensor, other: Tensor, fft_size: int = 512, hop: int = 128, floor_db: float = -60.0
) -> float:
    """Log-spectral distance in dB between samples (..., N) in [-1, 1].

    Per window, the root mean square over bins of the difference of the log power spectra; the mean over windows. Levels
    below `floor_db` relative to a full-scale sine are raised to it, so that inaudible bins do not count. Source: Gray
    and Markel, IEEE TASSP 1976.
    """
    _same_shape(reference, other)
    window = torch.hann_window(fft_size, device=reference.device)
    full_scale = (window.sum() / 2) ** 2

    def level(samples: Tensor) -> Tensor:
        flat = samples.float().reshape(-1, samples.shape[-1])
        spectrum = torch.stft(flat, fft_size, hop, window=window, return_complex=True)
        return (10 * torch.log10(spectrum.abs().square() / full_scale + 1e-12)).clamp(min=floor_db)

    return (level(reference) - level(other)).square().mean(1).sqrt().mean().item()


@dataclass(frozen=True)
class SeamError:
    """Root mean square error in levels of [0, 255] within `margin` px of a tile seam, and everywhere else."""

    seam: float
    interior: float

    @property
    def ratio(self) -> float:
        """Seam over interior: 1 or less means that no seam can be told from the rest."""
        return self.seam / max(self.interior, 1e-9)


def seam_error(
    reference: Tensor, tiled: Tensor, seams_x: Sequence[int], seams_y: Sequence[int], margin: int = 2
) -> SeamError:
    """Error of `tiled` against `reference` (..., H, W) near the columns and rows where tiles meet and elsewhere.

    A seam at x lies between columns x - 1 and x.
    """
    _same_shape(reference, tiled)
    height, width = reference.shape[-2:]
    near = torch.zeros(height, width, dtype=torch.bool, device=reference.device)
    for x in seams_x:
        near[:, max(0, x - margin) : x + margin] = True
    for y in seams_y:
        near[max(0, y - margin) : y + margin] = True
    if not near.any() or near.all():
        raise ShapeError(f"seams {list(seams_x)} and {list(seams_y)} leave nothing to compare in {width}x{height} px")
    error = (reference.float() - tiled.float()).square()
    return SeamError(error[..., near].mean().sqrt().item(), error[..., ~near].mean().sqrt().item())
