"""Windows: their arithmetic, and clips made of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vitascope.core.errors import InputError
from vitascope.core.memory import held_bytes
from vitascope.diffusion.samplers import Step
from vitascope.media.reading import Clip
from vitascope.tasks.fitting import MemoryLimit
from vitascope.tasks.generate import Generated, generate
from vitascope.tasks.known import _frame, start_tracks
from vitascope.tasks.load import load_pipeline
from vitascope.tasks.long import FADE_SAMPLES, _join_sound, _part, extend, generate_any_length, plan_windows
from vitascope.tasks.memory import MemoryUse
from vitascope.tasks.pipeline import Pipeline
from vitascope.tasks.request import GenerateRequest, Given, Keyframe

FPS, RATE = 12.0, 16000


def request(pipeline: Pipeline, num_frames: int, seed: int = 0, **known: object) -> GenerateRequest:
    fmt = replace(pipeline.defaults.clip, num_frames=num_frames)
    return GenerateRequest("a red ball", format=fmt, seed=seed, num_inference_steps=2, given=Given(**known))  # type: ignore[arg-type]


def frames_of(count: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 32, 32), generator=draw, dtype=torch.uint8)


def tone(num_samples: int) -> Tensor:
    return torch.sin(torch.arange(num_samples) * 0.05) * 0.5


def sound_of(clip: Clip) -> Tensor:
    assert clip.samples is not None
    return clip.samples


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 50), st.integers(0, 40), st.data())
def test_windows_make_every_frame_once(stride: int, latents: int, more: int, have: int, data: st.DataObject) -> None:
    native = 1 + latents * stride
    overlap = data.draw(st.integers(1, native - 1))
    num_frames = have + more * stride if have else 1 + more * stride
    windows = plan_windows(num_frames, have, native, overlap, stride)
    made = have
    for number, window in enumerate(windows):
        assert window.first + window.overlap == made
        assert window.num_frames <= native
        assert window.num_frames % stride == 1 % stride
        if made:
            assert 1 <= window.overlap <= overlap
            assert window.overlap % stride == 1 % stride
        else:
            assert number == window.overlap == 0
        made = window.first + window.num_frames
    assert made == num_frames


def test_a_short_clip_is_a_clip(pipeline: Pipeline) -> None:
    wanted = request(pipeline, 5)
    assert torch.equal(generate_any_length(pipeline, wanted).clip.frames, generate(pipeline, wanted).clip.frames)


def test_a_long_clip_begins_with_the_short_one_and_counts_its_steps(pipeline: Pipeline) -> None:
    steps: list[Step] = []
    long = generate_any_length(pipeline, request(pipeline, 17), steps.append)
    assert long.clip.frames.shape == (17, 3, 32, 32)
    assert sound_of(long.clip).shape == (request(pipeline, 17).format.num_samples,)
    short = generate(pipeline, request(pipeline, 9))
    assert torch.equal(long.clip.frames[:9], short.clip.frames)
    kept = len(sound_of(short.clip)) - FADE_SAMPLES
    assert torch.equal(sound_of(long.clip)[:kept], sound_of(short.clip)[:kept])
    # 9 frames, then twice 4 more: three windows of two steps.
    assert [(step.index, step.num_steps) for step in steps] == [(index, 6) for index in range(6)]
    assert long.recipe["num_frames"] == 17
    assert torch.equal(long.clip.frames, generate_any_length(pipeline, request(pipeline, 17)).clip.frames)
    assert not torch.equal(long.clip.frames[9:13], long.clip.frames[13:])


def test_what_a_long_clip_is_given_goes_to_its_windows(pipeline: Pipeline) -> None:
    samples = tone(request(pipeline, 17).format.num_samples)
    heard = generate_any_length(pipeline, request(pipeline, 17, audio=samples))
    assert torch.equal(sound_of(heard.clip), samples)
    seen = generate_any_length(pipeline, request(pipeline, 17, video=frames_of(17)))
    assert torch.equal(seen.clip.frames, frames_of(17))
    assert len(sound_of(seen.clip)) == len(samples)
    plain, shown = (
        generate_any_length(pipeline, request(pipeline, 17, keyframes=keyframes))
        for keyframes in ((), (Keyframe(15 / FPS, frames_of(1)[0]),))
    )
    assert torch.equal(plain.clip.frames[:13], shown.clip.frames[:13])
    assert not torch.equal(plain.clip.frames[13:], shown.clip.frames[13:])


def test_extending_keeps_the_past(pipeline: Pipeline) -> None:
    past = Clip(frames_of(14), FPS, tone(18667), RATE)
    made = extend(pipeline, request(pipeline, 9), past)
    assert made.clip.frames.shape == (14 + 8, 3, 32, 32)
    assert torch.equal(made.clip.frames[:14], past.frames)
    assert torch.equal(sound_of(made.clip)[: 18667 - FADE_SAMPLES], sound_of(past)[:-FADE_SAMPLES])
    assert len(sound_of(made.clip)) == -(-22 * RATE // 12)
    other = extend(pipeline, request(pipeline, 9), replace(past, frames=frames_of(14, 1)))
    assert not torch.equal(made.clip.frames[14:], other.clip.frames[14:])
    silent = extend(pipeline, request(pipeline, 5), Clip(frames_of(1), FPS, None, None))
    assert len(silent.clip.frames) == 5


def test_the_past_is_known_to_the_model(pipeline: Pipeline) -> None:
    fmt = pipeline.defaults.clip
    tracks = start_tracks(pipeline, fmt, Given(past=frames_of(5), past_audio=tone(6666)), 0)
    assert tracks["video"].noise[0, 0, :, 0, 0].tolist() == [0, 0, 1]
    pixels = frames_of(5).movedim(0, 1)[None].float() / 127.5 - 1
    torch.testing.assert_close(tracks["video"].values[:, :, :2], pipeline.video_codec.encode(pixels))
    # 6666 samples hold 20 whole latents of 320, which are 5 whole patches of 4.
    assert tracks["audio"].noise[0, 0].tolist() == [0] * 20 + [1] * 20
    assert tracks["audio"].values.shape == (1, 6, 40)


def test_an_extension_follows_its_own_sound_and_keyframes(pipeline: Pipeline) -> None:
    past = Clip(frames_of(5), FPS, tone(6667), RATE)
    more = -tone(5334)
    made = extend(pipeline, request(pipeline, 5, audio=more), past)
    assert torch.equal(sound_of(made.clip), torch.cat([sound_of(past), more])[:12000])
    shown = extend(pipeline, request(pipeline, 5, keyframes=(Keyframe(4 / FPS, frames_of(1)[0]),)), past)
    plain = extend(pipeline, request(pipeline, 5), past)
    assert not torch.equal(shown.clip.frames[5:], plain.clip.frames[5:])


@pytest.mark.parametrize("have", [7, 8])
def test_a_keyframe_between_two_frames_is_of_one_frame(have: int, pipeline: Pipeline) -> None:
    windows = plan_windows(have + 80, have, 9, 5, 4)
    for frame in range(have, have + 78):
        asked = request(pipeline, have + 80, keyframes=(Keyframe((frame + 0.5) / FPS, frames_of(1)[0]),))
        found = []
        for window in windows:
            part = _part(asked, window, frames_of(1).expand(have + 80, 3, 32, 32), None)
            places = [_frame(part.format, keyframe.time_s, "keyframe") for keyframe in part.given.keyframes]
            assert all(window.overlap <= place < window.num_frames for place in places)
            found += [window.first + place for place in places]
        assert found == [round((frame + 0.5) / FPS * FPS)]


def test_what_windows_took_is_told(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = MemoryLimit(held_bytes(torch.device("cpu")) + 400 * 10**6)
    under = load_pipeline(str(tiny_model), "cpu", "fp32", memory=limit)
    uses: list[MemoryUse] = []

    def made(*arguments: Any) -> Generated:
        result, peaks = generate(*arguments), [{"denoise": 7, "encode": 3}, {"denoise": 9}, {"denoise": 8, "decode": 5}]
        assert result.memory is not None
        uses.append(replace(result.memory, measured=peaks[len(uses)]))
        return replace(result, memory=uses[-1])

    monkeypatch.setattr("vitascope.tasks.long.generate", made)
    told = generate_any_length(under, request(under, 17)).memory
    assert told == MemoryUse(uses[2].plan, {"denoise": 9, "encode": 3, "decode": 5})


def test_refusals(pipeline: Pipeline) -> None:
    past = Clip(frames_of(5), FPS, None, None)
    with pytest.raises(InputError, match="the clip to extend has 24 fps, the request 12"):
        extend(pipeline, request(pipeline, 5), replace(past, fps=24.0))
    with pytest.raises(InputError, match="not with a given video, camera path or past"):
        extend(pipeline, request(pipeline, 5, camera=torch.zeros(5, 7)), past)
    with pytest.raises(InputError, match="1 frames add nothing"):
        extend(pipeline, request(pipeline, 1), past)
    with pytest.raises(InputError, match="10 frames do not fit"):
        extend(pipeline, request(pipeline, 10), past)
    for time_s in (0.0, 5 / FPS):
        with pytest.raises(InputError, match=r"keyframes lie between 0.083 s and 0.333 s here"):
            extend(pipeline, request(pipeline, 5, keyframes=(Keyframe(time_s, frames_of(1)[0]),)), past)
    with pytest.raises(InputError, match=r"between 0.000 s and 1.333 s here"):
        generate_any_length(pipeline, request(pipeline, 17, keyframes=(Keyframe(1.5, frames_of(1)[0]),)))
    with pytest.raises(InputError, match="a camera path works for clips of at most 9 frames, got 17"):
        generate_any_length(pipeline, request(pipeline, 17, camera=torch.zeros(17, 7)))
    with pytest.raises(InputError, match="the given video has 9 frames, the clip 17"):
        generate_any_length(pipeline, request(pipeline, 17, video=frames_of(9)))
    with pytest.raises(InputError, match="a clip has at most 1000000 frames, got 1000001"):
        generate_any_length(pipeline, request(pipeline, 1_000_001))
    with pytest.raises(InputError, match=r"18 frames do not fit: .*nearest: 17, 21"):
        generate_any_length(pipeline, request(pipeline, 18))


def test_sounds_pass_over_without_a_jump() -> None:
    joined = _join_sound(torch.ones(10), torch.full((12,), 3.0), 6, fade=4)
    torch.testing.assert_close(joined, torch.tensor([1.0] * 6 + [1, 5 / 3, 7 / 3, 3] + [3.0] * 8))
    assert torch.equal(_join_sound(torch.zeros(0), torch.ones(5), 0), torch.ones(5))
