"""Parts of public models in the files of their authors: told by the names of their tensors, never by the file's name.

To add a family: an `original.py` beside its configuration with MARKS and read_config, `original_keys` in its key table,
and a line in ORIGINALS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitascope.core.errors import CheckpointError
from vitascope.models import named
from vitascope.models.parts import Part, checked_config, reading_config
from vitascope.weights.shapes import Shapes
from vitascope.weights.sources import TensorSource, Under


@dataclass(frozen=True)
class Original:
    """The modules of a family, and what its configuration is called in the metadata of a file that holds several."""

    module: str
    notes: str

    def named(self, name: str) -> Any:
        """Something of the module `original`, such as MARKS."""
        return named(f"{self.module}.original:{name}")

    @property
    def keys(self) -> Any:
        """The function from a configuration to the key table."""
        return named(f"{self.module}.keys:original_keys")


ORIGINALS: dict[str, Original] = {
    "wan": Original("vitascope.models.wan", "transformer"),
    "ltx": Original("vitascope.models.ltx", "transformer"),
    "mochi": Original("vitascope.models.mochi", "transformer"),
    "wan_codec": Original("vitascope.models.codecs.wan", "vae"),
    "ltx_codec": Original("vitascope.models.codecs.ltx", "vae"),
    "mochi_codec": Original("vitascope.models.codecs.mochi", "vae"),
}
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "model.", "vae.", "first_stage_model.")
"""Under which the parts of a model stand in one file, or in repackaged ones."""


def find_parts(source: TensorSource, notes: Mapping[str, Any] | None = None) -> list[Part]:
    """The models that a file of their authors holds, one for each prefix, in the order of PREFIXES; none if none is
    known by its names.

    notes: configurations by part ("transformer", "vae"), from the file's metadata or beside it. Raises CheckpointError
    where tensors belong to none of the models that are found, and for configurations that do not fit.
    """
    names = frozenset(source.names())
    parts: list[Part] = []
    taken: list[str] = []
    for prefix in PREFIXES:
        family = _family(names, prefix)
        if family is None:
            continue
        original, inside = ORIGINALS[family], Under(source, prefix) if prefix else source
        label = f"the {original.notes} of {source.label}"
        with reading_config(label):
            config = original.named("read_config")(Shapes(inside), (notes or {}).get(original.notes) or {})
        config = checked_config(config, inside, label)
        parts.append(Part(family, "original", config, original.keys(config), inside))
        taken.append(prefix)
    left = sorted(name for name in names if not name.startswith(tuple(taken)))
    if parts and left:
        raise CheckpointError(f"{source.label} holds {len(left)} tensors of no known model ({left[0]}, ...)")
    return parts


def _family(names: frozenset[str], prefix: str) -> str | None:
    """The family whose marks stand under a prefix."""
    for family, original in ORIGINALS.items():
        if all(prefix + mark in names for mark in original.named("MARKS")):
            return family
    return None
