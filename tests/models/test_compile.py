"""The regions of every public family are captured whole by the compiler, and compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vitascope.core.tracks import VIDEO, TextContext, Track
from vitascope.models.ltx.config import LTXConfig
from vitascope.models.ltx.model import LTXDenoiser
from vitascope.models.mochi.config import MochiConfig
from vitascope.models.mochi.model import MochiDenoiser
from vitascope.models.wan.config import WanConfig
from vitascope.models.wan.model import WanDenoiser

WAN = WanConfig(
    width=24, depth=2, num_heads=2, hidden=40, text_width=16, frequency_width=32, in_channels=4, out_channels=4
)
MOCHI = MochiConfig(
    width=16, stream_width=12, depth=2, num_heads=2, text_width=16, frequency_width=32, video_channels=4
)
MODELS: dict[str, Any] = {
    "wan": lambda: WanDenoiser(WAN),
    "ltx": lambda: LTXDenoiser(LTXConfig(width=16, depth=2, num_heads=2, in_channels=4, out_channels=4, text_width=16)),
    "mochi": lambda: MochiDenoiser(MOCHI),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("frames", [3, 20])  # 20 frames make enough tokens in bf16 for attention in blocks
@pytest.mark.parametrize("name", MODELS)
def test_regions_have_no_graph_breaks(name: str, frames: int) -> None:
    torch.manual_seed(0)
    model: Any = MODELS[name]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.eval().requires_grad_(False)
    long = frames > 3
    if long:
        model.to(torch.bfloat16)
    track = Track(draw(2, 4, frames, 8, 8), torch.full((2, 1, 1, 1, 1), 0.7), torch.arange(frames) / 3.0)
    text = TextContext(draw(2, 5, 16, seed=1).to(torch.bfloat16 if long else torch.float32), torch.ones(2, 5).bool())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=long):
        plain = model({VIDEO: track}, text)[VIDEO]
        assert len(model.regions) == 2
        for region in model.regions:
            region.compile(fullgraph=True, backend="eager")
        compiled = model({VIDEO: track}, text)[VIDEO]
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)  # the same operations, as they were captured
