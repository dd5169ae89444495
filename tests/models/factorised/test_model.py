"""The factorised denoiser: shapes, its start, what conditions it, and every variant of its parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vitascope.core.errors import CapabilityError, InputError, ShapeError
from vitascope.core.protocols import CAUSAL, Denoiser, TemporalStrategy
from vitascope.core.shapes import latent_frame_times
from vitascope.core.tracks import TextContext, Track
from vitascope.diffusion.guidance import Perturbation, disable
from vitascope.models.factorised.config import FactorisedConfig
from vitascope.models.factorised.model import FactorisedDenoiser
from vitascope.models.factorised.presets import PRESETS
from vitascope.nn.patches import token_levels

TINY = FactorisedConfig(
    width=32,
    depth=2,
    num_heads=2,
    audio_width=16,
    audio_heads=2,
    text_width=12,
    video_channels=4,
    audio_channels=6,
    patch=(1, 2, 2),
    audio_patch=2,
    base_grid=(2, 2),
)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "multi_query": {"attention": "multi_query"},
    "rotary": {"positions": "rotary"},
    "geglu": {"feed_forward": "geglu"},
    "shared": {"modulation": "shared"},
    "no exchange": {"exchange_layers": ()},
    "first exchange": {"exchange_layers": (0,)},
    "no camera": {"camera": False},
    "classes": {"num_classes": 3},
    "patches in time": {"patch": (2, 2, 1)},
    "local": {"local_channels": (8, 12)},
    "all": {"attention": "multi_query", "positions": "rotary", "feed_forward": "geglu", "modulation": "shared"},
}
each_variant = pytest.mark.parametrize("name", VARIANTS)


def make(fill: bool = True, **changes: Any) -> FactorisedDenoiser:
    """A tiny denoiser; `fill` gives random weights to what starts at zero too."""
    torch.manual_seed(0)
    model = FactorisedDenoiser(replace(TINY, **changes))
    for parameter in model.parameters() if fill else ():
        nn.init.normal_(parameter, std=0.2)
    return model


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_tracks(frames: int = 4, rows: int = 4, columns: int = 6, audio: int = 14) -> dict[str, Track]:
    times = torch.tensor(latent_frame_times(frames, 4, 12.0))
    return {
        "video": Track(draw(2, 4, frames, rows, columns), torch.rand(2, 1, frames, 1, 1), times),
        "audio": Track(draw(2, 6, audio, seed=1), torch.rand(2, 1, audio), (torch.arange(audio) + 0.5) / 10),
    }


def make_text(num_words: int = 5, batch: int = 2) -> TextContext:
    return TextContext(draw(batch, num_words, 12, seed=2), torch.ones(batch, num_words, dtype=torch.bool))


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        # the same sums in another order: a few roundings of float32 through two layers
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(not torch.allclose(a[name], b[name], atol=1e-3) for name in a)


@settings(max_examples=8)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 5), st.integers(1, 9))
def test_predictions_have_the_shapes_of_the_tracks_on_any_grid(
    frames: int, rows: int, columns: int, tokens: int
) -> None:
    model: Denoiser = make()
    tracks = make_tracks(frames, 2 * rows, 2 * columns, 2 * tokens)
    for strategy in (TemporalStrategy(), CAUSAL, TemporalStrategy("window", 2, 3)):
        out = model(tracks, make_text(), strategy=strategy)
        assert {name: value.shape for name, value in out.items()} == {n: t.values.shape for n, t in tracks.items()}
        assert all(value.isfinite().all() for value in out.values())


@each_variant
def test_every_variant_starts_at_zero_and_trains_all_its_weights(name: str) -> None:
    tracks, text = make_tracks(), make_text()
    camera = None
    if VARIANTS[name].get("camera", True):
        camera = draw(2, 4, 7, seed=3)
        camera[0, 1] = float("nan")
    start = make(fill=False, **VARIANTS[name])
    assert not any(value.any() for value in start(tracks, text, camera).values())
    model = make(**VARIANTS[name])
    if VARIANTS[name].get("num_classes"):
        labels = model.label_context(torch.tensor([-1, 2]))  # before the words: a lone token needs no queries
        text = TextContext(torch.cat([labels.embeddings, text.embeddings], 1), torch.cat([labels.mask, text.mask], 1))
    out = model(tracks, text, camera)
    weights = {track: draw(*value.shape, seed=4) for track, value in out.items()}
    torch.stack([(out[track] * weights[track]).sum() for track in out]).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


def test_a_zero_head_stays_zero_whatever_the_inputs_are() -> None:
    """AdaLN-Zero also leaves the tokens as they are: with a head, the output is that of the embedding alone."""
    model = make(fill=False)
    assert model.video is not None
    nn.init.normal_(model.video.head.weight)
    tracks = make_tracks()
    out = model(tracks, make_text())["video"]
    louder = {"video": tracks["video"], "audio": tracks["audio"].with_values(100 * tracks["audio"].values)}
    assert torch.equal(model(louder, make_text(3))["video"], out)
    assert out.std() > 0.1


def test_one_track_alone_and_models_of_one_track() -> None:
    model, tracks, text = make(), make_tracks(), make_text()
    for name in ("video", "audio"):
        alone = model({name: tracks[name]}, text)
        assert set(alone) == {name}
        assert not torch.allclose(alone[name], model(tracks, text)[name], atol=1e-3)
    pictures, sounds = make(audio_channels=0), make(video_channels=0)
    assert pictures.capabilities.tracks == ("video",)
    assert sounds.capabilities.tracks == ("audio",)
    assert not sounds.capabilities.camera
    assert not pictures.config.exchanges
    assert pictures({"video": tracks["video"]}, text)["video"].shape == tracks["video"].values.shape
    assert sounds({"audio": tracks["audio"]}, text, strategy=CAUSAL)["audio"].shape == tracks["audio"].values.shape


def test_tracks_hear_each_other_only_in_the_exchanges() -> None:
    tracks, text = make_tracks(), make_text()
    other = {name: track.with_values(track.values.flip(0)) for name, track in tracks.items()}
    for layers, heard in (((), False), ((1,), True), (None, True)):
        model = make(exchange_layers=layers)
        mixed = model({"video": tracks["video"], "audio": other["audio"]}, text)["video"]
        assert torch.equal(mixed, model(tracks, text)["video"]) != heard


def test_levels_may_be_given_per_clip_frame_or_cell() -> None:
    model, text = make(), make_text()
    tracks = make_tracks()
    per_clip = torch.tensor([0.3, 0.8])
    outs = []
    for video, audio in (((1, 1, 1), (1,)), ((4, 1, 1), (14,)), ((4, 4, 6), (14,)), ((1, 4, 6), (1,))):
        levels = {
            "video": per_clip.view(2, 1, 1, 1, 1).expand(2, 1, *video),
            "audio": per_clip.view(2, 1, 1).expand(2, 1, *audio),
        }
        outs.append(model({name: t.with_values(t.values, levels[name]) for name, t in tracks.items()}, text))
    for out in outs[1:]:
        assert_same(out, outs[0])


def test_the_level_of_a_known_cell_reaches_its_own_token() -> None:
    """Without layers between (gates at zero) only the token of the cell whose level changed is modulated anew."""
    model = make(fill=False)
    assert model.video is not None
    for parameter in model.video.parameters():
        nn.init.normal_(parameter, std=0.2)
    track = make_tracks()["video"]
    levels = torch.ones(2, 1, 4, 4, 6)
    known = levels.clone()
    known[0, :, 2, 2:4, 4:] = 0.0  # the token in row 1, column 2 of frame 2
    before, after = (
        model({"video": track.with_values(track.values, x)}, make_text())["video"] for x in (levels, known)
    )
    changed = (before - after).abs().amax(1) > 1e-5
    assert changed[0, 2, 2:4, 4:].all()
    assert changed.sum() == 4


@given(st.tuples(*[st.integers(1, 2)] * 3), st.booleans(), st.booleans())
def test_token_levels_are_means_over_the_patch(patch: tuple[int, int, int], per_frame: bool, per_cell: bool) -> None:
    frames, rows, columns = 4, 2, 6
    shape = (2, 1, frames if per_frame else 1, rows if per_cell else 1, columns if per_cell else 1)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    track = Track(torch.zeros(2, 3, frames, rows, columns), noise, torch.arange(float(frames)))
    (pt, ph, pw), levels = patch, token_levels(track, patch)
    assert levels.shape == (2, frames // pt if per_frame else 1, rows * columns // (ph * pw) if per_cell else 1)
    full = nn.functional.avg_pool3d(noise.expand(2, 1, frames, rows, columns), patch)[:, 0].flatten(2)
    torch.testing.assert_close(levels.expand_as(full), full)


def test_levels_of_another_number_of_frames_are_refused() -> None:
    track = make_tracks()["video"]
    with pytest.raises(ShapeError, match="levels of 3 frames do not fit a track of 4"):
        make()({"video": track.with_values(track.values, torch.ones(2, 1, 3, 1, 1))}, make_text())


def test_padding_of_the_text_has_no_effect() -> None:
    model, tracks, text = make(), make_tracks(), make_text(5)
    garbage = torch.cat([text.embeddings, 1e3 * draw(2, 3, 12, seed=5)], 1)
    padded = TextContext(garbage, torch.cat([text.mask, torch.zeros(2, 3, dtype=torch.bool)], 1))
    assert_same(model(tracks, padded), model(tracks, text))
    assert differ(model(tracks, make_text(4)), model(tracks, text))


def test_clips_of_a_batch_do_not_see_each_other() -> None:
    model, tracks, text = make(), make_tracks(), make_text()
    camera = draw(2, 4, 7, seed=3)
    whole = model(tracks, text, camera)
    for row in range(2):
        one = {n: Track(t.values[row : row + 1], t.noise[row : row + 1], t.times_s) for n, t in tracks.items()}
        words = TextContext(text.embeddings[row : row + 1], text.mask[row : row + 1])
        alone = model(one, words, camera[row : row + 1])
        assert_same(alone, {name: value[row : row + 1] for name, value in whole.items()})


def test_a_camera_of_nan_equals_none_and_a_camera_matters() -> None:
    model, tracks, text = make(), make_tracks(), make_text()
    camera = draw(2, 4, 7, seed=3)
    none, given = model(tracks, text), model(tracks, text, camera)
    assert_same(model(tracks, text, torch.full((2, 4, 7), float("nan"))), none)
    assert differ(given, none)
    camera[0] = float("nan")
    mixed = model(tracks, text, camera)
    assert_same({n: v[:1] for n, v in mixed.items()}, {n: v[:1] for n, v in none.items()})
    assert_same({n: v[1:] for n, v in mixed.items()}, {n: v[1:] for n, v in given.items()})


def test_labels_stand_in_for_text() -> None:
    model, tracks = make(num_classes=3), make_tracks()
    outs = [model(tracks, model.label_context(torch.tensor([label, label]))) for label in (-1, 0, 2)]
    assert differ(outs[0], outs[1])
    assert differ(outs[1], outs[2])
    with pytest.raises(CapabilityError, match="no class labels"):
        make().label_context(torch.tensor([0]))


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_rotary_positions_know_the_places_without_the_table(positions: str) -> None:
    model = make(positions=positions)
    assert model.places is not None
    nn.init.zeros_(model.places.grid)
    track = make_tracks()["video"]
    flipped = track.with_values(track.values.unflatten(3, (2, 2)).flip(3).flatten(3, 4))  # rows of tokens swapped
    back = model({"video": flipped}, make_text())["video"].unflatten(3, (2, 2)).flip(3).flatten(3, 4)
    same = torch.allclose(back, model({"video": track}, make_text())["video"], rtol=1e-3, atol=1e-4)
    assert same == (positions == "learned")


@pytest.mark.parametrize("strategy", [TemporalStrategy(), CAUSAL], ids=["full", "causal"])
def test_gradient_checkpointing_changes_no_gradient(strategy: TemporalStrategy) -> None:
    tracks, text = make_tracks(), make_text()
    gradients = []
    for checkpointing in (False, True):
        model = make()
        model.gradient_checkpointing = checkpointing
        out = model(tracks, text, strategy=strategy)
        torch.stack([value.square().mean() for value in out.values()]).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        if gradient is None:  # the camera's, which was not given
            assert gradients[1][name] is None
        else:
            assert torch.equal(gradient, gradients[1][name]), name


def test_autocast_gives_the_dtype_of_the_values() -> None:
    model, tracks, text = make().requires_grad_(False), make_tracks(), make_text()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tracks, text)
    plain = model(tracks, text)
    for name, value in out.items():
        assert value.dtype == torch.float32
        # bf16 products have 8 bits; through two layers of random weights a few per cent of the spread
        assert (value - plain[name]).std() < 0.05 * plain[name].std()


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("pocket", 5e6, 20e6),
        ("small", 30e6, 120e6),
        ("medium", 120e6, 400e6),
        ("large", 400e6, 1.2e9),
        ("xl", 1e9, 3e9),
        ("10b", 8e9, 12e9),
    ],
)
def test_presets_build_and_are_as_large_as_they_say(name: str, least: float, most: float) -> None:
    with torch.device("meta"):
        model = FactorisedDenoiser(PRESETS[name])
    assert least < sum(parameter.numel() for parameter in model.parameters()) < most


def test_all_presets_are_looked_at() -> None:
    assert set(PRESETS) == {"pocket", "small", "medium", "large", "xl", "10b"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video_channels": 0, "audio_channels": 0}, "a video track, an audio track or both"),
        ({"depth": 0}, "must be positive"),
        ({"patch": (1, 0, 2)}, "must be positive"),
        ({"feed_forward": "reglu"}, "valid values: gelu, geglu, swiglu"),
        ({"attention": "linear"}, "valid values: multi_head, multi_query"),
        ({"positions": "none"}, "valid values: learned, rotary"),
        ({"modulation": "film"}, "valid values: own, shared"),
        ({"prediction": "score"}, "valid values: velocity, v, noise, x0"),
        ({"strategies": ("full", "sparse")}, "valid values: full, causal, window"),
        ({"width": 36, "positions": "rotary"}, "multiple of 4"),
        ({"exchange_layers": (2,)}, r"0\.\.1"),
        ({"exchange_layers": (0,), "audio_channels": 0}, "both tracks"),
    ],
)
def test_configurations_that_contradict_themselves_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(TINY, **changes)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ShapeError, match="between 3 heads"):
        make(num_heads=3)


def test_what_the_model_cannot_do_is_refused_by_name() -> None:
    tracks, text = make_tracks(), make_text()
    with pytest.raises(CapabilityError, match="tracks video; got video, audio"):
        make(audio_channels=0)(tracks, text)
    with pytest.raises(CapabilityError, match="got none"):
        make()({}, text)
    with pytest.raises(CapabilityError, match="strategies full, not causal"):
        make(strategies=("full",))(tracks, text, strategy=CAUSAL)
    with pytest.raises(CapabilityError, match="no camera path"):
        make(camera=False)(tracks, text, draw(2, 4, 7))
    with pytest.raises(ShapeError, match=r"video latents \(4, 5, 6\).*nearest: 4, 6"):
        make()(make_tracks(rows=5), text)
    with pytest.raises(ShapeError, match=r"audio latents \(13,\).*nearest: 12, 14"):
        make()(make_tracks(audio=13), text)


def test_compiled_regions_give_what_the_plain_model_gives() -> None:
    """What training and the benchmarks run: every region compiled, whole graphs only, in bf16.

    In fp32 the compiler of PyTorch 2.13 fails on this very shape: it replaces an attention by one of other sizes
    (pattern 28 of its fuse_attention).
    """
    plain, compiled = (make(depth=1, local_channels=(8, 12), local_blocks=(1, 2)) for _ in range(2))
    for region in compiled.regions:
        region.compile(dynamic=False, fullgraph=True)
    tracks, text = make_tracks(), make_text()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, out = plain(tracks, text), compiled(tracks, text)
    for name, value in expected.items():
        error = (out[name].float() - value.float()).norm() / value.float().norm()
        # fused operations round less often than those one by one, by about 2^-8 each time
        assert error < 3e-2, name


@each_variant
def test_disabled_layers_leave_every_token_to_itself(name: str) -> None:
    """With no exchange and no local path a change of one cell stays in its token; `block` is a model without it."""
    changes: dict[str, Any] = {**VARIANTS[name], "exchange_layers": (), "local_channels": ()}
    model = make(**changes)
    tracks, text = make_tracks(), make_text()
    text = model.label_context(torch.tensor([0, 1])) if name == "classes" else text
    video, audio = tracks["video"].values.clone(), tracks["audio"].values.clone()
    video[:, :, 2:, 2:, 2:], audio[:, :, 6:] = 0.0, 0.0
    changed = {"video": tracks["video"].with_values(video), "audio": tracks["audio"].with_values(audio)}

    def run(given: dict[str, Track], how: Perturbation, layers: tuple[int, ...]) -> dict[str, Tensor]:
        state, passage = model.enter(given, text)
        passage = disable(passage, layers, how)
        for layer in passage.layers:
            state = layer(state)
        return passage.finish(state)

    before, after = (run(given, "attention", (0, 1)) for given in (tracks, changed))
    assert torch.equal(before["video"][:, :, :2], after["video"][:, :, :2])
    assert torch.equal(before["video"][:, :, :, :2], after["video"][:, :, :, :2])
    assert torch.equal(before["audio"][:, :, :6], after["audio"][:, :, :6])
    assert not torch.equal(before["video"][:, :, 2:, 2:, 2:], after["video"][:, :, 2:, 2:, 2:])
    plain = model(tracks, text)
    assert differ(before, plain)
    without = run(tracks, "block", (0,))
    model.layers = model.layers[1:]
    assert_same(without, model(tracks, text))
