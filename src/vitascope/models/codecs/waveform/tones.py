"""Tones of a waveform decoder: sines whose levels the latents say, and whose phases nobody has to code.

B batch, C latent channels, T latents, K sines of fixed pitch, H harmonics of a voice, G steps (a few a latent), L
samples of a step (T * hop = G * L).

A codec of 50 latents a second has no room for the phases of tones, and a decoder of convolutions cannot keep a phase
over a second; it would play music as noise of the right colour. So the sound is, besides what the convolutions make,

    sum_k a_k(t) sin(2 pi f_k t + p_k) + sum_h b_h(t) sin(2 pi h turns(t)),    turns' = pitch(t)

with f_k a semitone apart and pitch(t) decoded too. Levels and pitch go straight from step to step. A phase follows from
the position in the clip and the pitches before it, so a stream equals the whole.

Sources: Serra and Smith 1990 (sines plus noise); Engel et al. 2020 (DDSP) for learning it by spectra.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vitascope.models.codecs.waveform.config import ToneBank
from vitascope.models.codecs.waveform.stream import WaveState
from vitascope.nn.causal_conv import TailCache
from vitascope.nn.conv1d import CausalConv1d, ResidualUnit1d, depth_to_time, past_and_present

_GOLDEN = 0.6180339887
_QUIET = -6.0
"""Natural logarithm of the level that every sine starts with."""
_SOFTER = 1.5


def semitones_hz(bank: ToneBank) -> Tensor:
    """The fixed pitches of a bank, (K,) float64."""
    return bank.lowest_hz * 2.0 ** (torch.arange(bank.num_sines, dtype=torch.float64) / 12.0)


class PitchInput(nn.Module):
    """Samples (B, 1, T * hop) to how loud each pitch of the bank has been of late, (B, K, T), about -3 to 3.

    A convolutional encoder that soon halves its rate again and again cannot tell two low semitones apart; a window of
    2048 samples can. It leans to its end, so that a new note is seen within about 40 ms.
    """

    def __init__(self, bank: ToneBank, hop: int, sample_rate_hz: int) -> None:
        super().__init__()
        self.hop, self.history = hop, max(0, bank.window - hop)
        samples = torch.arange(bank.window, dtype=torch.float64)
        window = torch.sin(math.pi * ((samples + 0.5) / bank.window).square()).square()
        angle = 2.0 * math.pi / sample_rate_hz * semitones_hz(bank)[:, None] * samples
        kernels = torch.cat([angle.cos(), angle.sin()]) * (2.0 * window / window.sum())
        self.kernels: Tensor
        self.register_buffer("kernels", kernels.float()[:, None], persistent=False)

    def forward(self, samples: Tensor, tails: TailCache | None = None) -> Tensor:
        with torch.autocast(samples.device.type, enabled=False):
            heard = past_and_present(self, samples.float(), self.history, tails)
            cosine, sine = nn.functional.conv1d(heard, self.kernels, stride=self.hop).chunk(2, dim=1)
            amplitude = (cosine.square() + sine.square() + 1e-10).sqrt()
            return (0.5 * (torch.log(amplitude) - _QUIET)).to(samples.dtype)


class Tones(nn.Module):
    """Raw latents (B, C, T) to the sum of sines (B, 1, T * hop), computed in fp32 whatever the precision around."""

    def __init__(self, bank: ToneBank, latent_channels: int, hop: int, sample_rate_hz: int) -> None:
        super().__init__()
        self.bank, self.sample_rate_hz = bank, sample_rate_hz
        self.step_samples = hop // bank.steps
        self.conv_in = CausalConv1d(latent_channels, bank.channels, 3)
        self.unit = ResidualUnit1d(bank.channels, 3, 1)
        outputs = bank.num_sines + bank.num_harmonics + 1
        self.controls = nn.Conv1d(bank.channels, outputs * bank.steps, 1)
        nn.init.normal_(self.controls.weight, std=0.1 / bank.channels**0.5)
        with torch.no_grad():
            assert self.controls.bias is not None
            self.controls.bias.fill_(_QUIET).view(outputs, bank.steps)[-1] = 0.0
        # The linear path: every level from each latent itself; zero until `start_from` is called.
        self.linear = nn.Conv1d(latent_channels, bank.num_sines + bank.num_harmonics, 1)
        for parameter in self.linear.parameters():
            nn.init.zeros_(parameter)
        self.basis: Tensor
        self.register_buffer("basis", self._basis(), persistent=False)

    def _basis(self) -> Tensor:
        """Cosine and sine of every pitch within a step, plain and rising from 0 to 1, (4K, L)."""
        samples = torch.arange(self.step_samples, dtype=torch.float64)
        angle_KL = 2.0 * math.pi / self.sample_rate_hz * semitones_hz(self.bank)[:, None] * samples
        rise_L = samples / self.step_samples
        waves = torch.cat([angle_KL.cos(), angle_KL.sin()])
        return torch.cat([waves, waves * rise_L]).float()

    @torch.no_grad()
    def start_from(self, basis_KC: Tensor, mean_K: Tensor) -> None:
        """Let the linear path be that of latents whose loudness per pitch (see PitchInput) is basis_KC @ latent +
        mean_K, the latents being the first C channels. A harmonic starts softer than the sine that is nearest to it."""
        harmonics_hz = self.bank.pitch_hz * torch.arange(1, self.bank.num_harmonics + 1, dtype=torch.float64)
        nearest = (harmonics_hz[:, None].log2() - semitones_hz(self.bank).log2()).abs().argmin(dim=1)
        rows = torch.cat([torch.arange(self.bank.num_sines), nearest])
        assert self.linear.bias is not None
        self.linear.weight[:, : basis_KC.shape[1], 0] = (2.0 * basis_KC[rows]).float()
        self.linear.bias.copy_(2.0 * mean_K[rows])
        self.linear.bias[self.bank.num_sines :] -= _SOFTER

    def forward(self, latents: Tensor, state: WaveState | None = None) -> Tensor:
        """The tones of latents that go on where `state` stands; moves the state's turns, not its position."""
        return self.sound(self.decode_controls(latents, state), state).to(latents.dtype)

    def decode_controls(self, latents: Tensor, state: WaveState | None = None) -> Tensor:
        """Logarithms of the levels of sines and harmonics, and the bend of the pitch, (B, K + H + 1, G)."""
        tails = state.tails if state is not None else None
        raw = self.controls(self.unit(self.conv_in(latents, tails), tails))
        direct = nn.functional.pad(self.linear(latents).float(), (0, 0, 0, 1))
        return depth_to_time(raw.float(), self.bank.steps) + direct.repeat_interleave(self.bank.steps, dim=-1)

    def sound(self, controls: Tensor, state: WaveState | None = None) -> Tensor:
        """Controls to samples (B, 1, T * hop)."""
        tails = state.tails if state is not None else None
        with torch.autocast(controls.device.type, enabled=False):
            levels, bend = controls[:, :-1].clamp(-14.0, 1.0).exp(), torch.tanh(controls[:, -1:])
            pitch = torch.exp2(self.bank.pitch_range_octaves * bend) - 1.0
            # Zeros stand before the first step: silence, at the usual pitch.
            values = past_and_present(self, torch.cat([levels, pitch], dim=1), 1, tails)
            sines, voice, pitch = values.split([self.bank.num_sines, self.bank.num_harmonics, 1], dim=1)
            sound = self._sines(sines, state) + self._voice(voice, pitch[:, 0], state)
        return sound.flatten(1)[:, None]

    def _sines(self, level_BKG: Tensor, state: WaveState | None) -> Tensor:
        """Sines of fixed pitch whose levels (with one step before the first) are given, (B, G - 1, L)."""
        before, slope = level_BKG[..., :-1], level_BKG.diff()
        position = state.position if state is not None else 0
        angle = self._start_angles(position * self.bank.steps, slope.shape[-1], slope.device)
        parts = [before * angle.sin(), before * angle.cos(), slope * angle.sin(), slope * angle.cos()]
        return torch.cat(parts, dim=1).transpose(1, 2) @ self.basis

    def _start_angles(self, first: int, count: int, device: torch.device) -> Tensor:
        """Phase of every sine where each step begins, (K, G)."""
        starts_s = torch.arange(first, first + count, dtype=torch.float64) * (self.step_samples / self.sample_rate_hz)
        turns_KG = semitones_hz(self.bank)[:, None] * starts_s
        turns_KG = (turns_KG + _GOLDEN * torch.arange(len(turns_KG))[:, None]) % 1.0
        return (2.0 * math.pi * turns_KG).float().to(device)

    def _voice(self, level_BHG: Tensor, pitch_BG: Tensor, state: WaveState | None) -> Tensor:
        """Harmonics of the pitch (relative to the usual one, less 1), (B, G - 1, L); both start one step early."""
        pitch_hz = self.bank.pitch_hz * (1.0 + pitch_BG.double())
        seconds = torch.arange(self.step_samples, device=pitch_BG.device).double() / self.sample_rate_hz
        step_s = self.step_samples / self.sample_rate_hz
        before, slope = pitch_hz[:, :-1, None], pitch_hz.diff()[..., None]
        turns_BG = (step_s * 0.5 * (pitch_hz[:, 1:] + pitch_hz[:, :-1])).cumsum(-1)
        start = nn.functional.pad(turns_BG[:, :-1], (1, 0))
        if state is not None:
            carried = state.turns if state.turns is not None else torch.zeros_like(turns_BG[:, :1])
            start, state.turns = start + carried, (turns_BG[:, -1:] + carried) % 1.0
        turns = (start[..., None] + before * seconds + slope * seconds.square() / (2.0 * step_s)) % 1.0
        angle_BGL = 2.0 * math.pi * turns.float()
        rise_L = (seconds / step_s).float()
        sound = torch.zeros_like(angle_BGL)
        for h in range(self.bank.num_harmonics):
            level = level_BHG[:, h, :-1, None] + level_BHG[:, h].diff()[..., None] * rise_L
            sound = sound + level * torch.sin((h + 1) * angle_BGL)
        return sound
