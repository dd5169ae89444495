"""Step caches on blocks that count their calls, and on the denoisers of all families; first-block against diffusers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from torch import Tensor, nn

from vitascope.caches.steps import StepCache, StepCaching, relative_change, rescaled
from vitascope.core.errors import InputError
from vitascope.core.protocols import InBlocks, Layer, Passage, State
from vitascope.core.tracks import AUDIO, VIDEO, TextContext, Track
from vitascope.diffusion.guidance import Guidance, GuidedDenoiser
from vitascope.diffusion.paths import RectifiedFlow
from vitascope.diffusion.samplers import sampler_named
from vitascope.models.factorised.config import FactorisedConfig
from vitascope.models.factorised.model import FactorisedDenoiser
from vitascope.models.ltx.config import LTXConfig
from vitascope.models.ltx.keys import diffusers_keys
from vitascope.models.ltx.model import LTXDenoiser
from vitascope.models.mochi.config import MochiConfig
from vitascope.models.mochi.model import MochiDenoiser
from vitascope.models.wan.config import WanConfig
from vitascope.models.wan.model import WanDenoiser
from vitascope.weights.checkpoint import load_into
from vitascope.weights.keys import convert

LEVELS = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)


@dataclass
class Blocks:
    """Three blocks that add 1, 10 and 100 times the entering state, which it remembers; `calls` counts each."""

    calls: list[int] = field(default_factory=lambda: [0, 0, 0])

    def passage(self, entering: Tensor, signal: Tensor | None = None) -> Passage:
        def block(index: int) -> Layer:
            def run(state: State, alone: bool = False) -> State:
                self.calls[index] += 1
                assert state[0] is not None
                return (state[0] + 10**index * entering, *state[1:])

            return run

        told = entering if signal is None else signal
        return Passage(tuple(map(block, range(3))), lambda state: {}, lambda state: told)


def step(cache: StepCache, blocks: Blocks, x: Tensor, level: float, key: str = "cond", **more: Any) -> Tensor:
    (out,) = cache.run(key, lambda: level, (x,), blocks.passage(x, **more))
    assert out is not None
    return out


def test_below_the_threshold_what_the_other_blocks_added_is_added_again() -> None:
    cache, blocks = StepCache(StepCaching("first_block", 0.1, 0, 0), LEVELS), Blocks()
    x = torch.ones(2, 3, 4)
    assert torch.equal(step(cache, blocks, x, 1.0), 112 * x)
    near = 1.05 * x
    # the block itself, 1 + 1 times, and 110 of the step before
    torch.testing.assert_close(step(cache, blocks, near, 0.8), 2 * near + 110 * x)
    assert blocks.calls == [2, 1, 1]
    assert cache.skipped_share == pytest.approx(2 / 6)
    # compared with the last step that was computed, not with the one before: 1.09 of 1.05 would be near
    far = 1.12 * x
    torch.testing.assert_close(step(cache, blocks, far, 0.6), 112 * far)
    assert blocks.calls == [3, 2, 2]


def test_one_clip_that_changed_is_enough_to_run_all() -> None:
    cache, blocks = StepCache(StepCaching("first_block", 0.1, 0, 0), LEVELS), Blocks()
    x = torch.ones(2, 3, 4)
    step(cache, blocks, x, 1.0)
    step(cache, blocks, x * torch.tensor([1.0, 1.5])[:, None, None], 0.8)
    assert blocks.calls == [2, 2, 2]


def test_calls_follow_what_the_leading_one_decides_and_keep_what_they_added() -> None:
    cache, blocks = StepCache(StepCaching("first_block", 0.1, 0, 0), LEVELS), Blocks()
    x, other = torch.ones(2, 3, 4), torch.full((2, 3, 4), 7.0)

    def both(lead: Tensor, follower: Tensor, level: float, branches: str = "both") -> list[int]:
        cache.begin(branches)
        step(cache, blocks, lead, level)
        out = cache.run("uncond", lambda: level, (follower,), blocks.passage(follower), 0)[0]
        assert out is not None
        follows.append(out)
        return blocks.calls

    follows: list[Tensor] = []
    assert both(x, other, 1.0) == [2, 2, 2]
    assert both(1.01 * x, 2 * other, 0.8) == [4, 2, 2]  # however much the follower has changed
    torch.testing.assert_close(follows[-1], 2 * 2 * other + 110 * other)
    assert both(2 * x, 2 * other, 0.6) == [6, 4, 4]
    assert both(2 * x, 2 * other, 0.4, "others") == [8, 6, 6]  # other branches than a step ago
    assert both(2 * x[:1], 2 * other[:1], 0.4) == [10, 8, 8]
    (out,) = cache.run("new", lambda: 0.4, (x,), blocks.passage(x), 0)  # nothing to add again yet
    assert torch.equal(out if out is not None else x, 112 * x)


def test_of_a_call_with_several_branches_the_first_clips_lead() -> None:
    cache, blocks = StepCache(StepCaching("first_block", 0.1, 0, 0), LEVELS), Blocks()
    x = torch.ones(4, 3, 4)
    cache.run("both", lambda: 1.0, (x,), blocks.passage(x), 2)
    changed = x * torch.tensor([1.0, 1.0, 1.0, 5.0])[:, None, None]
    cache.run("both", lambda: 0.8, (changed,), blocks.passage(changed), 2)
    assert blocks.calls == [2, 1, 1]
    cache.run("both", lambda: 0.6, (changed.flip(0),), blocks.passage(changed.flip(0)), 2)
    assert blocks.calls == [3, 2, 2]


@pytest.mark.parametrize(("first", "last", "skipped"), [(1, 1, 3), (2, 1, 2), (3, 1, 1), (0, 2, 2), (0, 9, 0)])
def test_the_ends_of_the_schedule_run_all_blocks(first: int, last: int, skipped: int) -> None:
    cache, blocks = StepCache(StepCaching("first_block", 1.0, first, last), LEVELS), Blocks()
    for level in torch.tensor(LEVELS[:-1]).tolist():  # as float32 stores them
        step(cache, blocks, torch.ones(1, 3, 4), level)
    assert 5 - blocks.calls[1] == skipped


def test_tea_adds_up_the_rescaled_change_of_the_signal() -> None:
    cache = StepCache(StepCaching("tea", 0.5, 0, 0, (2.0, 0.1)), LEVELS)
    blocks, x = Blocks(), torch.ones(1, 3, 4)
    signals = [1.0, 1.1, 1.1, 1.1, 2.2]  # changes 0.1, 0, 0, 1: rescaled 0.3, 0.1, 0.1 (0.5 is reached), 2.1
    expected = [1, 1, 1, 2, 3]
    for signal, level, calls in zip(signals, LEVELS, expected, strict=False):
        out = step(cache, blocks, x, level, signal=torch.full((1, 2), signal))
        torch.testing.assert_close(out, 112 * x)
        assert blocks.calls == [calls] * 3
    assert cache.skipped_share == pytest.approx(2 / 5)


@pytest.mark.parametrize("kind", ["first_block", "tea"])
def test_what_is_no_number_is_not_taken_for_no_change(kind: Any) -> None:
    cache, blocks = StepCache(StepCaching(kind, 0.5, 0, 0), LEVELS), Blocks()
    for level in LEVELS[:-1]:
        step(cache, blocks, torch.full((1, 3, 4), torch.nan), level)
        step(cache, blocks, torch.zeros(1, 3, 4), level, "zeros")
    assert blocks.calls == [10, 10, 10]


def test_changes_and_what_they_count_for() -> None:
    a, b = torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.tensor([[2.0, 2.0], [2.0, 2.0]])
    assert relative_change((a, None), (b, None)) == pytest.approx(0.5)
    assert rescaled((2.0, -3.0, 4.0), 2.0) == 6.0
    assert rescaled((), 0.3) == 0.3
    assert rescaled((-10.0, 1.0), 0.05) == 0.5
    assert rescaled((-10.0, 1.0), 0.5) == 0.5  # not -4: that far it was not fitted
    assert rescaled((1.0, 0.0), float("nan")) != rescaled((1.0, 0.0), float("nan"))


def test_bad_settings_are_refused_and_texts_read() -> None:
    assert StepCaching.parse("tea:0.2") == StepCaching("tea", 0.2)
    assert StepCaching.parse("first_block") == StepCaching()
    assert str(StepCaching.parse("first_block:0.05")) == "first_block:0.05"
    for text, message in (
        ("taylor", "valid values: first_block, tea"),
        ("tea:much", "such as first_block:0.1"),
        ("tea:-1", "from 0 up"),
        ("tea:nan", "from 0 up"),
    ):
        with pytest.raises(InputError, match=message):
            StepCaching.parse(text)
    bad: list[dict[str, Any]] = [{"first": -1}, {"coefficients": (1.0, float("inf"))}]
    for options in bad:
        with pytest.raises(InputError):
            StepCaching(**options)


# --- on models -------------------------------------------------------------------------------------------------------

FAMILIES: dict[str, Any] = {
    "wan": (WanDenoiser, WanConfig(width=24, hidden=40, depth=3, num_heads=2, text_width=12, frequency_width=16)),
    "ltx": (LTXDenoiser, LTXConfig(width=24, depth=3, num_heads=2, in_channels=16, out_channels=16, text_width=12)),
    "mochi": (
        MochiDenoiser,
        MochiConfig(
            width=32, depth=3, num_heads=2, stream_width=16, video_channels=16, text_width=12, pool_heads=2,
            frequency_width=16,
        ),
    ),
    "factorised": (
        FactorisedDenoiser,
        FactorisedConfig(
            width=32, depth=3, num_heads=2, audio_width=16, audio_heads=2, text_width=12, video_channels=16,
            audio_channels=6, patch=(1, 2, 2),
        ),
    ),
}  # fmt: skip
each_family = pytest.mark.parametrize("name", FAMILIES)


def build(name: str) -> Any:
    torch.manual_seed(0)
    kind, config = FAMILIES[name]
    model = kind(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def inputs(name: str, level: float, drift: float = 0.0) -> tuple[dict[str, Track], TextContext]:
    draw = torch.Generator().manual_seed(1)
    values = torch.randn(2, 16, 3, 4, 6, generator=draw) + drift
    tracks = {VIDEO: Track(values, torch.full((2, 1, 1, 1, 1), level), torch.arange(3) / 3)}
    if name == "factorised":
        audio = torch.randn(2, 6, 8, generator=draw) + drift
        tracks[AUDIO] = Track(audio, torch.full((2, 1, 1), level), torch.arange(8) / 8)
    return tracks, TextContext(torch.randn(2, 5, 12, generator=draw), torch.ones(2, 5, dtype=torch.bool))


def cached(model: InBlocks, cache: StepCache, level: float, given: Any) -> dict[str, Tensor]:
    state, passage = model.enter(*given)
    return passage.finish(cache.run("cond", lambda: level, state, passage))


@pytest.mark.parametrize("kind", ["first_block", "tea"])
@each_family
def test_at_threshold_0_a_model_is_itself_bit_for_bit(name: str, kind: Any) -> None:
    model, cache = build(name), StepCache(StepCaching(kind, 0.0, 0, 0), LEVELS)
    for level in (0.8, 0.8, 0.4):
        given = inputs(name, level)
        plain = model(*given)
        out = cached(model, cache, level, given)
        assert all(torch.equal(out[track], plain[track]) for track in plain)
    assert cache.skipped_share == 0


@pytest.mark.parametrize("kind", ["first_block", "tea"])
@each_family
def test_a_model_skips_its_blocks_and_stays_near(name: str, kind: Any) -> None:
    """The tokens move a little between two steps: reusing is wrong by less than what the blocks add, and not by 0."""
    model, cache = build(name), StepCache(StepCaching(kind, 0.5, 0, 0), LEVELS)
    cached(model, cache, 0.8, inputs(name, 0.8))
    given = inputs(name, 0.8, 0.05)
    plain, out = model(*given), cached(model, cache, 0.8, given)
    assert cache.skipped_share == pytest.approx((2 if kind == "first_block" else 3) / 6)
    state, passage = model.enter(*given)
    without = passage.finish(state)
    for track, expected in plain.items():
        error = (out[track] - expected).norm()
        assert 0 < error < 0.3 * (without[track] - expected).norm()


@pytest.mark.parametrize("max_clips", [None, 2])
def test_the_noise_that_isolates_a_track_is_no_level_of_the_clip(max_clips: int | None) -> None:
    """Cross-modal guidance shows the model pure noise in place of a track: that step is no first one for it."""
    model, cache = build("factorised"), StepCache(StepCaching("first_block", 0.5), LEVELS)
    tracks, text = inputs("factorised", 0.6)
    guided = GuidedDenoiser(
        model, RectifiedFlow(), text, guidance=Guidance(1.0, cross_modal={AUDIO: 2.0}), steps=cache, max_clips=max_clips
    )
    first, again = guided(tracks), guided(tracks)
    assert cache.skipped_share == pytest.approx(2 / 6)
    for name in tracks:  # nothing has changed: what was added last is what would be added now, but for rounding
        torch.testing.assert_close(again[name], first[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["first_block", "tea"])
@pytest.mark.parametrize("name", ["factorised", "ltx"])
def test_branches_in_one_call_or_several_skip_the_same_steps(name: str, kind: Any) -> None:
    """How many go together is a matter of memory, and a plan that says so promises the same clip."""
    model, (tracks, text), made = build(name), inputs(name, 1.0), []
    uncond = replace(text, embeddings=text.embeddings.flip(1), prepared=())
    for max_clips in (None, len(text.embeddings)):
        cache = StepCache(StepCaching(kind, 0.9), LEVELS)
        # off at the highest levels: there is no second branch at first
        guidance = Guidance(4.0, interval=(0.0, 0.8))
        guided = GuidedDenoiser(model, RectifiedFlow(), text, uncond, guidance, steps=cache, max_clips=max_clips)
        at: Any = tracks
        for done in sampler_named("euler")(guided, tracks, LEVELS, path=RectifiedFlow()):
            at = done.tracks
        made.append((cache.skipped_share, at[VIDEO].values))
    assert made[0][0] == made[1][0] > 0
    torch.testing.assert_close(made[0][1], made[1][1], rtol=1e-4, atol=1e-4)


@each_family
def test_the_signal_follows_the_level(name: str) -> None:
    model = build(name)
    signals = []
    for level in (0.8, 0.7):
        state, passage = model.enter(*inputs(name, level))
        signals.append(passage.signal(state))
    assert signals[0].shape == signals[1].shape
    assert signals[0].shape[0] == 2
    assert 0 < relative_change((signals[1],), (signals[0],)) < 2


def test_first_block_decides_and_answers_as_diffusers_does() -> None:
    torch.manual_seed(0)
    theirs: Any = LTXVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
        num_layers=3, caption_channels=12,
    ).eval().requires_grad_(False)  # fmt: skip
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    ours = build("ltx")
    load_into(ours, convert(diffusers_keys(LTXConfig()), theirs.state_dict()))
    apply_first_block_cache(theirs, FirstBlockCacheConfig(threshold=0.1))
    cache = StepCache(StepCaching("first_block", 0.1, 0, 0), LEVELS)
    shares = []
    for level, drift in ((0.8, 0.0), (0.8, 0.01), (0.5, 0.3), (0.5, 0.31), (0.2, 0.6)):
        tracks, text = inputs("ltx", level, drift)
        values = tracks[VIDEO].values[:1]  # one clip: theirs takes the mean of a batch
        one = {VIDEO: Track(values, tracks[VIDEO].noise[:1], tracks[VIDEO].times_s)}
        words = TextContext(text.embeddings[:1], text.mask[:1])
        with theirs.cache_context("cond"):
            expected = theirs(
                values.flatten(2).transpose(1, 2), words.embeddings, torch.full((1, 1), 1000 * level),
                words.mask.float(), 3, 4, 6, rope_interpolation_scale=(1 / 3, 32, 32), return_dict=False,
            )[0].transpose(1, 2).unflatten(2, (3, 4, 6))  # fmt: skip
        out = cached(ours, cache, level, (one, words))[VIDEO]
        assert (out - expected).norm() / expected.norm() < 1e-5  # fp32 sums in another order
        shares.append(cache.num_skipped)
    assert shares == [0, 2, 2, 4, 4]
