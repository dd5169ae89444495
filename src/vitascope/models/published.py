"""Parts of public models as diffusers writes them: a folder with config.json and weights, to one of our models.

To add a part: a `from_diffusers` beside its configuration, a key table, and a line in PUBLISHED.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vitascope.core.errors import CheckpointError
from vitascope.models import named
from vitascope.models.parts import Part, Report, checked_config, reading_config
from vitascope.parallel.ranks import Ranks
from vitascope.weights.foreign import read_object
from vitascope.weights.sources import open_source


@dataclass(frozen=True)
class Published:
    """The family of a class of diffusers, and "module:function" of what reads and writes its configuration and names
    its keys."""

    family: str
    config: str
    write: str
    keys: str

    @classmethod
    def of(cls, family: str, folder: str) -> Published:
        """With the functions where all families have them."""
        module = f"vitascope.models.{folder}"
        config = f"{module}.config"
        return cls(family, f"{config}:from_diffusers", f"{config}:to_diffusers", f"{module}.keys:diffusers_keys")


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


def open_published(folder: str | Path, classes: Sequence[str] = tuple(PUBLISHED), *, variant: str = "") -> Part:
    """The model in a folder as diffusers writes it. variant: such as "fp16", part of the file's name.

    Raises CheckpointError unless it is of one of `classes`, whole and with a configuration that is known.
    """
    folder = Path(folder)
    values = read_object(folder / "config.json")
    name = values.get("_class_name")
    if name not in classes:
        what = f"holds a {str(name)[:80]}" if name else "does not say what it holds (_class_name in config.json)"
        raise CheckpointError(f"{folder} {what}; valid here: {', '.join(classes)}")
    part = PUBLISHED[str(name)]
    label = str(folder / "config.json")
    with reading_config(label):
        config = named(part.config)(values)
    source = open_source(folder, variant=variant)
    config = checked_config(config, source, label)
    return Part(part.family, "diffusers", config, named(part.keys)(config), source)


def load_published(
    folder: str | Path,
    classes: Sequence[str] = tuple(PUBLISHED),
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    variant: str = "",
    report: Report = lambda done, total: None,
    ranks: Ranks | None = None,
) -> nn.Module:
    """The model in a folder as diffusers writes it; see `open_published` and `parts.Part.load`."""
    part = open_published(folder, classes, variant=variant)
    return part.load(device=device, dtype=dtype, report=report, ranks=ranks)
