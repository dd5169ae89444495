"""Polynomials that were fitted to public models for step caches of the kind "tea".

Source: Liu et al. 2024, TeaCache, and the figures of its repository (ali-vilab/TeaCache, Apache-2.0), each for the
signal that our models give: the embedded level of Wan, the modulated input of the first block of the others.
"""

from __future__ import annotations

from vitascope.core.protocols import Denoiser

COEFFICIENTS: dict[tuple[str, int, bool], tuple[float, ...]] = {
    ("WanTransformer3DModel", 1536, False): (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
    ("WanTransformer3DModel", 5120, False): (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    ("WanTransformer3DModel", 5120, True): (-302.331670, 223.948934, -52.5463970, 5.87348440, -0.201973289),
    ("LTXVideoTransformer3DModel", 2048, False): (21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326),
    ("MochiTransformer3DModel", 3072, False): (-3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719),
}
"""By class of diffusers, width, and whether the model reads known frames beside the latents (Wan's: 480p)."""


def tea_coefficients(kind: str, width: int, denoiser: Denoiser) -> tuple[float, ...]:
    """Highest power first; none for a model that nothing was fitted to."""
    return COEFFICIENTS.get((kind, width, denoiser.capabilities.condition_channels > 0), ())
