"""The CLIP vision encoder against diffusers' image-to-video pipeline of Wan, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
from PIL import Image
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vitascope.core.errors import CapabilityError, CheckpointError, InputError, ShapeError
from vitascope.models.image.clip.encoder import ClipImageEncoder, PictureSettings, load_clip, normalise_pictures

SIDE, PATCH, WIDTH = 28, 7, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    model = CLIPVisionModel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(root / "image_encoder", max_shard_size="20KB")
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE + 4}, crop_size={"height": SIDE, "width": SIDE}, image_mean=[0.5, 0.4, 0.3]
    )
    processor.save_pretrained(root / "image_processor")
    return root


def picture(height: int, width: int) -> tuple[Image.Image, torch.Tensor]:
    """A picture for diffusers, and (1, 3, H, W) in [-1, 1] for us."""
    levels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Image.fromarray(levels.numpy()), levels.movedim(-1, 0)[None].float() / 127.5 - 1


@pytest.mark.parametrize("size", [(SIDE + 4, SIDE + 4), (60, 97), (97, 60), (20, 31), (33, 32)])
def test_tokens_are_those_of_diffusers(size: tuple[int, int], folder: Path) -> None:
    encoder = load_clip(folder)
    theirs, ours = picture(*size)
    parts: dict[str, Any] = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler", "transformer"))
    processor = CLIPImageProcessorPil.from_pretrained(folder / "image_processor")
    parts |= {"image_encoder": encoder.model, "image_processor": processor}
    pipe = WanImageToVideoPipeline(**parts)
    expected = pipe.encode_image(theirs, torch.device("cpu"))
    tokens = encoder(ours)
    assert tokens.shape == (1, 1 + (SIDE // PATCH) ** 2, WIDTH)
    assert not tokens.requires_grad
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)


def test_pictures_of_a_batch_do_not_touch(folder: Path) -> None:
    encoder = load_clip(folder)
    first = picture(40, 50)[1]
    both = encoder(torch.cat([first, -first]))
    torch.testing.assert_close(both[:1], encoder(first))
    torch.testing.assert_close(both[1:], encoder(-first))
    assert not torch.allclose(both[0], both[1], atol=1e-2)


def test_it_is_not_the_last_layer_and_the_picture_counts(folder: Path) -> None:
    encoder = load_clip(folder)
    model: Any = encoder.model
    before = encoder(picture(40, 40)[1])
    nn.init.normal_(next(model.encoder.layers[-1].parameters()))
    assert torch.equal(encoder(picture(40, 40)[1]), before)
    assert not torch.allclose(encoder(picture(40, 41)[1]), before, atol=1e-2)


def test_values_out_of_range_are_those_of_its_ends() -> None:
    settings = PictureSettings(8, 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    values = normalise_pictures(torch.full((1, 3, 8, 8), 7.0), settings)
    assert torch.equal(values, torch.ones(1, 3, 8, 8))
    for side in (1, -1):
        assert normalise_pictures(torch.full((1, 3, 5, 9), float(side)), settings).unique().item() == side


def test_other_shapes_are_refused(folder: Path) -> None:
    encoder = load_clip(folder, dtype=torch.bfloat16)
    assert isinstance(encoder, ClipImageEncoder)
    assert encoder(picture(30, 30)[1]).dtype == torch.bfloat16
    for shape in ((3, 8, 8), (1, 1, 8, 8), (1, 3, 2, 8, 8), (0, 3, 8, 8)):
        with pytest.raises(ShapeError, match=r"must have the shape \(B, 3, H, W\)"):
            encoder(torch.zeros(shape))


def test_without_settings_pictures_are_clips_own(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "image_encoder").symlink_to(folder / "image_encoder")
    with pytest.raises(CheckpointError, match="pictures of 224 px for 28 px"):
        load_clip(tmp_path)
    place = tmp_path / "image_processor" / "preprocessor_config.json"
    place.parent.mkdir()
    values = json.loads((folder / "image_processor" / "preprocessor_config.json").read_text())
    for change in ({"resample": 2}, {"crop_size": {"height": 28, "width": 29}}, {"image_mean": [1.0]}, {"size": "big"}):
        place.write_text(json.dumps(values | change))
        with pytest.raises(CheckpointError, match="does not describe pictures for CLIP"):
            load_clip(tmp_path)
    place.write_text(json.dumps(values | {"crop_size": 28, "size": 28}))
    assert load_clip(tmp_path).settings.short_px == 28


def test_quantise_and_the_kind_of_model_are_checked(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="quantise 'half' is not known"):
        load_clip(folder, quantise="half")
    with pytest.raises(CheckpointError, match=r"there is no folder .*image_encoder"):
        load_clip(tmp_path)
    with pytest.raises(CapabilityError, match="needs a GPU"):
        load_clip(folder, quantise="bnb_nf4")
