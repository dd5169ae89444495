"""Samplers: from noise to clean cells along a list of levels, one `Step` at a time. One file per sampler."""

from __future__ import annotations

from vitascope.core.errors import choice
from vitascope.diffusion.samplers.dpmpp import dpmpp_2m
from vitascope.diffusion.samplers.euler import euler
from vitascope.diffusion.samplers.few_step import few_step
from vitascope.diffusion.samplers.heun import heun
from vitascope.diffusion.samplers.step import Denoise, Sampler, Step
from vitascope.diffusion.samplers.unipc import unipc

__all__ = ["SAMPLERS", "Denoise", "Sampler", "Step", "sampler_named"]

SAMPLERS: dict[str, Sampler] = {
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "unipc": unipc,
    "few_step": few_step,
}


def sampler_named(name: str) -> Sampler:
    """The sampler called `name`; InputError naming all of them if there is none."""
    return SAMPLERS[choice("sampler", name, SAMPLERS)]
