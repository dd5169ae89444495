"""Models of somebody else in files: which of ours they are, and how their tensors become ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from vitascope.models import FAMILIES, named
from vitascope.models.offload.stores import FileStore
from vitascope.models.parallel import divide_matrices
from vitascope.nn.precision import matrix_names, store_matrices
from vitascope.parallel.ranks import Ranks
from vitascope.weights.keys import KeyTable
from vitascope.weights.sources import SafetensorsSource, TensorSource, Under
from vitascope.weights.streaming import load_streaming

Layout = Literal["diffusers", "original"]
Report = Callable[[int, int], None]


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
        with torch.device("meta"):
            return named(FAMILIES[self.family].model)(self.config)

    def load(
        self,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        report: Report = lambda done, total: None,
        ranks: Ranks | None = None,
    ) -> nn.Module:
        """The model, in eval mode and without gradients, and the files closed.

        dtype: of the weights of linear maps and convolutions; all others (norms, tables) are kept in fp32. ranks:
        processes between which the matrices of a denoiser are divided, each loading its own part. Streams: no second
        copy of the weights stands in memory. Raises CheckpointError where they do not fit, ShapeError for a model that
        cannot be divided so.
        """
        model = self.on_meta()
        cuts = {} if ranks is None else divide_matrices(model, ranks)
        rounded = matrix_names(model)
        try:
            load_streaming(
                model, self.source, self.keys, device=device, report=report,
                dtype=lambda name: dtype if name in rounded else torch.float32,
                cut=lambda name, tensor: cuts[name].of(tensor) if name in cuts else tensor,
            )  # fmt: skip
        finally:
            close(self.source)
        return model.eval().requires_grad_(False)

    def bare(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, FileStore]:
        """The model of `load` on the meta device, and where its weights are. Raises CheckpointError."""
        model = self.on_meta()
        store_matrices(model, dtype)
        return model.eval().requires_grad_(False), FileStore(model.state_dict(), self.source, self.keys)


def close(source: TensorSource) -> None:
    """Close the files of a source, which open again when they are asked for."""
    if isinstance(source, Under):
        close(source.source)
    if isinstance(source, SafetensorsSource):
        source.__exit__()
