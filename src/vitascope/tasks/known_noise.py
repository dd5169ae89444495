"""Noise on known frames while a clip is made: with less to copy from, what follows a still picture moves more.

B clips, C channels, N latent frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vitascope.core.random import generator
from vitascope.core.tracks import VIDEO, Track
from vitascope.diffusion.samplers import Denoise


@dataclass(frozen=True)
class KnownNoise:
    """The `tracks -> x0` that samplers call, with known cells of the video shown to the model as c + scale t^2 n.

    t: the highest level of any cell; n: noise, drawn anew at every call from the generator of each clip. The model is
    told that the cells are known as before, and in the clip they are as they were given.
    Source: `image_cond_noise_scale` of LTX-Video and of LTXConditionPipeline in diffusers, which leaves the noise of
    the last step in the given frames.
    """

    denoise: Denoise
    scale: float
    draw: Sequence[torch.Generator]

    def __call__(self, tracks: dict[str, Track]) -> dict[str, Tensor]:
        """x0 of every track."""
        video = tracks[VIDEO]
        level = max(float(track.noise.max()) for track in tracks.values())
        noise = torch.stack([torch.randn(video.values.shape[1:], generator=draw) for draw in self.draw])
        noised = video.values + self.scale * level**2 * noise.to(video.values)
        values = torch.where(video.noise == 0, noised, video.values)
        shown: dict[str, Track] = {**tracks, VIDEO: video.with_values(values, video.noise)}
        return self.denoise(shown)


def with_known_noise(denoise: Denoise, scale: float, seeds: Sequence[int]) -> Denoise:
    """`denoise` with noise on known frames, where the scale is above 0; a clip's noise follows from its seed."""
    return KnownNoise(denoise, scale, [generator(seed, "known") for seed in seeds]) if scale else denoise
