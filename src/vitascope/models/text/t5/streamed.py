"""T5 and umT5 whose layers come from their files one after the other while a prompt is read.

Of the table of tokens (2 GB for umT5-XXL in bf16) only the rows of the prompt's tokens are read. What is computed is
the same to the bit as with the whole encoder in memory. B prompts, S tokens, V tokens known, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vitascope.core.errors import CheckpointError
from vitascope.models.offload.offloaded import WHOLE, Layers, Offloaded
from vitascope.models.offload.stores import FileStore
from vitascope.models.parts import close
from vitascope.models.pretrained import check_encoder, encoder_class, is_unused, loading, transformers
from vitascope.models.text.t5.original import KEYS, TOKENS, original_config
from vitascope.weights.keys import Drop, KeyTable, Rename
from vitascope.weights.sources import TensorSource, open_source, read_rows

CLASSES = {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel"}
TABLES = ("shared.weight", "encoder.embed_tokens.weight")
"""What `transformers` calls the vectors of the tokens; files may hold them under either name, or both."""


class TokenRows(nn.Module):
    """An embedding whose table (V, D) stays in its file: of each call's tokens alone rows are read.

    Raises CheckpointError for a table of another width.
    """

    def __init__(
        self, source: TensorSource, name: str, width: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self._source, self._name = source, name
        self._like = (width, dtype, torch.device(device))
        shape = source.info(name).shape
        if len(shape) != 2 or shape[1] != width:
            raise CheckpointError(f"{source.label}: {name} has the shape {shape}, expected (tokens, {width})")

    @property
    def weight(self) -> Tensor:
        """No rows, (0, D), in the dtype and on the device of what a call gives."""
        width, dtype, device = self._like
        return torch.empty(0, width, dtype=dtype, device=device)

    def forward(self, ids_BS: Tensor) -> Tensor:
        """The vectors (B, S, D) of tokens by their numbers."""
        _, dtype, device = self._like
        numbers, places_BS = torch.unique(ids_BS, return_inverse=True)
        rows = read_rows(self._source, self._name, numbers.tolist()).to(device, dtype)
        return functional.embedding(places_BS.to(device), rows)


def open_layers(
    place: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    layers: Layers = WHOLE,
    allow_pickle: bool = False,
    variant: str = "",
) -> Offloaded:
    """The encoder in a folder as transformers writes it, or in a file of Wan's authors, without its weights.

    They are read between `bring` and `away`, in the way of `layers`; `close_layers` then closes the files. Nothing but
    the heads of files is read here. Raises CheckpointError where they do not fit, CapabilityError without
    `transformers`.
    """
    source = open_source(place, allow_pickle=allow_pickle, variant=variant)
    model, tokens, table = _original(source) if place.is_file() else _folder(place, source)
    model = model.to(dtype).eval().requires_grad_(False)
    model.set_input_embeddings(TokenRows(source, tokens, model.config.d_model, dtype, device))
    store = FileStore(model.state_dict(), source, table)
    close(source)
    return Offloaded(model, store, device, layers, list(model.encoder.block))


def close_layers(held: Offloaded) -> None:
    """Take all weights away and close the files, which open again when they are asked for."""
    held.away()
    if isinstance(held.store, FileStore):
        close(held.store.source)


def _folder(place: Path, source: TensorSource) -> tuple[Any, str, KeyTable]:
    """The model on the meta device, the name of its table of tokens, and how all else is read."""
    cls = encoder_class(place, CLASSES)
    with loading(str(place)):
        config = cls.config_class.from_pretrained(place, local_files_only=True, attn_implementation="sdpa")
        with torch.device("meta"):
            model = cls(config)
    check_encoder(place, source)
    names = source.names()
    tokens = next((name for name in TABLES if name in names), "")
    if not tokens:
        raise CheckpointError(f"{source.label}: 1 weights missing ({TABLES[0]})")
    dropped = [name for name in names if name in TABLES or is_unused(name)]
    table = tuple(Drop(name) if name in dropped else Rename(name, name) for name in names)
    return model, tokens, table


def _original(source: TensorSource) -> tuple[Any, str, KeyTable]:
    """Of a file of Wan's authors."""
    library = transformers("text encoders of public checkpoints")
    with torch.device("meta"):
        model = library.UMT5EncoderModel(original_config(source))
    return model, TOKENS, (Drop(TOKENS), *(rule for rule in KEYS if TOKENS not in rule.theirs))
