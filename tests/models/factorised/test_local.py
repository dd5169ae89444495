"""Convolutions around the layers: near stays near, frames stay apart, sizes that do not lead to tokens are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vitascope.core.errors import InputError
from vitascope.models.factorised.config import FactorisedConfig
from vitascope.models.factorised.local import LocalDown, LocalUp, gather, scatter

CONFIG = FactorisedConfig(
    width=16, depth=1, num_heads=2, audio_width=16, audio_heads=2, text_width=8, video_channels=3, patch=(1, 4, 4),
    local_channels=(6, 8),
)  # fmt: skip


def make_ends(blocks: tuple[int, int] = (1, 1)) -> tuple[LocalDown, LocalUp]:
    torch.manual_seed(0)
    down, up = LocalDown(3, (6, 8), blocks[0], (4, 4), 16), LocalUp(3, (6, 8), blocks[1], (4, 4), 16)
    for parameter in [*down.parameters(), *up.parameters()]:
        nn.init.normal_(parameter, std=0.2)
    return down, up


def run(values: Tensor, condition: Tensor) -> Tensor:
    down, up = make_ends()
    tokens, levels = down(values, condition)
    return up(tokens, levels, condition)


@given(st.tuples(st.integers(1, 3), st.integers(1, 3)), st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_scatter_undoes_gather(factor: tuple[int, int], grid: tuple[int, int]) -> None:
    x = torch.randn(2, 3, factor[0] * grid[0], factor[1] * grid[1], 5)
    gathered = gather(x, factor)
    assert gathered.shape == (2, 3, *grid, 5 * factor[0] * factor[1])
    assert torch.equal(scatter(gathered, factor), x)
    # the first C numbers of a gathered cell are its upper left one
    assert torch.equal(gathered[..., :5], x[:, :, :: factor[0], :: factor[1]])


def test_a_shift_by_whole_tokens_shifts_the_result() -> None:
    values, condition = torch.zeros(1, 3, 1, 64, 64), torch.randn(1, 1, 1, 1, 16)
    values[..., 24:28, 24:28] = torch.randn(3, 1, 4, 4)
    moved = run(values.roll((4, 8), (3, 4)), condition)
    # 14 latents for 10 convolutions, 4 of them at half size, and a token on either way: so far the padding reaches
    inside = (..., slice(24, 40), slice(24, 40))
    torch.testing.assert_close(moved[inside], run(values, condition).roll((4, 8), (3, 4))[inside])
    assert moved[..., 28:32, 32:36].std() > 0.01


def test_frames_and_clips_do_not_see_each_other() -> None:
    values, condition = torch.randn(2, 3, 3, 8, 8), torch.randn(2, 3, 1, 1, 16)
    other = values.clone()
    other[1, :, 2] += 1
    changed = (run(values, condition) != run(other, condition)).any(dim=1).flatten(2).any(dim=2)
    assert changed.tolist() == [[False, False, False], [False, False, True]]


def test_one_condition_for_all_tokens_equals_one_for_each() -> None:
    values, condition = torch.randn(2, 3, 2, 8, 12), torch.randn(2, 2, 1, 1, 16)
    torch.testing.assert_close(run(values, condition), run(values, condition.expand(2, 2, 2, 3, 16)))


def test_a_condition_of_one_token_acts_near_that_token() -> None:
    values, condition = torch.randn(1, 3, 1, 64, 64), torch.zeros(1, 1, 16, 16, 16)
    other = condition.clone()
    other[0, 0, 0, 0] = 3.0
    difference = (run(values, condition) - run(values, other)).abs().amax((0, 1, 2))
    assert difference[:4, :4].max() > 0.01
    assert not difference[32:].any()
    assert not difference[:, 32:].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": (1, 2, 4), "local_channels": (4, 4, 4)}, r"3 local levels need .* multiple of 4 .* got \(1, 2, 4\)"),
        ({"patch": (2, 4, 4)}, "patch of 1 frame"),
        ({"local_channels": (8, 0)}, "positive"),
        ({"local_blocks": (0, 1)}, "positive"),
        ({"video_channels": 0}, "for a video track"),
    ],
)
def test_levels_that_do_not_lead_to_tokens_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(CONFIG, **changes)
