"""Wan against diffusers on small random models, in both key layouts, and its cached text against the plain path."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn

from vitascope.core.errors import CapabilityError, CheckpointError, ShapeError
from vitascope.core.protocols import CAUSAL, Denoiser, Prepares
from vitascope.core.tracks import VIDEO, TextContext, Track
from vitascope.models.wan.config import WanConfig, to_diffusers
from vitascope.models.wan.keys import diffusers_keys, original_keys
from vitascope.models.wan.model import WanBlock, WanDenoiser
from vitascope.weights.checkpoint import load_into
from vitascope.weights.keys import convert


@dataclass(frozen=True)
class Case:
    """A configuration and a size of latents, clips and words to try it at."""

    config: WanConfig
    latents: tuple[int, int, int]
    num_clips: int = 2
    num_words: int = 7


SMALL = WanConfig(width=48, depth=2, num_heads=4, hidden=80, text_width=20, in_channels=16, frequency_width=32)
CASES = {
    "plain": Case(SMALL, (3, 4, 6)),
    "heads of 128": Case(replace(SMALL, width=256, num_heads=2, depth=1), (2, 6, 4), num_clips=1),
    "one frame": Case(replace(SMALL, out_channels=4, in_channels=4), (1, 10, 6)),
    "deep, long text": Case(replace(SMALL, depth=4, hidden=33), (5, 2, 2), num_words=512),
    "patches in time": Case(replace(SMALL, patch=(2, 1, 2), width=40, num_heads=2), (4, 3, 8)),
    "no cross norm": Case(replace(SMALL, cross_norm=False, eps=1e-5), (2, 8, 8)),
    "image": Case(replace(SMALL, in_channels=36, image_width=24), (3, 4, 6), num_words=512),
    "first and last image": Case(
        replace(SMALL, in_channels=36, image_width=24, image_positions=514), (2, 4, 4), 1, 512
    ),
    "image among the words": Case(replace(SMALL, in_channels=36, image_width=24, image_apart=False), (3, 4, 6)),
    "odd number of sinusoids": Case(replace(SMALL, frequency_width=7), (2, 2, 4)),
    "level a cell": Case(replace(SMALL, noise="cell", in_channels=48, out_channels=48), (2, 4, 6)),
}
each_case = pytest.mark.parametrize("name", CASES)


def their_model(config: WanConfig) -> Any:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=config.patch,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.width // config.num_heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_width,
        freq_dim=config.frequency_width,
        ffn_dim=config.hidden,
        num_layers=config.depth,
        cross_attn_norm=config.cross_norm,
        eps=config.eps,
        image_dim=config.image_width or None,
        added_kv_proj_dim=config.width if config.image_width and config.image_apart else None,
        pos_embed_seq_len=config.image_positions or None,
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def our_model(config: WanConfig, theirs: nn.Module) -> WanDenoiser:
    model = WanDenoiser(config).eval().requires_grad_(False)
    load_into(model, convert(diffusers_keys(config), theirs.state_dict()))
    return model


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(case: Case) -> tuple[Track, TextContext]:
    config, batch = case.config, case.num_clips
    shape = (1, 1, 1) if config.noise == "clip" else (case.latents[0], 1, 1)
    levels = torch.rand((batch, 1, *shape), generator=torch.Generator().manual_seed(1))
    extra = config.condition_channels
    condition = draw(batch, extra, *case.latents, seed=2) if extra else None
    track = Track(draw(batch, config.out_channels, *case.latents), levels, torch.arange(case.latents[0]) / 4, condition)
    image = draw(batch, config.image_positions or 257, config.image_width, seed=3) if config.image_width else None
    words = draw(batch, case.num_words, config.text_width, seed=4)
    return track, TextContext(words, torch.ones(words.shape[:2], dtype=torch.bool), image)


def their_prediction(model: Any, case: Case, track: Track, text: TextContext) -> Tensor:
    values = track.values if track.condition is None else torch.cat([track.values, track.condition], 1)
    timestep = 1000.0 * track.noise.flatten(1)
    if case.config.noise == "clip":
        timestep = timestep[:, 0]
    else:
        pt, ph, pw = case.config.patch
        per_frame = values.shape[3] // ph * (values.shape[4] // pw)
        assert pt == 1
        timestep = timestep.repeat_interleave(per_frame, 1)
    # their position table for two images takes these one after the other along the batch
    image = text.image if text.image is None or not case.config.image_positions else text.image.reshape(2, 257, -1)
    return model(values, timestep, text.embeddings, image, return_dict=False)[0]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@each_case
def test_the_forward_pass_equals_that_of_diffusers(name: str) -> None:
    case = CASES[name]
    theirs = their_model(case.config)
    ours: Denoiser = our_model(case.config, theirs)
    track, text = inputs(case)
    expected = their_prediction(theirs, case, track, text)
    out = ours({"video": track}, text)["video"]
    assert out.shape == expected.shape == track.values.shape
    assert expected.std() > 0.05
    # both sum in fp32 in another order
    assert relative_error(out, expected) < 1e-5


@each_case
def test_a_text_prepared_once_gives_the_same(name: str) -> None:
    case = CASES[name]
    model = our_model(case.config, their_model(case.config))
    assert isinstance(model, Prepares)
    track, text = inputs(case)
    prepared = model.prepare(text)
    # nothing but what was prepared is read: the words may go
    bare = replace(prepared, embeddings=torch.zeros_like(text.embeddings), image=None)
    assert torch.equal(model({"video": track}, bare)["video"], model({"video": track}, text)["video"])


@each_case
@pytest.mark.parametrize("layout", [diffusers_keys, original_keys])
def test_both_layouts_are_read_and_written_key_by_key(name: str, layout: Any) -> None:
    config = CASES[name].config
    ours = WanDenoiser(config).state_dict()
    theirs = convert(layout(config), ours, writing=True)
    back = convert(layout(config), theirs)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], ours[key]) for key in ours)
    expected = {key for key in their_model(config).state_dict() if "norm_added_q" not in key}
    if layout is diffusers_keys:
        assert theirs.keys() == expected
    first = sorted(theirs)[0]
    with pytest.raises(CheckpointError, match=r"1 unknown \(surplus\)"):
        convert(layout(config), {**theirs, "surplus": theirs[first]})


FULL = {
    "1.3B": WanConfig(width=1536, depth=30, num_heads=12, hidden=8960),
    "14B": WanConfig(),
    "14B image": WanConfig(in_channels=36, image_width=1280),
}


@pytest.mark.parametrize("name", FULL)
def test_full_size_tables_on_the_meta_device(name: str) -> None:
    config = FULL[name]
    with torch.device("meta"):
        theirs, ours = their_meta(config), WanDenoiser(config)
    given = {key: value for key, value in theirs.state_dict().items() if "norm_added_q" not in key}
    mine = ours.state_dict()
    read = convert(diffusers_keys(config), given)
    assert {key: value.shape for key, value in read.items()} == {key: value.shape for key, value in mine.items()}
    written = convert(diffusers_keys(config), mine, writing=True)
    assert {key: value.shape for key, value in written.items()} == {key: value.shape for key, value in given.items()}
    original = convert(original_keys(config), mine, writing=True)
    again = convert(original_keys(config), original)
    assert {key: value.shape for key, value in again.items()} == {key: value.shape for key, value in mine.items()}
    assert sum(value.numel() for value in mine.values()) == sum(value.numel() for value in given.values())


def their_meta(config: WanConfig) -> nn.Module:
    return WanTransformer3DModel(
        num_attention_heads=config.num_heads, in_channels=config.in_channels, out_channels=16,
        ffn_dim=config.hidden, num_layers=config.depth, image_dim=config.image_width or None,
        added_kv_proj_dim=config.width if config.image_width and config.image_apart else None,
    )  # fmt: skip


def test_gradients_reach_every_weight_with_and_without_checkpointing() -> None:
    case = CASES["image"]
    track, text = inputs(case)
    grads = []
    for saving in (False, True):
        torch.manual_seed(0)
        model = WanDenoiser(case.config, gradient_checkpointing=saving)
        nn.init.normal_(model.head.weight)
        for block in model.blocks:
            assert isinstance(block, WanBlock)
            nn.init.normal_(block.cross.out.weight)
        (model({"video": track}, text)["video"] * draw(*track.values.shape, seed=5)).sum().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None, name
        assert grad.any(), name
        torch.testing.assert_close(grads[1][name], grad)


def test_what_the_model_cannot_take_is_refused() -> None:
    case = CASES["image"]
    model = WanDenoiser(case.config)
    track, text = inputs(case)
    with pytest.raises(CapabilityError, match="reads 20 channels beside the latents, got 0"):
        model({"video": replace(track, condition=None)}, text)
    with pytest.raises(CapabilityError, match="has the strategies full, not causal"):
        model({"video": track}, text, strategy=CAUSAL)
    with pytest.raises(CapabilityError, match="got video, audio"):
        model({"video": track, "audio": track}, text)
    odd = Track(track.values[..., :5], track.noise, track.times_s, draw(2, 20, 3, 4, 5))
    with pytest.raises(ShapeError, match="nearest: 4, 6"):
        model({"video": odd}, text)


def test_a_model_in_16_bits_takes_what_it_is_given_in_32() -> None:
    case = next(case for case in CASES.values() if case.config.image_width)
    model = our_model(case.config, their_model(case.config)).to(torch.bfloat16)
    track, text = inputs(case)
    assert text.image is not None
    assert text.image.dtype == torch.float32
    with torch.no_grad():
        assert model({VIDEO: track}, text)[VIDEO].isfinite().all()


@pytest.mark.parametrize("frames", [1, 2])
def test_levels_may_be_given_once_for_all_frames(frames: int) -> None:
    config = WanConfig(12, 1, 1, 16, text_width=8, in_channels=4, out_channels=4, frequency_width=8, noise="cell")
    torch.manual_seed(0)
    model = WanDenoiser(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    text = TextContext(draw(1, 3, 8), torch.ones(1, 3, dtype=torch.bool))
    values, levels = draw(1, 4, frames, 4, 6), torch.rand(1, 1, 1, 4, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        once, each = (
            model({VIDEO: Track(values, noise, torch.arange(frames) / 8)}, text)[VIDEO]
            for noise in (levels, levels.expand(-1, -1, frames, -1, -1))
        )
    assert torch.equal(once, each)


def test_masked_words_are_not_read() -> None:
    case = CASES["plain"]
    reads_all = our_model(case.config, their_model(case.config))
    model = WanDenoiser(replace(case.config, masked_text=True)).eval().requires_grad_(False)
    model.load_state_dict(reads_all.state_dict())
    track, text = inputs(case)
    padded = replace(text, mask=torch.arange(case.num_words) < torch.tensor([[4], [4]]))
    alone = TextContext(text.embeddings[:, :4], padded.mask[:, :4])
    expected = reads_all({"video": track}, alone)["video"]
    # fp32 sums in another order
    assert relative_error(model({"video": track}, padded)["video"], expected) < 1e-5
    assert relative_error(model({"video": track}, model.prepare(padded))["video"], expected) < 1e-5
    assert relative_error(reads_all({"video": track}, padded)["video"], expected) > 1e-3
    with pytest.raises(CheckpointError, match="masked texts cannot be written"):
        to_diffusers(model.config)
