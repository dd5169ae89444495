"""Analytic counts against the model itself and PyTorch's own counter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from vitascope.core.errors import ShapeError
from vitascope.core.tracks import AUDIO, VIDEO, TextContext, Track
from vitascope.models.factorised.config import FactorisedConfig
from vitascope.models.factorised.cost import cost_table, forward_flops, num_parameters
from vitascope.models.factorised.model import FactorisedDenoiser
from vitascope.models.factorised.presets import PRESETS

TINY = FactorisedConfig(
    width=32, depth=3, num_heads=2, audio_width=16, audio_heads=2, text_width=12, video_channels=3, audio_channels=5,
    patch=(1, 2, 2), audio_patch=2, base_grid=(2, 3),
)  # fmt: skip
VARIANTS = {
    "own": TINY,
    "shared": replace(TINY, modulation="shared"),
    "geglu": replace(TINY, feed_forward="geglu", feed_forward_ratio=2.5),
    "multi query, rotary": replace(TINY, attention="multi_query", positions="rotary"),
    "patch over time": replace(TINY, patch=(2, 1, 2), audio_patch=1),
    "exchanges": replace(TINY, exchange_layers=(1,), modulation="shared"),
    "no exchange": replace(TINY, exchange_layers=()),
    "video only": replace(TINY, audio_channels=0),
    "audio only": replace(TINY, video_channels=0),
    "local levels": replace(TINY, local_channels=(8, 12), local_blocks=(2, 1)),
    "one local level": replace(TINY, patch=(1, 4, 2), local_channels=(8,)),
    "labels, no camera": replace(TINY, num_classes=7, camera=False),
}


def real_parameters(config: FactorisedConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in FactorisedDenoiser(config).parameters())


@torch.no_grad()
def counted_flops(config: FactorisedConfig, batch: int, video: tuple[int, int, int], num_audio: int, words: int) -> int:
    tracks = {}
    if config.video_channels:
        tracks[VIDEO] = track((batch, config.video_channels, *video))
    if config.audio_channels:
        tracks[AUDIO] = track((batch, config.audio_channels, num_audio))
    text = TextContext(torch.randn(batch, words, config.text_width), torch.ones(batch, words, dtype=torch.bool))
    model = FactorisedDenoiser(config).eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(tracks, text)
    return counter.get_total_flops()


def track(shape: tuple[int, ...]) -> Track:
    noise = torch.full((shape[0], 1, shape[2], *[1] * (len(shape) - 3)), 0.5)
    return Track(torch.randn(shape), noise, (torch.arange(shape[2]) + 0.5) / 4)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_every_preset_are_those_of_the_model(name: str) -> None:
    assert num_parameters(PRESETS[name]) == real_parameters(PRESETS[name])


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_and_operations_of_every_variant(name: str) -> None:
    config = VARIANTS[name]
    assert num_parameters(config) == real_parameters(config)
    assert forward_flops(config, 2, 4, 4, 6, 8, 5) == counted_flops(config, 2, (4, 4, 6), 8, 5)


@settings(max_examples=5)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 6))
def test_operations_of_any_shape(batch: int, frames: int, rows: int, cols: int, audio: int, words: int) -> None:
    counted = counted_flops(TINY, batch, (frames, 2 * rows, 2 * cols), 2 * audio, words)
    assert forward_flops(TINY, batch, frames, 2 * rows, 2 * cols, 2 * audio, words) == counted


def test_sizes_between_patches_are_refused_with_their_neighbours() -> None:
    with pytest.raises(ShapeError, match=r"5 latent rows do not fill patches of 2; nearest: 4, 6"):
        forward_flops(TINY, 1, 1, 5, 4, 4, 4)


def test_the_table_has_every_preset_at_a_common_size_or_its_own() -> None:
    own, common = cost_table(), cost_table(128)
    assert [row.name for row in own] == [row.name for row in common] == list(PRESETS)
    assert {row.width_px for row in common} == {128}
    sizes = {row.name: row.width_px for row in own}
    assert (sizes["pocket"], sizes["small"], sizes["10b"]) == (128, 256, 512)
    # 7 frames of 4 x 4 tokens, and 25 / 12 s at 50 latents a second in patches of 4.
    assert own[0].num_tokens == 7 * 16 + 27
    assert [row.num_parameters for row in own] == sorted(row.num_parameters for row in own)
    assert own[-1].num_parameters > 10e9
