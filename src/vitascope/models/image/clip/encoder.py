"""CLIP ViT-H/14 as Wan 2.1 image-to-video reads it: a picture to the tokens before the last layer.

B pictures, I tokens (257: one for the whole and 16 x 16 patches), W width (1280). Source: Wan team 2025 (arXiv
2503.20314), image-to-video; how pictures are cut follows the pipelines of diffusers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vitascope.core.errors import CheckpointError, ShapeError
from vitascope.models.pretrained import load_pretrained, variant_there
from vitascope.weights.foreign import read_object

CLASSES = {"clip_vision_model": "CLIPVisionModel"}
ENCODER, SETTINGS = "image_encoder", "image_processor/preprocessor_config.json"
"""Where they are in a pipeline as diffusers writes it."""
LAYER = -2
"""Of the hidden states, the one that is read: what the last layer is given."""
_BICUBIC = 3


@dataclass(frozen=True)
class PictureSettings:
    """A picture is made `short_px` on its shorter side, cut to `crop_px` x `crop_px` in its middle, and normalised.

    mean, std: of red, green and blue in [0, 1]. The defaults are CLIP's (Radford et al. 2021, released code).
    """

    short_px: int = 224
    crop_px: int = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        if not 0 < self.crop_px <= self.short_px:
            raise ShapeError(f"a picture of {self.short_px} px cannot be cut to {self.crop_px} px")
        if not (all(map(isfinite, self.mean)) and all(0 < std < inf for std in self.std)):
            raise ShapeError(f"pictures cannot be normalised by the mean {self.mean} and the spread {self.std}")


class ClipImageEncoder(nn.Module):
    """Pictures to image tokens for `TextContext.image`, by a vision encoder of `transformers`."""

    def __init__(self, model: nn.Module, settings: PictureSettings | None = None) -> None:
        super().__init__()
        self.model, self.settings = model, settings or PictureSettings()

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to tokens (B, I, W). Raises ShapeError for another shape."""
        if pictures.ndim != 4 or pictures.shape[1] != 3 or not pictures.numel():
            raise ShapeError(f"pictures must have the shape (B, 3, H, W), got {tuple(pictures.shape)}")
        parameter = next(self.model.parameters())
        values = normalise_pictures(pictures, self.settings).to(parameter.device, self._dtype)
        return self.model(values, output_hidden_states=True).hidden_states[LAYER]

    @property
    def _dtype(self) -> torch.dtype:
        """Of the layer that reads the pixels; matrices may be stored in fewer bits."""
        model: Any = self.model
        return model.embeddings.patch_embedding.weight.dtype


def normalise_pictures(pictures: Tensor, settings: PictureSettings) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] to (B, 3, crop_px, crop_px) in fp32 on the CPU, as CLIP has them.

    Scaled in 8 bits with Pillow's bicubic filter, as the model was trained; its rounding is part of the result.
    """
    levels = pictures.detach().float().cpu().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    scaled = torch.stack([_scale_and_cut(picture, settings) for picture in levels.movedim(1, -1).numpy()])
    mean, std = (torch.tensor(values)[:, None, None] for values in (settings.mean, settings.std))
    return (scaled.movedim(-1, 1).float() / 255 - mean) / std


def load_clip(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantise: str | None = None,
    variant: str = "",
) -> ClipImageEncoder:
    """The encoder in `image_encoder` of a pipeline as diffusers writes it, with the settings of `image_processor`.

    quantise: one of `models.pretrained.QUANTISERS`. variant: such as "fp16", taken where it is there. Raises
    CheckpointError for what is missing, damaged or another model; CapabilityError for a package that is missing;
    InputError for an unknown `quantise`.
    """
    folder = Path(folder)
    path = folder / SETTINGS
    settings = _read_settings(path) if path.is_file() else PictureSettings()
    place = folder / ENCODER
    variant = variant_there(place, variant)
    model = load_pretrained(place, CLASSES, dtype=dtype, device=device, quantise=quantise, variant=variant)
    config: Any = model.config
    if config.image_size != settings.crop_px:
        raise CheckpointError(f"{folder} does not fit: pictures of {settings.crop_px} px for {config.image_size} px")
    return ClipImageEncoder(model, settings).eval()


def _scale_and_cut(picture_HWC: np.ndarray, settings: PictureSettings) -> Tensor:
    """8-bit levels (H, W, 3) to (crop_px, crop_px, 3)."""
    height, width = picture_HWC.shape[:2]
    short, crop = settings.short_px, settings.crop_px
    if height <= width:
        size = (max(short, short * width // height), short)
    else:
        size = (short, max(short, short * height // width))
    scaled = Image.fromarray(picture_HWC).resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - crop) // 2, (size[1] - crop) // 2
    return torch.from_numpy(np.array(scaled.crop((left, top, left + crop, top + crop))))


def _read_settings(path: Path) -> PictureSettings:
    """The settings of a CLIP image processor. Raises CheckpointError for those of another kind."""
    values = read_object(path)
    try:
        size, crop = values["size"], values["crop_size"]
        short = size["shortest_edge"] if isinstance(size, dict) else size
        sides = {crop["height"], crop["width"]} if isinstance(crop, dict) else {crop}
        (side,) = sides
        mean, std = (tuple(float(value) for value in values[name]) for name in ("image_mean", "image_std"))
        if values.get("resample", _BICUBIC) != _BICUBIC or len(mean) != 3 or len(std) != 3:
            raise ValueError("pictures must be scaled by the bicubic filter and have three channels")
        return PictureSettings(int(short), int(side), mean, std)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not describe pictures for CLIP: {error}") from error
