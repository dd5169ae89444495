"""Mochi against diffusers on small random models, in both key layouts; its asymmetric attention; its prepared text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_mochi_transformer_checkpoint_to_diffusers
from diffusers.models.transformers.transformer_mochi import MochiTransformer3DModel
from torch import Tensor, nn

from vitascope.core.errors import CapabilityError, InputError, ShapeError
from vitascope.core.protocols import CAUSAL, Denoiser, Prepares
from vitascope.core.tracks import TextContext, Track
from vitascope.models.mochi.config import MochiConfig
from vitascope.models.mochi.keys import diffusers_keys, original_keys
from vitascope.models.mochi.model import MochiBlock, MochiDenoiser
from vitascope.weights.checkpoint import load_into
from vitascope.weights.keys import convert


@dataclass(frozen=True)
class Case:
    """A configuration, a size of latents and how many words of each clip are real."""

    config: MochiConfig
    latents: tuple[int, int, int]
    num_words: tuple[int, ...] = (5, 5)


SMALL = MochiConfig(
    width=48, stream_width=24, depth=3, num_heads=4, video_channels=4, text_width=16, frequency_width=32, pool_heads=8
)
CASES = {
    "plain": Case(SMALL, (2, 4, 6)),
    "one frame, one clip": Case(SMALL, (1, 2, 8), (3,)),
    "masked words": Case(SMALL, (3, 4, 4), (2, 7)),
    "odd number of sinusoids": Case(replace(SMALL, frequency_width=9), (2, 2, 4)),
    "one block": Case(replace(SMALL, depth=1), (2, 6, 2), (4, 1)),
    "heads of 128": Case(replace(SMALL, width=256, num_heads=2, depth=2), (2, 4, 4)),
    "patches of 4, wide text": Case(replace(SMALL, patch=4, stream_width=60), (4, 8, 4), (9, 9)),
}
each_case = pytest.mark.parametrize("name", CASES)


def their_model(config: MochiConfig) -> Any:
    torch.manual_seed(0)
    model = MochiTransformer3DModel(
        patch_size=config.patch,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.width // config.num_heads,
        num_layers=config.depth,
        pooled_projection_dim=config.stream_width,
        in_channels=config.video_channels,
        text_embed_dim=config.text_width,
        time_embed_dim=config.frequency_width,
    )
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.02 if "pos_freq" in name else 0.1)
    return model.eval().requires_grad_(False)


def our_model(config: MochiConfig, theirs: nn.Module) -> MochiDenoiser:
    model = MochiDenoiser(config).eval().requires_grad_(False)
    load_into(model, convert(diffusers_keys(config), theirs.state_dict()))
    return model


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(case: Case) -> tuple[Track, TextContext]:
    batch = len(case.num_words)
    levels = torch.rand((batch, 1, 1, 1, 1), generator=torch.Generator().manual_seed(1))
    words = draw(batch, max(case.num_words), case.config.text_width, seed=4)
    mask = torch.arange(words.shape[1]) < torch.tensor(case.num_words)[:, None]
    values = draw(batch, case.config.video_channels, *case.latents)
    return Track(values, levels, torch.arange(case.latents[0]) / 4), TextContext(words, mask)


def differ(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # theirs asks for fp32 by autocast
@each_case
def test_the_forward_pass_equals_that_of_diffusers(name: str) -> None:
    case = CASES[name]
    theirs = their_model(case.config)
    ours: Denoiser = our_model(case.config, theirs)
    track, text = inputs(case)
    timestep = 1000.0 * (1.0 - track.noise.flatten())
    expected = -theirs(track.values, text.embeddings, timestep, text.mask, return_dict=False)[0]
    out = ours({"video": track}, text)["video"]
    assert out.shape == expected.shape == track.values.shape
    assert expected.std() > 0.05
    # both sum in fp32 in another order
    assert differ(out, expected) < 1e-5


@each_case
@pytest.mark.parametrize("text_sees", ["all", "text"])
def test_a_text_prepared_once_gives_the_same(name: str, text_sees: Any) -> None:
    case = CASES[name]
    model = our_model(replace(case.config, text_sees=text_sees), their_model(case.config))
    assert isinstance(model, Prepares)
    track, text = inputs(case)
    bare = replace(model.prepare(text), embeddings=torch.zeros_like(text.embeddings))
    assert torch.equal(model({"video": track}, bare)["video"], model({"video": track}, text)["video"])


def test_text_that_sees_text_alone_is_the_joint_attention_with_a_mask() -> None:
    """Each text query of the joint path restricted to words, and a text condition without the level, is the same."""
    case = CASES["masked words"]
    theirs = their_model(case.config)
    joint, apart = (our_model(replace(case.config, text_sees=sees), theirs) for sees in ("all", "text"))
    track, text = inputs(case)
    assert differ(apart({"video": track}, text)["video"], joint({"video": track}, text)["video"]) > 1e-3
    prepared = apart.prepare(text)
    pooled, y = joint.prepare(text).prepared
    num_words = text.mask.shape[1]
    for index, block in enumerate(apart.blocks):
        assert isinstance(block, MochiBlock)
        vectors = block.text.vectors(pooled)
        q, k, v = block.text.project(y, vectors)
        torch.testing.assert_close(k, prepared.prepared[1 + 2 * index])
        if index < case.config.depth - 1:
            seen = text.mask[:, None, None].expand(-1, 1, num_words, -1)
            read = nn.functional.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen
            )
            y = block.text.finish(y, read.transpose(1, 2).flatten(-2), vectors)


@each_case
def test_both_layouts_are_read_and_written_key_by_key(name: str) -> None:
    config = CASES[name].config
    ours, expected = MochiDenoiser(config).state_dict(), their_model(config).state_dict()
    for layout in (diffusers_keys, original_keys):
        theirs = convert(layout(config), ours, writing=True)
        back = convert(layout(config), theirs)
        assert back.keys() == ours.keys()
        assert all(torch.equal(back[key], ours[key]) for key in ours)
        if layout is diffusers_keys:
            assert {key: v.shape for key, v in theirs.items()} == {key: v.shape for key, v in expected.items()}


def test_full_size_tables_on_the_meta_device() -> None:
    config = MochiConfig()
    with torch.device("meta"):
        ours, theirs = MochiDenoiser(config).state_dict(), MochiTransformer3DModel().state_dict()
    written = convert(diffusers_keys(config), ours, writing=True)
    assert {key: value.shape for key, value in written.items()} == {key: value.shape for key, value in theirs.items()}
    # diffusers' own reading of the authors' names, which it knows for 48 blocks
    original = convert(original_keys(config), ours, writing=True)
    read = convert_mochi_transformer_checkpoint_to_diffusers(dict(original))
    assert {key: value.shape for key, value in read.items()} == {key: value.shape for key, value in theirs.items()}


def test_the_halves_that_the_layouts_swap_are_the_right_ones() -> None:
    config = replace(SMALL, depth=48)
    ours = MochiDenoiser(config).state_dict()
    read = convert_mochi_transformer_checkpoint_to_diffusers(dict(convert(original_keys(config), ours, writing=True)))
    expected = convert(diffusers_keys(config), ours, writing=True)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], expected[key]) for key in expected)


def test_gradients_reach_every_weight_with_and_without_checkpointing() -> None:
    case = CASES["masked words"]
    track, text = inputs(case)
    for text_sees in ("all", "text"):
        grads = []
        for saving in (False, True):
            torch.manual_seed(0)
            model = MochiDenoiser(replace(case.config, text_sees=text_sees), gradient_checkpointing=saving)
            nn.init.normal_(model.frequencies, std=0.02)
            (model({"video": track}, text)["video"] * draw(*track.values.shape, seed=5)).sum().backward()
            grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
        # nobody asks for what the words of the last block would ask
        idle = {f"blocks.{case.config.depth - 1}.text.norm_q.weight"}
        for name, grad in grads[0].items():
            if name not in idle:
                assert grad is not None, name
                assert grad.any(), name
                torch.testing.assert_close(grads[1][name], grad)


def test_positions_are_not_rounded_where_products_of_matrices_are() -> None:
    model = MochiDenoiser(SMALL)
    nn.init.normal_(model.frequencies)
    track = Track(torch.zeros(1, 4, 9, 8, 8), torch.full((1, 1, 1, 1, 1), 0.5), torch.arange(9) / 3.0)
    plain = model._table(track)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model._table(track)
    assert all(torch.equal(one, other) for one, other in zip(plain, rounded, strict=True))


def test_what_the_model_cannot_take_is_refused() -> None:
    model, (track, text) = MochiDenoiser(SMALL), inputs(CASES["plain"])
    with pytest.raises(CapabilityError, match="has the strategies full, not causal"):
        model({"video": track}, text, strategy=CAUSAL)
    with pytest.raises(ShapeError, match="nearest: 4, 6"):
        model({"video": replace(track, values=track.values[..., :5])}, text)
    with pytest.raises(InputError, match="valid values: all, text"):
        replace(SMALL, text_sees="video")


@pytest.mark.parametrize("text_sees", ["all", "text"])
def test_compiled_blocks_are_those_that_run(text_sees: Any) -> None:
    """What is compiled is a call of a module, so every block, and a text stream that runs alone, must be called."""
    model = MochiDenoiser(replace(SMALL, text_sees=text_sees))
    expected: list[nn.Module] = []
    called: list[nn.Module] = []
    for block in model.blocks:
        assert isinstance(block, MochiBlock)
        expected += [block.text] if text_sees == "text" else []
        for part in (block, block.text, block.video):
            part.register_forward_pre_hook(lambda module, inputs: called.append(module))
    expected += model.blocks
    track, text = inputs(CASES["masked words"])
    model({"video": track}, text)
    assert called == expected
    for region in model.regions:
        region.compile()
    assert {part for part in model.modules() if part._compiled_call_impl is not None} == set(expected)


def test_training_begins_with_places_that_can_be_told_apart() -> None:
    model = MochiDenoiser(SMALL)
    track, text = inputs(CASES["plain"])
    model.begin()
    assert not model({"video": track}, text)["video"].any()
    cosines, sines = model._table(track)
    places = torch.cat([cosines[:, 0], sines[:, 0]], -1)
    assert torch.cdist(places, places).fill_diagonal_(1.0).min() > 0.1
    assert (model.frequencies.count_nonzero(0) == 1).all()
    assert model.frequencies.max() == 1.0
