"""What is given of later times, where the model reads it beside the clip, against LTXConditionPipeline in diffusers."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.pipelines.ltx import pipeline_ltx_condition
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from vitascope.core.errors import CapabilityError, InputError, ShapeError
from vitascope.core.random import generator
from vitascope.core.shapes import ClipFormat
from vitascope.core.tracks import VIDEO
from vitascope.diffusion.samplers import Step
from vitascope.media.reading import Clip
from vitascope.tasks.condition import known_frames
from vitascope.tasks.generate import generate, generate_batch, sample
from vitascope.tasks.known import start_tracks
from vitascope.tasks.long import extend, generate_any_length
from vitascope.tasks.request import GenerateRequest, Given, Keyframe, Shot
from vitascope.tasks.settings import check_batch

FORMAT = ClipFormat(64, 32, 25.0, 33)
LEVELS = (1.0, 0.8, 0.5, 0.2)
REQUEST = GenerateRequest("wind", format=FORMAT, seed=3, levels=LEVELS, guidance_scale=2.0)


def frames(count: int, seed: int) -> Tensor:
    shape = (count, 3, FORMAT.height_px, FORMAT.width_px)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def keyframe(frame: int, strength: float = 1.0) -> Keyframe:
    return Keyframe(frame / FORMAT.fps, frames(1, frame)[0], strength)


def shot(frame: int, count: int, strength: float = 1.0) -> Shot:
    return Shot(frame / FORMAT.fps, frames(count, 100 + frame), strength)


CASES = {
    "a picture at the start": Given((keyframe(0),)),
    "pictures at both ends": Given((keyframe(0), keyframe(32))),
    "between latent frames": Given((keyframe(13),)),
    "weak, at a level of the schedule": Given((keyframe(0, 0.8), keyframe(20, 0.5))),
    "weak, between two levels": Given((keyframe(0, 0.35), keyframe(20, 0.7))),
    "almost certain, and hardly": Given((keyframe(0, 0.95), keyframe(9, 0.1))),
    "weak frames, between two levels": Given(shots=(shot(0, 9, 0.6), shot(9, 17, 0.3))),
    "frames at the start": Given(shots=(shot(0, 9),)),
    "frames later, two latents and more": Given((keyframe(0),), shots=(shot(8, 25),)),
    "weak frames later": Given(shots=(shot(9, 9, 0.5),)),
}


def conditions(given: Given) -> list[LTXVideoCondition]:
    def picture(frame: Tensor) -> Any:
        return Image.fromarray(frame.movedim(0, -1).numpy())

    def index(time_s: float) -> int:
        return round(time_s * FORMAT.fps)

    pictures = [LTXVideoCondition(picture(k.picture), None, index(k.time_s), k.strength) for k in given.keyframes]
    clips = [LTXVideoCondition(None, list(map(picture, s.frames)), index(s.time_s), s.strength) for s in given.shots]
    return pictures + clips


@pytest.mark.parametrize("name", CASES)
def test_what_is_given_does_to_a_clip_what_it_does_in_diffusers(
    name: str, ltx: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (theirs, ours), given = ltx["conditions"], CASES[name]
    # ours encodes to the mean, and adds no noise of its own to known cells
    monkeypatch.setattr(pipeline_ltx_condition, "retrieve_latents", lambda out, generator: out.latent_dist.mode())
    expected = theirs(
        conditions=conditions(given), prompt="wind", negative_prompt="", width=64, height=32, num_frames=33,
        frame_rate=25, timesteps=[1000 * level for level in LEVELS], guidance_scale=2.0, image_cond_noise_scale=0.0,
        generator=generator(3, VIDEO), output_type="latent",
    ).frames  # fmt: skip
    out = sample(ours, [replace(REQUEST, given=given)]).tracks[VIDEO]
    assert out.values.shape == expected.shape == (1, 8, 5, 1, 2)
    assert len(out.times_s) == out.noise.shape[2] == 5
    assert (out.values - expected).norm() / expected.norm() < 1e-4
    plain = sample(ours, [REQUEST]).tracks[VIDEO].values
    assert (plain - expected).norm() / expected.norm() > 0.01


@pytest.mark.parametrize(
    "name", ["a picture at the start", "pictures at both ends", "weak, at a level of the schedule"]
)
def test_noise_on_known_frames_does_what_it_does_in_diffusers(
    name: str, ltx: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (theirs, ours), given = ltx["conditions"], CASES[name]
    monkeypatch.setattr(pipeline_ltx_condition, "retrieve_latents", lambda out, generator: out.latent_dist.mode())
    plain_noise, draw = randn_tensor, generator(3, "known")
    start = start_tracks(ours, FORMAT, given, 3)[VIDEO]
    count = start.values.shape[2]

    def noise(shape: Any, **more: Any) -> Tensor:
        if len(shape) == 5:
            return plain_noise(shape, **more)
        # tokens, of which theirs has those beside the clip first
        ours = torch.randn(start.values.shape[1:], generator=draw)
        return torch.cat([ours[:, 5:], ours[:, :5]], 1).flatten(1).T[None]

    monkeypatch.setattr(pipeline_ltx_condition, "randn_tensor", noise)
    expected = theirs(
        conditions=conditions(given), prompt="wind", negative_prompt="", width=64, height=32, num_frames=33,
        frame_rate=25, timesteps=[1000 * level for level in LEVELS], guidance_scale=2.0, image_cond_noise_scale=1.0,
        generator=generator(3, VIDEO), output_type="latent",
    ).frames  # fmt: skip
    asked = replace(REQUEST, given=given, image_cond_noise_scale=1.0)
    out = sample(ours, [asked]).tracks[VIDEO].values
    made = start.noise.flatten()[:5] > 0
    assert count == 5 + (name == "pictures at both ends") + (name == "weak, at a level of the schedule")
    error = (out - expected)[:, :, made].norm() / expected[:, :, made].norm()
    assert error < 1e-4  # fp32 sums in another order
    # frames that are given stay as they are; theirs keep the noise of the last step
    assert torch.equal(out[:, :, ~made], start.values[:, :, :5][:, :, ~made])
    without = sample(ours, [replace(asked, image_cond_noise_scale=0.0)]).tracks[VIDEO].values
    changed = float((out - without).norm() / without.norm())
    assert (changed > 1e-3) == bool((start.noise == 0).any())
    again = sample(ours, [replace(asked, seed=9), asked]).tracks[VIDEO].values[1:]
    torch.testing.assert_close(again, out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "given",
    [
        Given((keyframe(0, 0.0),)),
        Given((keyframe(0, 0.1), keyframe(20, 0.05))),
        Given((keyframe(0, 0.6), keyframe(13, 1.0))),
        Given((keyframe(0),), shots=(shot(8, 25, 0.1),)),
    ],
)
def test_what_is_given_lies_over_a_draft_as_in_diffusers(
    given: Given, ltx: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = ltx["conditions"]
    monkeypatch.setattr(pipeline_ltx_condition, "retrieve_latents", lambda out, generator: out.latent_dist.mode())
    draft = torch.randn(8, 5, 1, 2, generator=torch.Generator().manual_seed(5))
    expected = theirs(
        conditions=conditions(given), prompt="wind", negative_prompt="", width=64, height=32, num_frames=33,
        frame_rate=25, timesteps=[1000 * level for level in LEVELS], denoise_strength=0.8, latents=draft[None],
        guidance_scale=2.0, image_cond_noise_scale=0.0, generator=generator(3, VIDEO), output_type="latent",
    ).frames  # fmt: skip
    asked = replace(REQUEST, levels=LEVELS[1:], given=replace(given, draft=draft))
    out = sample(ours, [asked]).tracks[VIDEO].values
    assert (out - expected).norm() / expected.norm() < 1e-4  # fp32 sums in another order


def test_a_keyframe_that_is_not_there_leaves_the_draft(ltx: Any) -> None:
    draft = torch.randn(8, 5, 1, 2, generator=torch.Generator().manual_seed(5))
    plain = start_tracks(ltx["conditions"].ours, FORMAT, Given(draft=draft), 3, 0.6)[VIDEO]
    shown = start_tracks(ltx["conditions"].ours, FORMAT, Given((keyframe(0, 0.0),), draft=draft), 3, 0.6)[VIDEO]
    assert torch.equal(shown.values, plain.values)
    assert torch.equal(shown.noise, plain.noise)


def test_noise_on_known_frames_is_refused_where_there_are_none(ltx: Any) -> None:
    for scale in (-0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match=r"noise on known frames lies in \[0, 1\]"):
            replace(REQUEST, image_cond_noise_scale=scale)
    ours = ltx["conditions"].ours
    denoiser = SimpleNamespace(capabilities=replace(ours.denoiser.capabilities, noise="clip"))
    with pytest.raises(CapabilityError, match="no known frames"):
        check_batch(replace(ours, denoiser=denoiser), [replace(REQUEST, image_cond_noise_scale=0.1)])


def test_frames_beside_the_clip_are_never_shown(ltx: Any) -> None:
    ours, given = ltx["conditions"].ours, Given((keyframe(0), keyframe(13)))
    start = start_tracks(ours, FORMAT, given, 3)[VIDEO]
    assert start.values.shape[2] == 6
    assert float(start.times_s[5]) == pytest.approx(13 / 25)
    assert start.noise.flatten().tolist() == [0, 1, 1, 1, 1, 0]
    torch.testing.assert_close(start.values[:, :, 1:5], start_tracks(ours, FORMAT, Given(), 3)[VIDEO].values[:, :, 1:])
    steps: list[Step] = []
    made = generate(ours, replace(REQUEST, given=given), steps.append)
    assert made.clip.frames.shape[0] == 33
    assert all(step.tracks[VIDEO].values.shape[2] == step.x0[VIDEO].shape[2] == 5 for step in steps)


def test_clips_of_a_batch_share_the_times_beside_them(ltx: Any) -> None:
    ours = ltx["conditions"].ours
    one, same, other = (replace(REQUEST, given=Given((keyframe(frame),))) for frame in (13, 13, 21))
    alone = sample(ours, [one]).tracks[VIDEO].values
    together = sample(ours, [replace(same, seed=9), one]).tracks[VIDEO].values[1:]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    for batch in ([one, other], [one, REQUEST]):
        with pytest.raises(InputError, match="share the times"):
            generate_batch(ours, batch)


def test_what_does_not_fit_is_refused(ltx: Any) -> None:
    conditions, text = ltx["conditions"].ours, ltx["text"].ours
    past = frames(17, 5)
    for given, kind, message in (
        (Given((keyframe(33),)), InputError, "after the last frame, at 1.280 s"),
        (Given(shots=(shot(33, 9),)), InputError, "a shot at 1.32 s lies after the last frame"),
        (Given(shots=(shot(16, 25),)), InputError, "a shot of 25 frames at 0.64 s does not fit a clip of 33"),
        (Given(shots=(shot(8, 1),)), ShapeError, "has 9 frames or more, got 1; one frame is a keyframe"),
        (Given(shots=(shot(8, 12),)), ShapeError, "12"),
        (Given(shots=(shot(0, 9), shot(0, 17))), InputError, "lies over something else"),
        (Given((keyframe(0),), shots=(shot(0, 9),)), InputError, r"a keyframe at 0\.0 s lies in the shot at 0\.0 s"),
        (Given(past=past, shots=(shot(0, 9, 0.0),)), InputError, "lies over something else"),
        (Given((keyframe(4),), past=past), InputError, "already there"),
    ):
        with pytest.raises(kind, match=message):
            generate(conditions, replace(REQUEST, given=given))
    with pytest.raises(InputError, match=r"a keyframe at 0\.2 s lies in the shot at 0\.0 s"):
        generate(text, replace(REQUEST, given=Given((keyframe(5),), shots=(shot(0, 9, 0.0),))))
    with pytest.raises(CapabilityError, match="at the beginning of the clip alone"):
        generate(text, replace(REQUEST, given=Given(shots=(shot(8, 9),))))
    with pytest.raises(InputError, match=r"starts at level 0\.9, below cells at level 1"):
        generate(conditions, replace(REQUEST, levels=(0.9, 0.5), given=Given((keyframe(0, 0.3),))))
    long = replace(REQUEST, format=replace(FORMAT, num_frames=401))
    with pytest.raises(InputError, match="shots and drafts work for clips of at most 161 frames, got 401"):
        generate_any_length(conditions, replace(long, given=Given(shots=(shot(0, 9),))))
    with pytest.raises(InputError, match="not with shots or a draft"):
        extend(text, replace(REQUEST, given=Given(shots=(shot(0, 9),))), Clip(past, 25.0, None, 16_000))
    with pytest.raises(CapabilityError, match="no shots"):
        known_frames(text, FORMAT, Given(shots=(shot(0, 9),)))
    with pytest.raises(InputError, match="no shots"):
        Given(video=past, shots=(shot(0, 9),))
    for strength, time_s in ((1.5, 0.0), (1.0, -1.0)):
        with pytest.raises(InputError):
            Shot(time_s, past, strength)
