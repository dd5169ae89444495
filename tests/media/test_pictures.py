"""Contact sheets, spectrograms and plots, checked by what is drawn where."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from vitascope.core.errors import InputError, MediaError, ShapeError
from vitascope.media.pictures import contact_sheet, spectrogram_picture, write_picture
from vitascope.media.plots import PlotStyle, bar_plot, line_plot
from vitascope.media.reading import read_image


def test_contact_sheet_shows_first_and_last_frames_in_order() -> None:
    clip = torch.arange(9, dtype=torch.uint8).mul(20)[:, None, None, None].expand(9, 3, 16, 16)
    sheet = contact_sheet([clip, clip], ["a ball", ""], [None, torch.zeros(100)], num_columns=5)
    row = sheet[0, -4 - 32 - 4 - 8]  # margin, sound, gap, half of the last row of frames
    assert sheet.shape[2] == 5 * 16 + 4 * 4 + 8
    shown = [int(value) for value in dict.fromkeys(row.tolist()) if value < 200]
    assert shown == [0, 40, 80, 120, 160]
    assert (contact_sheet([clip], ["text"]).shape[1]) > contact_sheet([clip]).shape[1]
    assert contact_sheet([clip], frame_height_px=32).shape[1] == 32 + 8


def test_spectrogram_shows_a_tone_at_its_height_and_time() -> None:
    rate_hz = 16000
    time_s = torch.arange(rate_hz) / rate_hz
    tone = 0.9 * torch.sin(2 * math.pi * 2000 * time_s) * (time_s > 0.5)
    picture = spectrogram_picture(tone, rate_hz, 200, 100).float().sum(0)
    assert picture[:, :90].max() < 40
    mel_share = math.log10(1 + 2000 / 700) / math.log10(1 + 8000 / 700)
    assert abs(int(picture[:, 150].argmax()) - (99 - 99 * mel_share)) <= 2


def test_plots_draw_their_data() -> None:
    rising = line_plot({"up": ([0, 1, 2], [0, 1, 2])}, PlotStyle(width_px=300, height_px=200))
    blue = (rising[2].int() - rising[0].int()) > 100
    columns = blue.any(0).nonzero().flatten()
    left, right = int(columns[2]), int(columns[-3])
    rows = blue.float().argmax(0)
    assert rows[left] > rows[(left + right) // 2] > rows[right]
    bars = bar_plot({"one": 1.0, "two": 2.0}, PlotStyle(width_px=300, height_px=200))
    blue = (bars[2].int() - bars[0].int()) > 100
    heights = blue.sum(0)
    assert heights[240] == pytest.approx(2 * int(heights[110]), rel=0.05)
    log = line_plot({"a": ([1, 2, 3], [1e-3, 0.0, math.nan]), "b": ([1], [10.0])}, PlotStyle(log_y=True))
    assert log.shape == (3, 400, 640)


def test_pictures_go_to_files_and_come_back(tmp_path: Path) -> None:
    picture = torch.randint(0, 256, (3, 8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_picture(tmp_path / "a.png", picture)
    assert torch.equal(read_image(tmp_path / "a.png"), picture)
    write_picture(tmp_path / "a.jpg", picture)
    assert read_image(tmp_path / "a.jpg").shape == picture.shape
    with pytest.raises(MediaError, match=r"valid suffixes: \.png"):
        write_picture(tmp_path / "a.bmp", picture)
    with pytest.raises(ShapeError, match="uint8"):
        write_picture(tmp_path / "b.png", picture.float())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "a.png"]


def test_nothing_to_show_is_refused() -> None:
    with pytest.raises(ShapeError, match="at least one clip"):
        contact_sheet([])
    with pytest.raises(ShapeError, match="mono"):
        spectrogram_picture(torch.zeros(2, 10), 16000)
    with pytest.raises(InputError, match="nothing to plot"):
        line_plot({"a": ([1.0], [math.nan])})
    with pytest.raises(InputError, match="nothing to plot"):
        bar_plot({})
    with pytest.raises(InputError, match="as many x as y"):
        line_plot({"a": ([1.0, 2.0], [1.0])})
