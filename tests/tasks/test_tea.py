"""Which public model which polynomial was fitted to, and that a request gets it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from vitascope.caches.steps import StepCaching, rescaled
from vitascope.models.ltx.config import LTXConfig
from vitascope.models.ltx.model import LTXDenoiser
from vitascope.models.mochi.config import MochiConfig
from vitascope.models.mochi.model import MochiDenoiser
from vitascope.models.wan.config import WanConfig
from vitascope.models.wan.model import WanDenoiser
from vitascope.tasks.pipeline import Pipeline
from vitascope.tasks.request import GenerateRequest
from vitascope.tasks.settings import recipe_of, resolve
from vitascope.tasks.tea import COEFFICIENTS, tea_coefficients

MODELS: dict[str, tuple[str, Any, Any]] = {
    "Wan 1.3B": ("WanTransformer3DModel", WanDenoiser, WanConfig(width=1536, num_heads=12, depth=1, hidden=8960)),
    "Wan 14B": ("WanTransformer3DModel", WanDenoiser, WanConfig(depth=1)),
    "Wan 14B, images": ("WanTransformer3DModel", WanDenoiser, WanConfig(depth=1, in_channels=36, image_width=1280)),
    "LTX 2B": ("LTXVideoTransformer3DModel", LTXDenoiser, LTXConfig(depth=1)),
    "Mochi": ("MochiTransformer3DModel", MochiDenoiser, MochiConfig(depth=1)),
}


def test_every_polynomial_belongs_to_a_model() -> None:
    found = set()
    for kind, model, config in MODELS.values():
        with torch.device("meta"):
            coefficients = tea_coefficients(kind, config.width, model(config))
        assert coefficients in COEFFICIENTS.values()
        # a change counts for something of its own size
        assert 0.05 < rescaled(coefficients, 0.15) < 0.5
        found.add(coefficients)
    assert len(found) == len(MODELS) == len(COEFFICIENTS)
    with torch.device("meta"):
        assert tea_coefficients("LTXVideoTransformer3DModel", 4096, LTXDenoiser(LTXConfig(4096, 1))) == ()


def test_a_request_gets_the_polynomial_of_its_model(pipeline: Pipeline) -> None:
    fitted = replace(pipeline, defaults=replace(pipeline.defaults, tea_coefficients=(2.0, 0.5)))
    request = GenerateRequest("wind", step_cache=StepCaching("tea", 0.1))
    assert resolve(fitted, request).step_cache == StepCaching("tea", 0.1, coefficients=(2.0, 0.5))
    assert recipe_of(fitted, request)["step_cache"]["coefficients"] == [2.0, 0.5]
    own = replace(request, step_cache=StepCaching("tea", 0.1, coefficients=(3.0, 0.0)))
    assert resolve(fitted, own).step_cache == own.step_cache
    assert resolve(fitted, replace(request, step_cache=None)).step_cache is None
    assert resolve(pipeline, request).step_cache == StepCaching("tea", 0.1)
