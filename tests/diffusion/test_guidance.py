"""Guidance on a model whose answer shows what it was given: text, other track, camera, strategy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from vitascope.caches.steps import StepCache, StepCaching
from vitascope.core.errors import CapabilityError, InputError
from vitascope.core.protocols import (
    CAUSAL,
    FULL,
    Capabilities,
    Denoiser,
    Passage,
    Prediction,
    State,
    TemporalStrategy,
)
from vitascope.core.tracks import TextContext, Track, Tracks
from vitascope.diffusion.guidance import Guidance, GuidedDenoiser, busy_values, guide, rescale
from vitascope.diffusion.joining import join_texts
from vitascope.diffusion.paths import RectifiedFlow
from vitascope.diffusion.samplers import SAMPLERS
from vitascope.diffusion.schedules import uniform_levels

PATH = RectifiedFlow()


@dataclass
class Recorder:
    """x0 of a track = mean of the real text tokens + 0.1 x own values + 10 x (1 - mean level of the other tracks).

    contrast: adds that many times the mean of the text x own values.
    """

    prediction: Prediction = "velocity"
    calls: list[dict[str, Any]] = field(default_factory=list)
    contrast: float = 0.0

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(("video", "audio"), self.prediction, "cell")

    def __call__(
        self, tracks: Tracks, text: TextContext, camera: Tensor | None = None, strategy: TemporalStrategy = FULL
    ) -> dict[str, Tensor]:
        batch = text.mask.shape[0]
        self.calls.append(
            {"batch": batch, "tracks": dict(tracks), "text": text, "camera": camera, "kind": strategy.kind}
        )
        real = text.mask.unsqueeze(-1)
        meaning = (text.embeddings * real).sum((1, 2)) / real.sum((1, 2))
        answers = {}
        for name, track in tracks.items():
            others = [
                1 - t.noise.expand(batch, *t.noise.shape[1:]).flatten(1).mean(1) for n, t in tracks.items() if n != name
            ]
            level = meaning + 10 * sum(others, torch.zeros(batch))
            per_clip = (-1, *[1] * (track.values.ndim - 1))
            gain = 0.1 + self.contrast * meaning.reshape(per_clip)
            x0 = level.reshape(per_clip) + gain * track.values
            answers[name] = PATH.from_x0(self.prediction, x0, track.values, track.noise)
        return answers


def text(value: float, num_tokens: int, batch: int = 2) -> TextContext:
    return TextContext(torch.full((batch, num_tokens, 1), value), torch.ones(batch, num_tokens, dtype=torch.bool))


def tracks(video_level: float = 0.8, audio_level: float = 0.6) -> dict[str, Track]:
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(2, 2, 3, 2, 2, generator=generator)
    audio = torch.randn(2, 4, 5, generator=generator)
    return {
        "video": Track(video, torch.full((2, 1, 3, 1, 1), video_level), torch.arange(3.0)),
        "audio": Track(audio, torch.full((2, 1, 5), audio_level), torch.arange(5.0)),
    }


def run(guidance: Guidance, model: Recorder | None = None, **options: Any) -> tuple[dict[str, Tensor], Recorder]:
    model = model or Recorder()
    given = options.pop("tracks", tracks())
    options.setdefault("uncond", text(1.0, 1))
    return GuidedDenoiser(model, PATH, text(3.0, 4), guidance=guidance, **options)(given), model


def offset(x0: Tensor, name: str, given: dict[str, Track] | None = None) -> float:
    """What is left of x0 without the part that the values themselves give."""
    rest = x0 - 0.1 * (given or tracks())[name].values
    torch.testing.assert_close(rest, torch.full_like(rest, rest.mean().item()), atol=1e-4, rtol=1e-4)
    return rest.mean().item()


def test_the_recorder_is_a_denoiser() -> None:
    model: Denoiser = Recorder()
    assert model.capabilities.prediction == "velocity"


@pytest.mark.parametrize("prediction", ["velocity", "v", "noise", "x0"])
def test_scale_is_uncond_plus_w_times_the_difference(prediction: Prediction) -> None:
    """cond 3, uncond 1; from the other track video hears 10 (1 - 0.6), audio sees 10 (1 - 0.8)."""
    x0, model = run(Guidance(scale=2.5, scales={"audio": 0.0}), Recorder(prediction))
    assert offset(x0["video"], "video") == pytest.approx(1 + 2.5 * 2 + 4, rel=1e-4)
    assert offset(x0["audio"], "audio") == pytest.approx(1 + 2, rel=1e-4)
    assert [call["batch"] for call in model.calls] == [4]


def test_both_branches_go_in_one_batch_with_padded_texts() -> None:
    camera = torch.arange(6.0).reshape(2, 3)
    _, model = run(Guidance(2.0), camera=camera, strategy=CAUSAL, uncond=text(1.0, 1, batch=1))
    (call,) = model.calls
    assert call["kind"] == "causal"
    assert torch.equal(call["camera"], torch.cat([camera, camera]))
    assert call["text"].mask.sum(1).tolist() == [4, 4, 1, 1]
    assert call["text"].embeddings.shape == (4, 4, 1)
    halves = call["tracks"]["video"].values.split(2)
    assert torch.equal(halves[0], halves[1])


@pytest.mark.parametrize(("max_clips", "batches"), [(None, [8]), (4, [4, 4]), (3, [2, 2, 2, 2]), (1, [2, 2, 2, 2])])
def test_branches_may_be_split_over_calls(max_clips: int | None, batches: list[int]) -> None:
    guidance = Guidance(2.0, cross_modal={"video": 3.0, "audio": 2.0})
    whole, _ = run(guidance)
    split, model = run(guidance, max_clips=max_clips)
    assert [call["batch"] for call in model.calls] == batches
    for name in whole:
        torch.testing.assert_close(split[name], whole[name])


@pytest.mark.parametrize(("limit", "batches"), [(None, [4]), (1, [2, 2]), (10**6, [4])])
def test_clips_that_keep_a_device_busy_go_branch_by_branch(limit: int | None, batches: list[int]) -> None:
    whole, _ = run(Guidance(2.0))
    split, model = run(Guidance(2.0), busy_values=limit)
    assert [call["batch"] for call in model.calls] == batches
    for name in whole:
        torch.testing.assert_close(split[name], whole[name])
    assert busy_values(torch.device("cuda")) is None


def test_scale_one_needs_no_unconditional_branch() -> None:
    x0, model = run(Guidance(1.0), uncond=None)
    assert [call["batch"] for call in model.calls] == [2]
    assert offset(x0["video"], "video") == pytest.approx(3 + 4, rel=1e-4)
    with pytest.raises(InputError, match="unconditional"):
        run(Guidance(2.0), uncond=None)


@pytest.mark.parametrize(("interval", "guided"), [((0.0, 1.0), True), ((0.2, 0.8), True), ((0.0, 0.7), False)])
def test_the_interval_is_that_of_the_highest_level(interval: tuple[float, float], guided: bool) -> None:
    x0, model = run(Guidance(2.0, interval=interval))
    assert model.calls[0]["batch"] == (4 if guided else 2)
    assert offset(x0["video"], "video") == pytest.approx((5 if guided else 3) + 4, rel=1e-4)


def test_cross_modal_guidance_moves_away_from_the_isolated_prediction() -> None:
    """Isolated from the other track, that track's share is 0: the share is multiplied by m, the text's by w."""
    x0, model = run(Guidance(2.0, cross_modal={"video": 3.0}))
    assert offset(x0["video"], "video") == pytest.approx(1 + 2 * 2 + 3 * 4, rel=1e-4)
    assert offset(x0["audio"], "audio") == pytest.approx(1 + 2 * 2 + 2, rel=1e-4)
    assert [call["batch"] for call in model.calls] == [6]
    isolated = {name: track.values.split(2)[2] for name, track in model.calls[0]["tracks"].items()}
    assert torch.equal(isolated["video"], tracks()["video"].values)
    assert not torch.equal(isolated["audio"], tracks()["audio"].values)
    assert (model.calls[0]["tracks"]["audio"].noise.split(2)[2] == 1).all()
    again, _ = run(Guidance(2.0, cross_modal={"video": 3.0}))
    assert torch.equal(again["video"], x0["video"])


def test_a_lone_track_has_no_cross_modal_guidance() -> None:
    alone = {"video": tracks()["video"]}
    x0, model = run(Guidance(1.0, cross_modal={"video": 3.0}), tracks=alone)
    assert [call["batch"] for call in model.calls] == [2]
    assert offset(x0["video"], "video") == pytest.approx(3, rel=1e-4)


def test_rescale_gives_back_the_spread_of_the_conditional() -> None:
    generator = torch.Generator().manual_seed(1)
    cond, uncond = torch.randn(2, 3, 4, 5, generator=generator).unbind(0)
    guided = guide(cond, uncond, 4.0)
    torch.testing.assert_close(guided, uncond + 4 * (cond - uncond))
    assert torch.equal(rescale(guided, cond, 0.0), guided)
    full = rescale(guided, cond, 1.0)
    torch.testing.assert_close(full.std((1, 2)), cond.std((1, 2)))
    torch.testing.assert_close(rescale(guided, cond, 0.3), 0.3 * full + 0.7 * guided)


def test_rescale_is_applied_to_what_is_guided() -> None:
    plain, _ = run(Guidance(1.0), Recorder(contrast=0.5))
    x0, _ = run(Guidance(3.0, scales={"audio": 1.0}, rescale=1.0), Recorder(contrast=0.5))
    torch.testing.assert_close(x0["audio"], plain["audio"])
    torch.testing.assert_close(x0["video"].std((1, 2, 3, 4)), plain["video"].std((1, 2, 3, 4)))
    unscaled, _ = run(Guidance(3.0), Recorder(contrast=0.5))
    assert (unscaled["video"].std((1, 2, 3, 4)) > 1.5 * x0["video"].std((1, 2, 3, 4))).all()


def test_a_guided_denoiser_is_what_samplers_call() -> None:
    guided = GuidedDenoiser(Recorder(), PATH, text(3.0, 2), text(1.0, 1), Guidance(2.0))
    steps = list(SAMPLERS["euler"](guided, tracks(1.0, 0.0), uniform_levels(3), path=PATH))
    assert len(steps) == 3
    assert torch.equal(steps[-1].tracks["audio"].values, tracks()["audio"].values)


def test_bad_options_are_refused() -> None:
    for call in (
        lambda: Guidance(rescale=1.5),
        lambda: Guidance(interval=(0.6, 0.4)),
        lambda: Guidance(interval=(0.0, 1.2)),
        lambda: run(Guidance(2.0), uncond=text(1.0, 1, batch=3)),
    ):
        with pytest.raises(InputError):
            call()


def test_texts_of_one_length_are_joined_as_they_are() -> None:
    joined = join_texts([text(1.0, 2), text(2.0, 2)])
    assert joined.mask.all()
    assert joined.embeddings[:, 0, 0].tolist() == [1.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_rescale_on_the_velocity_gives_back_its_spread(prediction: Prediction) -> None:
    given = tracks(0.7, 0.7)
    plain, _ = run(Guidance(1.0), Recorder(prediction, contrast=0.5), tracks=given)
    options: dict[str, Any] = {"tracks": given}
    x0, _ = run(Guidance(3.0, rescale=1.0, rescale_on="velocity"), Recorder(prediction, contrast=0.5), **options)
    on_x0, _ = run(Guidance(3.0, rescale=1.0), Recorder(prediction, contrast=0.5), **options)
    for name, track in given.items():
        v, expected = (PATH.from_x0("velocity", x[name], track.values, track.noise) for x in (x0, plain))
        axes = tuple(range(1, v.ndim))
        torch.testing.assert_close(v.std(axes), expected.std(axes))
        assert (x0[name] - on_x0[name]).abs().max() > 0.1


def test_without_a_share_to_rescale_its_place_does_not_matter() -> None:
    a, _ = run(Guidance(3.0, rescale_on="velocity"))
    b, _ = run(Guidance(3.0))
    assert all(torch.equal(a[name], b[name]) for name in a)


@dataclass
class Stack(Recorder):
    """A Recorder in three blocks: the answer is that of the Recorder times the number of blocks that were run, less a
    tenth for each that was run alone."""

    def enter(
        self, tracks: Tracks, text: TextContext, camera: Tensor | None = None, strategy: TemporalStrategy = FULL
    ) -> tuple[State, Passage]:
        answers = super().__call__(tracks, text, camera, strategy)

        def block(state: State, alone: bool = False) -> State:
            assert state[0] is not None
            return (state[0] + (0.9 if alone else 1.0),)

        def finish(state: State) -> dict[str, Tensor]:
            assert state[0] is not None
            count = float(state[0].flatten()[0])
            x0 = {
                name: PATH.to_x0("velocity", v, tracks[name].values, tracks[name].noise) for name, v in answers.items()
            }
            return {
                name: PATH.from_x0("velocity", x * count, tracks[name].values, tracks[name].noise)
                for name, x in x0.items()
            }

        state = torch.zeros(text.mask.shape[0], 1)
        return (state,), Passage((block, block, block), finish, lambda state: text.embeddings)

    def __call__(
        self, tracks: Tracks, text: TextContext, camera: Tensor | None = None, strategy: TemporalStrategy = FULL
    ) -> dict[str, Tensor]:
        state, passage = self.enter(tracks, text, camera, strategy)
        return passage.run(state)


@pytest.mark.parametrize(
    ("how", "layers", "left"), [("attention", (0, 2), 2.8), ("attention", (0, 1, 2), 2.7), ("block", (1,), 2.0)]
)
def test_perturbed_adds_s_times_what_the_layers_bring(how: Any, layers: tuple[int, ...], left: float) -> None:
    given = {"video": tracks()["video"]}
    options: dict[str, Any] = {"perturbed_layers": layers, "perturbation": how}
    plain, _ = run(Guidance(2.5), Stack(), tracks=given)
    cond, _ = run(Guidance(1.0), Stack(), tracks=given)
    x0, model = run(Guidance(2.5, perturbed=1.5, **options), Stack(), tracks=given)
    lost = cond["video"] * (1 - left / 3)
    torch.testing.assert_close(x0["video"], plain["video"] + 1.5 * lost, rtol=1e-4, atol=1e-4)
    assert [call["batch"] for call in model.calls] == [4, 2]
    # without text guidance too, and never outside the interval
    alone, _ = run(Guidance(1.0, perturbed=1.5, **options), Stack(), tracks=given)
    torch.testing.assert_close(alone["video"], cond["video"] + 1.5 * lost, rtol=1e-4, atol=1e-4)
    outside, model = run(Guidance(2.5, perturbed=1.5, interval=(0.1, 0.5), **options), Stack(), tracks=given)
    assert torch.equal(outside["video"], cond["video"])
    assert [call["batch"] for call in model.calls] == [2]


def test_what_cannot_be_perturbed_is_refused() -> None:
    with pytest.raises(InputError, match="needs the layers"):
        Guidance(perturbed=1.0)
    with pytest.raises(InputError, match="valid values: attention, block"):
        Guidance(perturbation="values")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="valid values: x0, velocity"):
        Guidance(rescale_on="noise")  # pyright: ignore[reportArgumentType]
    bad: list[tuple[tuple[int, ...], Any]] = [((3,), "attention"), ((-1,), "block"), ((0, 1, 2), "block")]
    for layers, how in bad:
        with pytest.raises(InputError, match=r"some of 0\.\.2"):
            run(Guidance(perturbed=1.0, perturbed_layers=layers, perturbation=how), Stack())
    with pytest.raises(CapabilityError, match="block by block"):
        run(Guidance(perturbed=1.0, perturbed_layers=(0,)))
    with pytest.raises(CapabilityError, match="block by block"):
        run(Guidance(), steps=StepCache(StepCaching(), (1.0, 0.0)))


@pytest.mark.parametrize("max_clips", [None, 2])
def test_every_branch_has_its_own_place_in_a_step_cache(max_clips: int | None) -> None:
    """Equal inputs at every step: from the second on, all blocks but the first are skipped, and nothing changes."""
    guidance = Guidance(2.5, perturbed=1.5, perturbed_layers=(1,))
    cache = StepCache(StepCaching("first_block", 0.1, 0, 0), (0.9, 0.8, 0.7, 0.0))
    plain, _ = run(guidance, Stack())
    options: dict[str, Any] = {"steps": cache, "max_clips": max_clips}
    for _ in range(3):
        out, _ = run(guidance, Stack(), **options)
        torch.testing.assert_close(out, plain)
    assert cache.skipped_share == pytest.approx(2 / 3 * 2 / 3)


def test_texts_are_joined_once_for_all_steps() -> None:
    """Keys and values of long texts are large; a step reads them where the first one put them."""
    model = Recorder()
    ready = [TextContext(t.embeddings, t.mask, None, (t.embeddings * 2,)) for t in (text(1.0, 2), text(0.0, 5))]
    guided = GuidedDenoiser(model, PATH, ready[0], ready[1], Guidance(3.0, interval=(0.5, 1.0)))
    for level in (0.9, 0.8, 0.3, 0.2):
        guided(tracks(level, level))
    first, second, late, last = (call["text"] for call in model.calls)
    assert first is second
    assert late is last
    assert first.prepared[0].shape == (4, 5, 1)
    assert late.prepared[0].shape == (2, 2, 1)
    assert torch.equal(first.prepared[0][:2, :2], ready[0].prepared[0])
    assert not first.prepared[0][:2, 2:].any()
