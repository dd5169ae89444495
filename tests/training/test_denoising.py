from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitascope.core.errors import InputError
from vitascope.core.tracks import AUDIO, VIDEO, Track, Tracks
from vitascope.diffusion.schedules import LevelDistribution
from vitascope.training.objectives.denoising import (
    PATH,
    TASKS,
    ClipCells,
    NoiseLevels,
    check_tasks,
    draw_cells,
    track_losses,
    velocity_weighted_error,
)

POCKET = ClipCells.of(7, stride=4, fps=12.0, audio_per_s=50.0, audio_patch=4)
PLAIN = NoiseLevels(per_track_share=0, per_frame_share=0, soft_known_share=0)


def draw(task: str, count: int = 64, noise: NoiseLevels = PLAIN, seed: int = 0, still: torch.Tensor | None = None):
    return draw_cells(count, POCKET, {task: 1.0}, noise, torch.Generator().manual_seed(seed), still)


def test_cells_of_the_pocket_clip() -> None:
    assert (POCKET.num_frames, POCKET.num_audio) == (7, 108)
    frame = POCKET.audio_frame()
    assert frame[0] == 0 and frame[-1] == 6 and (frame.diff() >= 0).all()  # noqa: PT018
    assert (frame.reshape(-1, 4).diff(dim=1) == 0).all()  # a token is never torn
    for latent in range(0, 100, 4):  # the token ends no later than its frame, and later than the frame before
        end_s, owner = (latent + 4) / 50, int(frame[latent])
        assert end_s <= POCKET.frame_ends_s[owner] + 1e-3
        assert owner == 0 or end_s > POCKET.frame_ends_s[owner - 1]


def test_known_cells_of_each_task() -> None:
    known = {name: draw(name).known for name in TASKS}
    assert not known["text"][VIDEO].any()
    assert not known["text"][AUDIO].any()
    assert known["image"][VIDEO].sum() == 64
    assert known["image"][VIDEO][:, 0].all()
    assert known["audio_to_video"][AUDIO].all()
    assert not known["audio_to_video"][VIDEO].any()
    assert known["video_to_audio"][VIDEO].all()
    assert not known["video_to_audio"][AUDIO].any()
    counts = known["keyframes"][VIDEO].sum(1)
    assert counts.min() >= 1
    assert counts.max() <= 4
    assert known["keyframes"][VIDEO].any(0).all()  # every frame gets its turn


def test_extend_knows_a_prefix_of_both_tracks_up_to_the_same_time() -> None:
    known = draw("extend").known
    lengths = known[VIDEO].sum(1)
    assert sorted(set(lengths.tolist())) == [1, 2, 3, 4, 5]
    for video, audio, length in zip(known[VIDEO], known[AUDIO], lengths.tolist(), strict=True):
        assert video[:length].all()
        heard = int(audio.sum())
        assert audio[:heard].all()
        assert heard % 4 == 0
        end_s = POCKET.frame_ends_s[length - 1]
        assert end_s - 0.08 < heard / 50 <= end_s + 1e-3


def test_still_knows_the_frame_it_is_told() -> None:
    frames = torch.arange(64) % 7
    known = draw("still", still=frames).known[VIDEO]
    assert known[torch.arange(64), frames].all()
    others = known.clone()
    others[torch.arange(64), frames] = False
    assert not others[:, 1:].any()
    assert 0.3 < others[frames > 0, 0].float().mean() < 0.7  # the first frame as well, in half of the clips


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(TASKS)), st.integers(0, 2**31), st.floats(0.5, 5.0), st.floats(0, 1), st.floats(0, 1))
def test_levels_lie_in_range_and_known_cells_are_never_noisier(
    task: str, seed: int, shift: float, per_frame: float, soft: float
) -> None:
    noise = NoiseLevels(LevelDistribution(shift=shift), per_frame_share=per_frame, soft_known_share=soft)
    cells = draw(task, 16, noise, seed)
    for name in (VIDEO, AUDIO):
        level, known = cells.levels[name], cells.known[name]
        assert ((level >= 0) & (level <= 1)).all()
        assert (level[known] <= noise.soft_known_level).all()
        assert (level[~known] > 0).all()
        assert not (cells.marked(name) & known).any()
    assert (cells.levels[AUDIO][cells.known[AUDIO]] == 0).all()


