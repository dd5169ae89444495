"""Sizes and rates of frames."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitascope.core.errors import InputError, ShapeError
from vitascope.media.frames import FITS, Fit, fit, fit_samples, resample_frames, resize

sides = st.integers(1, 40)


@given(sides, sides, sides, sides, st.sampled_from(FITS))
def test_fit_gives_exactly_the_size_asked_for(
    height: int, width: int, new_height: int, new_width: int, how: Fit
) -> None:
    frames = torch.full((2, 3, height, width), 77, dtype=torch.uint8)
    fitted = fit(frames, new_width, new_height, how)
    assert fitted.shape == (2, 3, new_height, new_width)
    assert fitted.dtype == torch.uint8
    assert set(fitted.unique().tolist()) <= ({0, 77} if how == "pad" else {77})


def test_crop_keeps_the_middle_and_the_proportions() -> None:
    frame = torch.zeros(3, 20, 60, dtype=torch.uint8)
    frame[:, :, 20:40] = 200
    assert (fit(frame, 20, 20, "crop") == 200).all()
    padded = fit(frame, 60, 60, "pad")
    assert (padded[:, 20:40, 20:40] == 200).all()
    assert (padded[:, :20] == 0).all()
    assert (padded[:, 40:] == 0).all()


def test_resize_low_passes_when_it_shrinks() -> None:
    stripes = (torch.arange(64) % 2 * 255).to(torch.uint8).expand(3, 64, 64)
    small = resize(stripes, 8, 8)
    assert (small.int() - 128).abs().max() <= 6
    as_floats = resize(stripes.float() / 255, 8, 8)
    assert (as_floats * 255 - small).abs().max() <= 0.51


@given(st.integers(1, 50), st.sampled_from([6.0, 12.0, 23.976, 24.0, 30.0]), st.sampled_from([8.0, 12.0, 24.0, 60.0]))
def test_resampled_frames_show_what_was_on_screen(num_frames: int, fps: float, new_fps: float) -> None:
    frames = torch.arange(num_frames)
    new = resample_frames(frames, fps, new_fps)
    assert abs(len(new) / new_fps - num_frames / fps) <= 0.5 / new_fps + 1e-9 or len(new) == 1
    middles_s = (torch.arange(len(new)) + 0.5) / new_fps
    shown = (new + 0.5) / fps
    inside = middles_s < num_frames / fps
    assert ((shown - middles_s).abs()[inside] <= 0.5 / fps + 1e-6).all()


def test_resampling_to_a_number_of_frames_repeats_the_last_one() -> None:
    assert resample_frames(torch.arange(3), 12, 12, num_frames=5).tolist() == [0, 1, 2, 2, 2]
    assert resample_frames(torch.arange(4), 24, 12).tolist() == [1, 3]


def test_samples_are_cut_or_padded() -> None:
    assert fit_samples(torch.ones(3), 5).tolist() == [1, 1, 1, 0, 0]
    assert fit_samples(torch.ones(3), 2).tolist() == [1, 1]


def test_what_cannot_be_made_is_refused() -> None:
    frames = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ShapeError, match="at least 1"):
        resize(frames, 0, 4)
    with pytest.raises(InputError, match="crop, stretch, pad"):
        fit(frames, 4, 4, "fill")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="must be positive"):
        resample_frames(frames, 0, 12)
    with pytest.raises(InputError, match="no frames"):
        resample_frames(frames[:0], 12, 12)
