"""Which pitches of a sound are tones, and the error of decoded levels against that: an aid to the audio codec.

Levels of sines are exponentials, so a spectral loss hardly moves the ones that are far too soft, and a decoder that
also has noise to offer never learns to sing. This term moves their logarithms.

B batch, S samples, K pitches, T latents (S = T * hop).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vitascope.models.codecs.waveform.config import ToneBank
from vitascope.models.codecs.waveform.tones import semitones_hz

SILENT = -9.0
"""Natural logarithm of the level below which a sine counts as silent."""
_LONGEST = 4096
_REACH = 8
_PROMINENCE = 4.0
_SOFTEST = 5e-4


class TonalPeaks(nn.Module):
    """Samples (B, S) to the logarithm of the level of every pitch that is a tone, SILENT elsewhere, (B, K, T).

    A tone is louder than both neighbours and stands out by 12 dB from the median of the pitches within 8 semitones.
    Each pitch is heard through a window around the middle of the latent that is just long enough to tell semitones
    apart, but not longer than 4096 samples.
    """

    def __init__(self, bank: ToneBank, hop: int, sample_rate_hz: int) -> None:
        super().__init__()
        self.hop = hop
        pitches = semitones_hz(bank)
        lengths = (33.0 * sample_rate_hz / pitches).clamp(1024.0, float(_LONGEST))
        samples = torch.arange(_LONGEST, dtype=torch.float64) - 0.5 * (_LONGEST - 1)
        inside = (samples.abs() < 0.5 * lengths[:, None]).double()
        window = inside * torch.cos(math.pi * samples / lengths[:, None]).square()
        angle = 2.0 * math.pi / sample_rate_hz * pitches[:, None] * samples
        window = 2.0 * window / window.sum(dim=1, keepdim=True)
        self.kernels: Tensor
        self.register_buffer(
            "kernels", (torch.cat([angle.cos(), angle.sin()]) * window.repeat(2, 1)).float()[:, None], persistent=False
        )

    def forward(self, samples: Tensor) -> Tensor:
        margin = (_LONGEST - self.hop) // 2
        padded = nn.functional.pad(samples[:, None].float(), (margin, margin))
        cosine, sine = nn.functional.conv1d(padded, self.kernels, stride=self.hop).chunk(2, dim=1)
        level_BTK = (cosine.square() + sine.square() + 1e-12).sqrt().transpose(1, 2)
        around = nn.functional.pad(level_BTK, (_REACH, _REACH), mode="replicate").unfold(-1, 2 * _REACH + 1, 1)
        highest = nn.functional.max_pool1d(level_BTK, 3, 1, 1)
        tonal = (level_BTK == highest) & (level_BTK > _PROMINENCE * around.median(dim=-1).values)
        log_BTK = torch.where(tonal & (level_BTK > _SOFTEST), level_BTK.log(), SILENT)
        return log_BTK.clamp(min=SILENT).transpose(1, 2)


def tone_error(log_levels: Tensor, peaks: Tensor) -> Tensor:
    """Mean absolute error of log levels (B, K, T * steps) against `TonalPeaks`: half of all cells, half of tones."""
    target = peaks.repeat_interleave(log_levels.shape[-1] // peaks.shape[-1], dim=-1)
    error = (log_levels.clamp(min=SILENT) - target).abs()
    tonal = (target > SILENT).to(error.dtype)
    # Below SILENT all is well for silence; a sine that should sound must still be drawn up from there.
    drawn = ((log_levels - target).abs() * tonal).sum() / tonal.sum().clamp(min=1.0)
    return 0.5 * error.mean() + 0.5 * drawn