def test_unknown_cells_share_one_level_unless_told_otherwise() -> None:
    cells = draw("image")
    video, audio = cells.levels[VIDEO], cells.levels[AUDIO]
    assert (video[:, 1:] == video[:, 1:2]).all()
    assert (audio == video[:, 1:2]).all()
    apart = draw("text", noise=NoiseLevels(per_track_share=1, per_frame_share=0)).levels
    assert (apart[AUDIO][:, 0] != apart[VIDEO][:, 0]).all()
    framed = draw("text", 256, NoiseLevels(per_track_share=0, per_frame_share=1))
    rising = (framed.levels[VIDEO].diff(dim=1) >= 0).all(1)
    assert 0.35 < rising.float().mean() < 0.65
    assert torch.equal(framed.levels[AUDIO], framed.levels[VIDEO][:, POCKET.audio_frame()])


def test_one_track_leaves_a_silent_track_at_pure_noise_and_unmarked() -> None:
    cells = draw("one_track", 300)
    assert 60 < cells.silent[:, 0].sum() < 140
    assert 60 < cells.silent[:, 1].sum() < 140
    assert not cells.silent.all(1).any()
    assert (cells.levels[AUDIO][cells.silent[:, 1]] == 1).all()
    assert not cells.marked(AUDIO)[cells.silent[:, 1]].any()
    assert cells.marked(VIDEO)[cells.silent[:, 1]].all()


def test_task_shares_follow_the_weights_and_the_generator_alone() -> None:
    weights = {"text": 3.0, "image": 1.0}
    make = lambda: draw_cells(2000, POCKET, weights, NoiseLevels(), torch.Generator().manual_seed(5))  # noqa: E731
    one, other = make(), make()
    assert torch.equal(one.levels[VIDEO], other.levels[VIDEO])
    assert abs((one.task == 0).float().mean() - 0.75) < 0.04
    with pytest.raises(InputError, match="valid values: text, image"):
        check_tasks({"texts": 1.0})
    with pytest.raises(InputError, match="positive"):
        check_tasks({"text": 0.0})


def test_error_is_that_of_the_velocity_on_marked_cells() -> None:
    draw_ = torch.Generator().manual_seed(0)
    clean, noise, x0 = (torch.randn(3, 4, 5, 2, 2, generator=draw_) for _ in range(3))
    level = torch.rand(3, 1, 5, 1, 1, generator=draw_) * 0.5 + 0.4
    marked = torch.rand(3, 1, 5, 1, 1, generator=draw_) < 0.6
    noisy = PATH.add_noise(clean, noise, level)
    velocity_error = ((noisy - x0) / level - (noise - clean)).square()
    expected = velocity_error[marked.expand_as(clean)].mean()
    assert torch.allclose(velocity_weighted_error(x0, clean, level, marked, 0.05), expected, rtol=1e-4)
    capped = velocity_weighted_error(x0, clean, torch.full_like(level, 1e-4), marked, 0.5)
    assert torch.allclose(capped, 4 * (x0 - clean).square()[marked.expand_as(clean)].mean(), rtol=1e-4)
    assert velocity_weighted_error(x0, clean, level, torch.zeros_like(marked), 0.05) == 0
    share = torch.rand(3, 1, 5, 2, 2, generator=draw_) * 3
    counted = (share * marked).expand_as(clean)
    expected = (velocity_error * counted).sum() / counted.sum()
    assert torch.allclose(velocity_weighted_error(x0, clean, level, marked, 0.05, share), expected, rtol=1e-4)


def test_a_track_is_shown_with_its_noise_and_a_right_answer_costs_nothing() -> None:
    draw_ = torch.Generator().manual_seed(0)
    shapes = {VIDEO: (2, 3, 7, 2, 2), AUDIO: (2, 4, 108)}
    clean, noise = ({n: torch.randn(shape, generator=draw_) for n, shape in shapes.items()} for _ in range(2))
    cells = draw("image", 2)
    marks = {name: (cells.levels[name], cells.marked(name)) for name in shapes}
    shown: dict[str, Track] = {}

    def denoise(tracks: Tracks) -> dict[str, torch.Tensor]:
        shown.update(tracks)
        return {VIDEO: clean[VIDEO], AUDIO: clean[AUDIO] + 1.0}

    losses = track_losses(denoise, POCKET, clean, noise, marks, min_level=0.05)
    assert losses[VIDEO] == 0
    level = cells.levels[AUDIO][:, :1].clamp_min(0.05)
    torch.testing.assert_close(losses[AUDIO], (1 / level**2).mean(), rtol=1e-4, atol=0)
    assert torch.equal(shown[VIDEO].values[:, :, 0], clean[VIDEO][:, :, 0])  # known
    level = cells.levels[VIDEO][:, None, 1:, None, None]
    mixed = (1 - level) * clean[VIDEO][:, :, 1:] + level * noise[VIDEO][:, :, 1:]
    torch.testing.assert_close(shown[VIDEO].values[:, :, 1:], mixed)
    assert shown[AUDIO].times_s.tolist() == pytest.approx(POCKET.audio_times_s)
