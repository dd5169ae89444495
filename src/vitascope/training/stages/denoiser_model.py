"""The model that a recipe asks for: a denoiser of any family and the text encoder that is trained along with it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from vitascope.core.errors import CapabilityError, choice
from vitascope.core.protocols import Begins, Denoiser
from vitascope.core.random import derive_seed
from vitascope.models import DENOISERS, FAMILIES, named
from vitascope.models.text.bytes.model import ByteTextEncoder
from vitascope.training.codecs import Codecs
from vitascope.training.stages.denoiser_options import DenoiserOptions, packaged
from vitascope.weights.checkpoint import load_checkpoint, load_into
from vitascope.weights.config import config_to_dict

TEXT_FAMILY = "bytes"


class TextAndDenoiser(nn.Module):
    """The text encoder and the denoiser, trained as one."""

    def __init__(self, text: ByteTextEncoder, denoiser: nn.Module) -> None:
        super().__init__()
        self.text = text
        self.denoiser = denoiser

    @property
    def denoise(self) -> Denoiser:
        """The denoiser as what it can do."""
        return cast(Denoiser, self.denoiser)

    @property
    def regions(self) -> list[nn.Module]:
        """The parts that are worth compiling, each on its own."""
        return [self.text, *getattr(self.denoiser, "regions", ())]


def build_net(options: DenoiserOptions, seed: int, codecs: Codecs) -> TextAndDenoiser:
    """The model of a recipe, with the weights that it starts from.

    Raises InputError for a family or preset that there is not, CheckpointError for fields or weights that do not fit,
    CapabilityError for a model that reads pictures as it reads text: nothing here makes these of them.
    """
    family = FAMILIES[choice("denoiser.family", options.family, DENOISERS)]
    presets: dict[str, Any] = named(family.presets)
    preset = presets[choice("denoiser.preset", options.preset, presets)]
    channels = (codecs.video.latent_channels, codecs.audio.latent_channels)
    config = config_to_dict(preset) | preset.fitting(*channels, options.text.width) | options.model
    if config.get("image_width"):
        raise CapabilityError(
            "a denoiser that is trained here reads pictures as latents beside its own: leave out model.image_width"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "init"))
        text = ByteTextEncoder(options.text)
        denoiser = family.build(config)
    if isinstance(denoiser, Begins):
        denoiser.begin()
    starts = ((text, "text_encoder", TEXT_FAMILY), (denoiser, "denoiser", options.family))
    for module, name, kind in starts:
        if getattr(options, name):
            path = packaged(getattr(options, name), f"{name}.safetensors")
            load_into(module, load_checkpoint(path, family=kind).tensors, name=path.name)
    return TextAndDenoiser(text, denoiser)
