"""Arithmetic between pixels, samples, latents and seconds; tracks, random numbers and errors."""

from __future__ import annotations

import re
from math import isclose
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitascope.core.errors import InputError, ShapeError, VitascopeError, choice
from vitascope.core.random import derive_seed, generator
from vitascope.core.shapes import (
    ClipFormat,
    latent_frame_times,
    latent_frames,
    latent_size,
    nearest_multiples,
    num_audio_latents,
    pixel_frames,
)
from vitascope.core.tracks import Track

sizes = st.integers(1, 2000)
strides = st.integers(1, 40)


@given(sizes, strides)
def test_frames_and_latent_frames_are_inverse(count: int, stride: int) -> None:
    assert latent_frames(pixel_frames(count, stride), stride) == count


@given(st.integers(-5, 2000), strides)
def test_frames_that_do_not_fit_name_the_nearest_that_do(num_frames: int, stride: int) -> None:
    if num_frames >= 1 and (num_frames - 1) % stride == 0:
        assert pixel_frames(latent_frames(num_frames, stride), stride) == num_frames
        return
    with pytest.raises(ShapeError) as caught:
        latent_frames(num_frames, stride)
    named = [int(text) for text in re.findall(r"\d+", str(caught.value).split("nearest: ")[1])]
    assert all(pixel_frames(latent_frames(near, stride), stride) == near for near in named)
    assert all(abs(near - num_frames) < stride or num_frames < 1 for near in named)


@given(st.integers(0, 2000), strides)
def test_sizes_that_do_not_fit_name_the_nearest_multiples(size: int, stride: int) -> None:
    if size and size % stride == 0:
        assert latent_size(size, stride, "width") * stride == size
        return
    with pytest.raises(ShapeError, match="width") as caught:
        latent_size(size, stride, "width")
    for near in nearest_multiples(size, stride):
        assert str(near) in str(caught.value)
        assert latent_size(near, stride, "width") * stride == near
        assert abs(near - size) <= stride


@given(st.integers(1, 40), strides, st.floats(1, 120))
def test_latent_frames_stand_at_the_centre_of_the_frames_they_cover(count: int, stride: int, fps: float) -> None:
    times = latent_frame_times(count, stride, fps)
    centres = [(frame + 0.5) / fps for frame in range(pixel_frames(count, stride))]
    groups = [centres[:1], *(centres[i : i + stride] for i in range(1, len(centres), stride))]
    assert len(times) == count
    assert all(isclose(time, sum(group) / len(group), rel_tol=1e-9) for time, group in zip(times, groups, strict=True))


@given(st.floats(0.01, 60), st.floats(1, 100), st.integers(1, 8))
def test_audio_latents_cover_the_clip_in_whole_patches(duration_s: float, per_s: float, patch: int) -> None:
    count = num_audio_latents(duration_s, per_s, patch)
    assert count % patch == 0
    assert count / per_s >= duration_s - 1e-5 * patch
    assert (count - patch) / per_s < duration_s


@given(st.integers(1, 300), st.floats(1, 60), st.sampled_from([8000, 16000, 44100]))
def test_samples_cover_the_clip_and_no_more(num_frames: int, fps: float, rate_hz: int) -> None:
    fmt = ClipFormat(num_frames=num_frames, fps=fps, sample_rate_hz=rate_hz)
    assert 0 <= fmt.num_samples - fmt.duration_s * rate_hz + 1e-5 < 1 + 1e-5


@pytest.mark.parametrize("name", ["width_px", "height_px", "fps", "num_frames", "sample_rate_hz"])
def test_formats_must_be_positive(name: str) -> None:
    with pytest.raises(ShapeError, match=name):
        ClipFormat(**{name: 0})
    not_a_number: dict[str, Any] = {name: float("nan")}
    with pytest.raises(ShapeError, match=name):
        ClipFormat(**not_a_number)


def test_no_latent_frames_have_no_frames() -> None:
    with pytest.raises(ShapeError, match="at least one"):
        pixel_frames(0, 4)


def test_tracks_check_their_axes_and_keep_their_times() -> None:
    track = Track(torch.zeros(2, 3, 4), torch.ones(2, 1, 4), torch.arange(4.0))
    changed = track.with_values(torch.ones(2, 3, 4))
    assert changed.noise is track.noise
    assert changed.times_s is track.times_s
    assert track.with_values(track.values, torch.zeros(2, 1, 1)).noise.shape == (2, 1, 1)
    for values, noise in (((2, 3, 4, 4), (2, 1, 4, 4)), ((2, 3, 4), (2, 3, 4)), ((2, 3, 4), (2, 1, 4, 1, 1))):
        with pytest.raises(ShapeError):
            Track(torch.zeros(values), torch.ones(noise), torch.arange(4.0))


def test_seeds_follow_the_path_alone() -> None:
    assert derive_seed(1, "a", 2) == derive_seed(1, "a", "2") != derive_seed(1, "a", 3)
    assert derive_seed(1, "a") != derive_seed(2, "a")
    # the same on every machine: a pool of clips is named and drawn by these
    assert derive_seed(0, "pool", "train", 7) == 7570283320343016923
    torch.rand(3)
    one, other = (torch.rand(4, generator=generator(5, "x")) for _ in range(2))
    assert torch.equal(one, other)


@given(st.integers(-(2**70), 2**70), st.text(max_size=5))
def test_seeds_fit_a_generator(seed: int, name: str) -> None:
    assert 0 <= derive_seed(seed, name) < 2**63


def test_choices_name_the_valid_values() -> None:
    assert choice("size", "big", {"big": 1}) == "big"
    with pytest.raises(InputError, match="size 'huge' is not known; valid values: big, small") as caught:
        choice("size", "huge", ["big", "small"])
    assert isinstance(caught.value, VitascopeError)
    assert isinstance(caught.value, ValueError)
