"""Who may read whom: token by token, on video, audio and the exchange between them, in masks and in the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vitascope.core.errors import ShapeError
from vitascope.core.protocols import CAUSAL, FULL, TemporalStrategy
from vitascope.core.shapes import latent_frame_times, pixel_frames
from vitascope.core.tracks import TextContext, Track
from vitascope.models.factorised.config import FactorisedConfig
from vitascope.models.factorised.model import FactorisedDenoiser
from vitascope.models.factorised.timing import TOLERANCE_S, Masks, Spans, build_masks

FRAMES, STRIDE, FPS = 6, 4, 12.0
AUDIO_PER_S, PATCH, TOKENS = 10.0, 2, 9
WINDOW = TemporalStrategy("window", window=2, anchor_every=3)
FRAME_ENDS = [pixel_frames(i + 1, STRIDE) / FPS for i in range(FRAMES)]
TOKEN_ENDS = [(i + 1) * PATCH / AUDIO_PER_S for i in range(TOKENS)]


def make_tracks() -> dict[str, Track]:
    draw = torch.Generator().manual_seed(0)
    audio = TOKENS * PATCH
    return {
        "video": Track(
            torch.randn(1, 4, FRAMES, 2, 2, generator=draw),
            torch.full((1, 1, FRAMES, 1, 1), 0.5),
            torch.tensor(latent_frame_times(FRAMES, STRIDE, FPS)),
        ),
        "audio": Track(
            torch.randn(1, 6, audio, generator=draw),
            torch.full((1, 1, audio), 0.5),
            (torch.arange(audio) + 0.5) / AUDIO_PER_S,
        ),
    }


def make(depth: int, exchange_layers: tuple[int, ...]) -> FactorisedDenoiser:
    torch.manual_seed(0)
    config = FactorisedConfig(
        width=16, depth=depth, num_heads=2, audio_width=8, audio_heads=2, text_width=6, video_channels=4,
        audio_channels=6, patch=(1, 2, 2), audio_patch=PATCH, base_grid=(1, 1), exchange_layers=exchange_layers,
    )  # fmt: skip
    model = FactorisedDenoiser(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.requires_grad_(False)


Change = Callable[[dict[str, Track], str, slice], Track]


def louder(tracks: dict[str, Track], name: str, at: slice) -> Track:
    values = tracks[name].values.clone()
    values[:, :, at] += 1.0
    return tracks[name].with_values(values)


def noisier(tracks: dict[str, Track], name: str, at: slice) -> Track:
    noise = tracks[name].noise.clone()
    noise[:, :, at] = 0.9
    return tracks[name].with_values(tracks[name].values, noise)


def reach(
    model: FactorisedDenoiser, strategy: TemporalStrategy, tracks: dict[str, Track], change: Change = louder
) -> dict[tuple[str, str], Tensor]:
    """(to, from): a matrix (tokens to, tokens from), True where a change of one reaches the output of the other."""
    text = TextContext(torch.ones(1, 2, 6), torch.ones(1, 2, dtype=torch.bool))
    before = _by_token(model(tracks, text, strategy=strategy))
    columns: dict[tuple[str, str], list[Tensor]] = {}
    for name in tracks:
        step = PATCH if name == "audio" else 1
        for token in range(tracks[name].values.shape[2] // step):
            changed = {**tracks, name: change(tracks, name, slice(token * step, (token + 1) * step))}
            after = _by_token(model(changed, text, strategy=strategy))
            for other, value in after.items():
                columns.setdefault((other, name), []).append((value != before[other]).any(1))
    return {key: torch.stack(value, 1) for key, value in columns.items()}


def _by_token(out: dict[str, Tensor]) -> dict[str, Tensor]:
    tokens = {"video": lambda x: x[0].transpose(0, 1).flatten(1), "audio": lambda x: x[0].T.unflatten(0, (-1, PATCH))}
    return {name: tokens[name](value).flatten(1) for name, value in out.items()}


def matrix(rule: Callable[[int, int], bool], rows: int, columns: int) -> Tensor:
    return torch.tensor([[rule(i, j) for j in range(columns)] for i in range(rows)])


def index_of(token: int) -> int:
    """The first video frame that ends no earlier than an audio token."""
    return sum(end < TOKEN_ENDS[token] - TOLERANCE_S for end in FRAME_ENDS)


def in_window(reader: int, read: int) -> bool:
    return read <= reader and (reader - read < WINDOW.window or read % WINDOW.anchor_every == 0)


ends = {"video": FRAME_ENDS, "audio": TOKEN_ENDS}
counts = {"video": FRAMES, "audio": TOKENS}


def direct(kind: str, to: str, source: str) -> Tensor:
    """What a token of `to` reads of `source` in one attention, by the rules as the module states them."""

    def rule(i: int, j: int) -> bool:
        if kind == "full":
            return True
        earlier = ends[source][j] <= ends[to][i] + TOLERANCE_S
        if kind == "causal":
            return earlier
        frame_i, frame_j = (n if name == "video" else index_of(n) for n, name in ((i, to), (j, source)))
        return earlier and in_window(frame_i, frame_j)

    return matrix(rule, counts[to], counts[source])


@pytest.mark.parametrize("strategy", [FULL, CAUSAL, WINDOW], ids=lambda strategy: strategy.kind)
@pytest.mark.parametrize("change", [louder, noisier])
def test_one_layer_sees_exactly_what_the_strategy_says(strategy: TemporalStrategy, change: Change) -> None:
    """Attention over time, then the exchange, which reads the other track as it was after its own attention."""
    seen = reach(make(1, (0,)), strategy, make_tracks(), change)
    own = {name: direct(strategy.kind, name, name) for name in ends}
    for to, source in (("video", "audio"), ("audio", "video")):
        assert torch.equal(seen[to, to], own[to]), to
        across = direct(strategy.kind, to, source).int() @ own[source].int() > 0
        assert torch.equal(seen[to, source], across), (to, source)


def test_deep_causal_models_let_nothing_back_from_the_future() -> None:
    seen = reach(make(3, (0, 1, 2)), CAUSAL, make_tracks())
    for (to, source), matrix_ in seen.items():
        later = torch.tensor(ends[source])[None] > torch.tensor(ends[to])[:, None] + TOLERANCE_S
        assert not (matrix_ & later).any(), (to, source)
        assert torch.equal(matrix_, ~later), (to, source)  # and all of the past is heard


def test_the_first_frame_hears_nothing_before_a_token_has_ended_and_is_finite() -> None:
    assert FRAME_ENDS[0] < TOKEN_ENDS[0]
    seen = reach(make(1, (0,)), CAUSAL, make_tracks())
    assert not seen["video", "audio"][0].any()
    assert seen["video", "audio"][1].any()


@pytest.mark.parametrize("name", ["video", "audio"])
def test_a_lone_track_in_causal_and_window_strategies(name: str) -> None:
    tracks = {name: make_tracks()[name]}
    for strategy in (CAUSAL, WINDOW):
        seen = reach(make(1, (0,)), strategy, tracks)[name, name]
        kind = "causal" if name == "audio" else strategy.kind  # without frames a window is plain causality
        assert torch.equal(seen, direct(kind, name, name))


@given(st.integers(1, 12), st.integers(1, 9), st.floats(1, 60))
def test_spans_of_video_frames_end_where_their_last_frame_does(count: int, stride: int, fps: float) -> None:
    spans = Spans.of(torch.tensor(latent_frame_times(count, stride, fps), dtype=torch.float64), 1)
    expected = torch.tensor([pixel_frames(i + 1, stride) / fps for i in range(count)])
    torch.testing.assert_close(spans.ends, expected, rtol=1e-4, atol=1e-4)


@given(st.integers(1, 12), st.integers(1, 4), st.floats(5, 100), st.integers(0, 50))
def test_spans_of_audio_tokens_wherever_the_chunk_begins(count: int, patch: int, per_s: float, first: int) -> None:
    if count * patch == 1:
        first = 0  # a lone latent says nothing about its length but when it starts the clip
    times = (first * patch + torch.arange(count * patch) + 0.5) / per_s
    spans = Spans.of(times, patch)
    tokens = first + torch.arange(count)
    torch.testing.assert_close(spans.ends, (tokens + 1) * patch / per_s, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(spans.centres, (tokens + 0.5) * patch / per_s, rtol=1e-4, atol=1e-4)


def test_latents_that_do_not_fill_tokens_are_refused() -> None:
    with pytest.raises(ShapeError, match="5 latents along time do not fill tokens of 2"):
        Spans.of(torch.arange(5.0), 2)


@given(st.integers(1, 6), st.integers(1, 8), st.floats(4, 30), st.integers(1, 12), st.floats(2, 60))
def test_causal_masks_never_show_what_ends_later(
    frames: int, stride: int, fps: float, audio: int, per_s: float
) -> None:
    video = Spans.of(torch.tensor(latent_frame_times(frames, stride, fps)), 1)
    sound = Spans.of((torch.arange(audio) + 0.5) / per_s, 1)
    masks = build_masks(CAUSAL, video, sound, cells=2)
    assert masks.audio is not None
    assert masks.video_sees_audio is not None
    assert masks.audio_sees_video is not None
    assert masks.audio.diagonal().all()
    for sees, readers, read, repeat in (
        (masks.video_sees_audio, video, sound, (2, 1)),
        (masks.audio_sees_video, sound, video, (1, 2)),
    ):
        allowed = read.ends[None] <= readers.ends[:, None] + TOLERANCE_S
        shown = sees.mask & ~sees.blind[:, None]
        assert torch.equal(shown, allowed.repeat_interleave(repeat[0], 0).repeat_interleave(repeat[1], 1))


def test_full_needs_no_masks() -> None:
    spans = Spans.of(torch.arange(4.0), 1)
    assert build_masks(FULL, spans, spans, 3) == Masks()
