"""Models of somebody else in files: which of ours they are, and how their tensors become ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from reprlib import Repr
from typing import Any, Literal

import torch
from torch import nn

from vitascope.core.errors import CheckpointError, InputError
from vitascope.models import FAMILIES, named
from vitascope.models.offload.stores import FileStore
from vitascope.models.parallel import divide_matrices
from vitascope.nn.precision import matrix_names, store_matrices
from vitascope.parallel.ranks import Ranks
from vitascope.weights.config import config_from_dict, config_to_dict
from vitascope.weights.keys import KeyTable
from vitascope.weights.sources import Joined, SafetensorsSource, TensorSource, Under
from vitascope.weights.streaming import load_streaming

Layout = Literal["diffusers", "original"]
Report = Callable[[int, int], None]
_COUNTS = ("depth", "blocks", "num_blocks")
"""What configurations call numbers of layers."""
_SHORT = Repr()
_SHORT.maxstring = 100
shortly = _SHORT.repr


@contextmanager
def reading_config(label: str) -> Iterator[None]:
    """A block that reads somebody else's configuration: what wrong values raise in it becomes CheckpointError."""
    try:
        yield
    except (InputError, CheckpointError) as error:
        if label in str(error):
            raise
        raise CheckpointError(f"{label}: {error}") from error
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(f"{label} holds values that no such model has: {shortly(str(error))}") from error


def checked_config(config: Any, source: TensorSource, label: str) -> Any:
    """The configuration with every field of its type. Raises CheckpointError for a field of another, for numbers out of
    all bounds, and for more layers than there are tensors (building them would take without end)."""
    try:
        config = config_from_dict(type(config), config_to_dict(config))
    except CheckpointError as error:
        raise CheckpointError(f"{label}: {error}") from error
    num_layers = 0
    for name, value in _numbers(config_to_dict(config)):
        if not -(2**31) < value < 2**31 or (name == "eps" and not 0 <= value < 1):
            raise CheckpointError(f"{label}: {name} of {shortly(value)} is out of all bounds")
        num_layers += int(value) if name in _COUNTS else 0
    if num_layers > len(source.names()):
        raise CheckpointError(f"{label} speaks of {num_layers} layers, the weights have {len(source.names())} tensors")
    return config


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers inside a configuration, with the names of the fields that they stand in."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, name)
    elif isinstance(value, (int, float)):
        yield name, value


@dataclass(frozen=True)
class Part:
    """A model that lies in files, in the layout of diffusers or of its authors; nothing is read before `load`."""

    family: str
    layout: Layout
    config: Any
    keys: KeyTable
    source: TensorSource

    def on_meta(self) -> nn.Module:
        """The model without its weights."""
        try:
            with torch.device("meta"):
                return named(FAMILIES[self.family].model)(self.config)
        except (RuntimeError, TypeError) as error:
            why = shortly(str(error))
            raise CheckpointError(
                f"no model can be built of the configuration of {self.source.label}: {why}"
            ) from error

    def load(
        self,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        within: str = "",
        report: Report = lambda done, total: None,
        ranks: Ranks | None = None,
    ) -> nn.Module:
        """The model, in eval mode and without gradients, and the files closed.

        dtype: of the weights of linear maps and convolutions, of those `within` the part of that name alone if one is
        given; all others (norms, tables) are kept in fp32. ranks:
        processes between which the matrices of a denoiser are divided, each loading its own part. Streams: no second
        copy of the weights stands in memory. Raises CheckpointError where they do not fit, ShapeError for a model that
        cannot be divided so.
        """
        model = self.on_meta()
        cuts = {} if ranks is None else divide_matrices(model, ranks)
        prefix = within and f"{within}."
        rounded = {prefix + name for name in matrix_names(model.get_submodule(within))}
        try:
            load_streaming(
                model, self.source, self.keys, device=device, report=report,
                dtype=lambda name: dtype if name in rounded else torch.float32,
                cut=lambda name, tensor: cuts[name].of(tensor) if name in cuts else tensor,
            )  # fmt: skip
        finally:
            close(self.source)
        return model.eval().requires_grad_(False)

    def bare(self, dtype: torch.dtype = torch.float32, within: str = "") -> tuple[nn.Module, FileStore]:
        """The model of `load` on the meta device, and where its weights are. Raises CheckpointError."""
        model = self.on_meta()
        store_matrices(model.get_submodule(within), dtype)
        return model.eval().requires_grad_(False), FileStore(model.state_dict(), self.source, self.keys)


def close(source: TensorSource) -> None:
    """Close the files of a source, which open again when they are asked for."""
    if isinstance(source, Under):
        close(source.source)
    if isinstance(source, Joined):
        for part in source.sources.values():
            close(part)
    if isinstance(source, SafetensorsSource):
        source.__exit__()
