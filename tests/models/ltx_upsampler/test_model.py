"""The latent up-sampler of LTX-Video against diffusers on small random models; its key table both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.ltx.modeling_latent_upsampler import LTXLatentUpsamplerModel
from torch import nn

from vitascope.core.errors import CheckpointError, InputError, ShapeError
from vitascope.models.ltx_upsampler.config import LTXUpsamplerConfig, from_diffusers, to_diffusers
from vitascope.models.ltx_upsampler.keys import diffusers_keys
from vitascope.models.ltx_upsampler.model import LTXUpsampler
from vitascope.models.published import load_published
from vitascope.tasks.convert import Target, convert_model
from vitascope.tasks.discover import discover
from vitascope.weights.checkpoint import load_into
from vitascope.weights.keys import convert

SMALL: dict[str, Any] = {"in_channels": 6, "mid_channels": 32, "num_blocks_per_stage": 2}
CASES: dict[str, dict[str, Any]] = {
    "space": {},
    "space, in a frame": {"dims": 2, "num_blocks_per_stage": 1},
    "time": {"spatial_upsample": False, "temporal_upsample": True},
    "both": {"temporal_upsample": True, "mid_channels": 64},
}
each_case = pytest.mark.parametrize("name", CASES)


def their_model(name: str) -> Any:
    torch.manual_seed(0)
    model = LTXLatentUpsamplerModel(**{**SMALL, **CASES[name]})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


@each_case
@pytest.mark.parametrize("size", [(3, 4, 5), (1, 2, 6)])
def test_latents_grow_as_they_do_in_diffusers(name: str, size: tuple[int, int, int]) -> None:
    theirs = their_model(name)
    config = from_diffusers(theirs.config)
    ours = LTXUpsampler(config).eval().requires_grad_(False)
    load_into(ours, convert(diffusers_keys(config), theirs.state_dict()))
    latents = torch.randn(2, 6, *size, generator=torch.Generator().manual_seed(1))
    expected, out = theirs(latents), ours(latents)
    frames, rows, columns = size
    more = 2 if config.space else 1
    assert out.shape == (2, 6, 2 * frames - 1 if config.time else frames, more * rows, more * columns)
    if expected.numel():
        assert (out - expected).norm() / expected.norm() < 1e-5  # fp32 sums in another order


@each_case
def test_the_layout_is_read_and_written_key_by_key(name: str) -> None:
    theirs = their_model(name)
    config = from_diffusers(theirs.config)
    assert from_diffusers(to_diffusers(config)) == config
    table, state = diffusers_keys(config), theirs.state_dict()
    ours = convert(table, state)
    assert ours.keys() == LTXUpsampler(config).state_dict().keys()
    back = convert(table, ours, writing=True)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    with pytest.raises(CheckpointError, match="1 unknown"):
        convert(table, {**state, "res_blocks.0.conv3.weight": torch.zeros(1)})


def test_a_folder_is_loaded_by_its_class_and_full_size_fits(tmp_path: Path) -> None:
    theirs = their_model("space")
    theirs.save_pretrained(tmp_path)
    ours = load_published(tmp_path, ["LTXLatentUpsamplerModel"])
    latents = torch.randn(1, 6, 2, 3, 4)
    torch.testing.assert_close(ours(latents), theirs(latents), rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"mid_channels": 40}))
    with pytest.raises(CheckpointError, match="multiple of 32"):
        load_published(tmp_path)
    with torch.device("meta"):
        full, expected = LTXUpsampler(LTXUpsamplerConfig()).state_dict(), LTXLatentUpsamplerModel().state_dict()
    written = convert(diffusers_keys(LTXUpsamplerConfig()), full, writing=True)
    assert {key: value.shape for key, value in written.items()} == {k: v.shape for k, v in expected.items()}


def test_a_folder_is_written_anew_in_the_one_layout_that_there_is(tmp_path: Path) -> None:
    their_model("space").save_pretrained(tmp_path / "theirs")
    found = discover(tmp_path / "theirs")
    convert_model(found, Target(tmp_path / "half", "diffusers", torch.bfloat16))
    half = LTXLatentUpsamplerModel.from_pretrained(tmp_path / "half")
    assert {key: half.config[key] for key in SMALL} == SMALL
    with pytest.raises(CheckpointError, match="no layout of its authors; valid families: wan, ltx"):
        convert_model(found, Target(tmp_path / "other", "original"))


def test_what_it_cannot_take_is_refused() -> None:
    model = LTXUpsampler(LTXUpsamplerConfig(6, 32, 1))
    for shape in ((1, 5, 2, 3, 4), (6, 2, 3, 4)):
        with pytest.raises(ShapeError, match=r"\(B, 6, N, h, w\)"):
            model(torch.zeros(shape))
    bad: list[dict[str, Any]] = [{"width": 40}, {"dims": 4}, {"space": False}, {"dims": 2, "time": True}]
    bad += [{"num_blocks": 0}]
    for options in bad:
        with pytest.raises(InputError):
            LTXUpsamplerConfig(**options)
