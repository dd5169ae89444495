"""Parts of public models as diffusers writes them: a folder with config.json and weights, to one of our models.

To add a part: a `from_diffusers` beside its configuration, a key table, and a line in PUBLISHED.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitascope.core.errors import CheckpointError, InputError
from vitascope.models import FAMILIES, named
from vitascope.nn.precision import matrix_names
from vitascope.weights.foreign import read_object
from vitascope.weights.sources import SafetensorsSource, TensorSource, open_source
from vitascope.weights.streaming import load_streaming


@dataclass(frozen=True)
class Published:
    """The family of a class of diffusers, and "module:function" of what reads its configuration and names its keys."""

    family: str
    config: str
    keys: str

    @classmethod
    def of(cls, family: str, folder: str) -> Published:
        """With the functions where all families have them."""
        module = f"vitascope.models.{folder}"
        return cls(family, f"{module}.config:from_diffusers", f"{module}.keys:diffusers_keys")


PUBLISHED: dict[str, Published] = {
    "WanTransformer3DModel": Published.of("wan", "wan"),
    "LTXVideoTransformer3DModel": Published.of("ltx", "ltx"),
    "MochiTransformer3DModel": Published.of("mochi", "mochi"),
    "LTXLatentUpsamplerModel": Published.of("ltx_upsampler", "ltx_upsampler"),
    "AutoencoderKLWan": Published.of("wan_codec", "codecs.wan"),
    "AutoencoderKLLTXVideo": Published.of("ltx_codec", "codecs.ltx"),
    "AutoencoderKLMochi": Published.of("mochi_codec", "codecs.mochi"),
}
"""By class name, as `_class_name` in config.json has it."""

Report = Callable[[int, int], None]


def read_config(folder: Path, classes: Sequence[str]) -> tuple[Published, Any]:
    """What a folder holds and its configuration. Raises CheckpointError unless it is one of `classes`."""
    values = read_object(folder / "config.json")
    name = values.get("_class_name")
    if name not in classes:
        raise CheckpointError(f"{folder} holds a {name}; valid here: {', '.join(classes)}")
    part = PUBLISHED[str(name)]
    try:
        return part, named(part.config)(values)
    except InputError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error


def load_published(
    folder: str | Path,
    classes: Sequence[str] = tuple(PUBLISHED),
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    variant: str = "",
    report: Report = lambda done, total: None,
) -> nn.Module:
    """The model in a folder as diffusers writes it, in eval mode and without gradients.

    dtype: of the weights of linear maps and convolutions; all others (norms, tables) are kept in fp32. variant: such as
    "fp16", part of the file's name. Streams: no second copy of the weights stands in memory. Raises CheckpointError.
    """
    folder = Path(folder)
    part, config = read_config(folder, classes)
    with torch.device("meta"):
        model = named(FAMILIES[part.family].model)(config)
    source = open_source(folder, variant=variant)
    fill(model, source, named(part.keys)(config), device=device, dtype=dtype, report=report)
    return model


def fill(
    model: nn.Module,
    source: TensorSource,
    table: Any,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    report: Report = lambda done, total: None,
) -> None:
    """Give a model on the meta device its weights, the matrices in `dtype`, and close the source."""
    rounded = matrix_names(model)
    try:
        load_streaming(
            model, source, table, device=device, dtype=lambda name: dtype if name in rounded else torch.float32,
            report=report,
        )  # fmt: skip
    finally:
        if isinstance(source, SafetensorsSource):
            source.__exit__()
    model.eval().requires_grad_(False)
