"""LTX-Video against diffusers on small random models, in both key layouts; its prepared text against the plain path."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ltx_transformer_checkpoint_to_diffusers
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from torch import Tensor, nn

from vitascope.core.errors import CapabilityError, CheckpointError, InputError
from vitascope.core.protocols import CAUSAL, Denoiser, Prepares
from vitascope.core.tracks import TextContext, Track
from vitascope.models.ltx.config import LTXConfig
from vitascope.models.ltx.keys import diffusers_keys, original_keys
from vitascope.models.ltx.model import LTXBlock, LTXDenoiser
from vitascope.weights.checkpoint import load_into
from vitascope.weights.keys import convert


@dataclass(frozen=True)
class Case:
    """A configuration, a size of latents, levels per "clip", "frame" or "cell", and how many words are real."""

    config: LTXConfig
    latents: tuple[int, int, int]
    levels: str = "clip"
    num_words: tuple[int, int] = (5, 5)
    fps: float = 24.0


SMALL = LTXConfig(width=48, depth=2, num_heads=4, in_channels=8, out_channels=8, text_width=20)
CASES = {
    "plain": Case(SMALL, (3, 2, 3)),
    "one frame": Case(replace(SMALL, depth=1), (1, 4, 5)),
    "level a frame": Case(SMALL, (4, 2, 2), "frame"),
    "level a cell, masked words": Case(SMALL, (2, 3, 4), "cell", (7, 2)),
    "width that six does not divide": Case(replace(SMALL, width=64), (2, 5, 3), num_words=(1, 9)),
    "one frequency": Case(replace(SMALL, width=8, num_heads=2), (2, 3, 3)),
    "heads of 64, other rate": Case(replace(SMALL, width=128, num_heads=2, depth=3), (5, 2, 2), fps=30.0),
}
each_case = pytest.mark.parametrize("name", CASES)


def their_model(config: LTXConfig) -> Any:
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.width // config.num_heads,
        cross_attention_dim=config.width,
        num_layers=config.depth,
        caption_channels=config.text_width,
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def our_model(config: LTXConfig, theirs: nn.Module) -> LTXDenoiser:
    model = LTXDenoiser(config).eval().requires_grad_(False)
    load_into(model, convert(diffusers_keys(LTXConfig()), theirs.state_dict()))
    return model


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(case: Case) -> tuple[Track, TextContext]:
    frames, rows, columns = case.latents
    grid = {"clip": (1, 1, 1), "frame": (frames, 1, 1), "cell": case.latents}[case.levels]
    levels = torch.rand((2, 1, *grid), generator=torch.Generator().manual_seed(1))
    words = draw(2, max(case.num_words), case.config.text_width, seed=4)
    mask = torch.arange(words.shape[1]) < torch.tensor(case.num_words)[:, None]
    values = draw(2, case.config.in_channels, frames, rows, columns)
    return Track(values, levels, torch.arange(frames) * 8 / case.fps), TextContext(words, mask)


def their_prediction(model: Any, case: Case, track: Track, text: TextContext) -> Tensor:
    levels = track.noise.expand(2, 1, *case.latents) if case.levels != "clip" else track.noise
    out = model(
        track.values.flatten(2).transpose(1, 2),
        text.embeddings,
        1000.0 * levels.flatten(1),
        text.mask.float(),
        *case.latents,
        rope_interpolation_scale=(8 / case.fps, 32, 32),
        return_dict=False,
    )[0]
    return out.transpose(1, 2).unflatten(2, case.latents)


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
    assert float((out - expected).norm() / expected.norm()) < 1e-5


def test_positions_given_as_coordinates_equal_theirs() -> None:
    """Starts of frames as the conditioned pipeline counts them: the first latent frame is one frame long."""
    case = CASES["plain"]
    theirs, (track, text) = their_model(case.config), inputs(case)
    starts = (torch.arange(3) * 8 - 7).clamp_min(0) / 24.0
    axes = [starts, torch.arange(2) * 32.0, torch.arange(3) * 32.0]
    coords = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1).expand(2, 3, -1)
    expected = theirs(
        track.values.flatten(2).transpose(1, 2), text.embeddings, 1000.0 * track.noise.flatten(1), text.mask.float(),
        *case.latents, video_coords=coords, return_dict=False,
    )[0].transpose(1, 2).unflatten(2, case.latents)  # fmt: skip
    out = our_model(case.config, theirs)({"video": replace(track, times_s=starts)}, text)["video"]
    assert float((out - expected).norm() / expected.norm()) < 1e-5


@each_case
def test_a_text_prepared_once_gives_the_same(name: str) -> None:
    case = CASES[name]
    model = our_model(case.config, their_model(case.config))
    assert isinstance(model, Prepares)
    track, text = inputs(case)
    bare = replace(model.prepare(text), embeddings=torch.zeros_like(text.embeddings))
    assert torch.equal(model({"video": track}, bare)["video"], model({"video": track}, text)["video"])


@each_case
def test_both_layouts_are_read_and_written_key_by_key(name: str) -> None:
    config = CASES[name].config
    ours = LTXDenoiser(config).state_dict()
    expected = their_model(config).state_dict()
    for table in (diffusers_keys(LTXConfig()), original_keys(LTXConfig())):
        theirs = convert(table, ours, writing=True)
        back = convert(table, theirs)
        assert back.keys() == ours.keys()
        assert all(torch.equal(back[key], ours[key]) for key in ours)
        # diffusers' own reading of the authors' names leaves its own as they are
        read = convert_ltx_transformer_checkpoint_to_diffusers(dict(theirs))
        assert {key: value.shape for key, value in read.items()} == {k: v.shape for k, v in expected.items()}
        with pytest.raises(CheckpointError, match="1 missing"):
            convert(table, {key: value for key, value in theirs.items() if "0.attn1.to_k.bias" not in key})


@pytest.mark.parametrize("config", [LTXConfig(), LTXConfig(width=4096, depth=48)], ids=["2B", "13B"])
def test_full_size_tables_on_the_meta_device(config: LTXConfig) -> None:
    each = config.width // config.num_heads
    with torch.device("meta"):
        ours = LTXDenoiser(config).state_dict()
        theirs = LTXVideoTransformer3DModel(
            attention_head_dim=each, cross_attention_dim=config.width, num_layers=config.depth
        ).state_dict()
    written = convert(diffusers_keys(LTXConfig()), ours, writing=True)
    assert {key: value.shape for key, value in written.items()} == {key: value.shape for key, value in theirs.items()}
    assert {key: v.shape for key, v in convert(diffusers_keys(LTXConfig()), theirs).items()} == {
        k: v.shape for k, v in ours.items()
    }


def test_gradients_reach_every_weight_with_and_without_checkpointing() -> None:
    case = CASES["level a cell, masked words"]
    track, text = inputs(case)
    grads = []
    for saving in (False, True):
        torch.manual_seed(0)
        model = LTXDenoiser(case.config, gradient_checkpointing=saving)
        for block in model.blocks:
            assert isinstance(block, LTXBlock)
            nn.init.normal_(block.cross.out.weight)
        (model({"video": track}, text)["video"] * draw(*track.values.shape, seed=5)).sum().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None, name
        assert grad.any(), name
        torch.testing.assert_close(grads[1][name], grad)


def test_what_the_model_cannot_take_is_refused() -> None:
    model, (track, text) = LTXDenoiser(SMALL), inputs(CASES["plain"])
    with pytest.raises(CapabilityError, match="has the strategies full, not causal"):
        model({"video": track}, text, strategy=CAUSAL)
    with pytest.raises(CapabilityError, match="got none"):
        model({}, text)
    with pytest.raises(InputError, match="at least 6"):
        replace(SMALL, width=4, num_heads=1)
