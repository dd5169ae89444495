"""What the encoders of texts and pictures of public models take, told from the heads of their files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch

from vitascope.models.image.clip.original import PREFIX as PICTURES
from vitascope.models.offload.offloaded import Offloaded
from vitascope.models.parts import close
from vitascope.models.pretrained import is_unused, variant_there
from vitascope.models.text.t5.encoder import T5Files
from vitascope.models.text.t5.options import T5Options
from vitascope.models.text.t5.streamed import TABLES, open_layers
from vitascope.nn.footprint import footprint, hollow, without_values
from vitascope.weights.sources import open_source

TOKENIZER_SHARES = {"tokenizer.json": 30, "spiece.model": 100}
"""What a tokeniser takes in memory, as times of its file, whichever of them is there first: of 32 thousand and 256
thousand words, 61 MB and 438 MB were measured with tokenizer.json of 2.05 MB and 16.5 MB."""


@dataclass(frozen=True)
class TextCost:
    """A text encoder that comes for the prompts and goes again: its weights, and the sizes that its work follows from.

    tokens: most of a prompt; width, hidden, heads: of its layers. reads_all, gives_all: whether it reads that many and
    gives vectors for that many whatever the prompt. tokenizer: bytes of what turns text to tokens, in the same memory.
    held: its weights where they are read from its files, all or layer by layer, which then say what they
    take; asked for when there are prompts to read, and with it the code that the encoder needs is imported.
    """

    weights: int
    tokens: int
    width: int
    hidden: int
    heads: int
    reads_all: bool = True
    gives_all: bool = True
    tokenizer: int = 0
    held: Callable[[], Offloaded] | None = None

    def most_tokens(self, longest: int | None, given: bool) -> int:
        """Most tokens that are read, or `given`, of prompts of up to `longest` bytes (None: unknown)."""
        whole = self.gives_all if given else self.reads_all
        # a token is a byte or more, with a mark of the end and one for a space in front
        return self.tokens if whole or longest is None else min(self.tokens, longest + 2)

    def working(self, num_prompts: int, longest: int | None, dtype: torch.dtype) -> int:
        """Bytes beside the weights while prompts are read: by running its code on tensors without values, where it is
        there, else what is alive at once in a layer: the states and a normalised copy, queries, keys and values, the
        gated units of the feed-forward, and the bias of the positions for every pair of tokens, once for all and once
        for the batch."""
        tokens = self.most_tokens(longest, given=False)
        if self.held is not None:
            return _traced(self.held().module, num_prompts, tokens, dtype)
        rows, bytes_each = num_prompts * tokens, dtype.itemsize
        states = rows * (6 * self.width + 3 * self.hidden) * max(bytes_each, 4)
        pairs = (2 + 2 * num_prompts) * self.heads * tokens**2 * max(bytes_each, 4)
        return states + pairs


def text_cost(files: T5Files, options: T5Options, dtype: torch.dtype) -> TextCost:
    """Of a T5 encoder."""
    width, hidden, heads = files.sizes
    reads_all = options.padding == "kept" or options.attention == "all"
    weights = _num_values(files.encoder, files.variant) * dtype.itemsize
    return TextCost(weights, options.max_tokens, width, hidden, heads, reads_all, options.padding != "cut")


def with_layers(text: TextCost, files: T5Files, dtype: torch.dtype) -> TextCost:
    """The cost of an encoder whose layers may come from its files on a CPU, in whose memory its tokeniser is too."""

    def held() -> Offloaded:
        return open_layers(files.encoder, dtype=dtype, allow_pickle=files.allow_pickle, variant=files.variant)

    names = [file.name for file in files.tokenizer.glob("*")] if files.tokenizer.is_dir() else []
    known = [name for name in TOKENIZER_SHARES if name in names]
    size = (files.tokenizer / known[0]).stat().st_size * TOKENIZER_SHARES[known[0]] if known else 0
    return replace(text, tokenizer=size, held=cache(held))


def image_bytes(place: Path, variant: str = "") -> int:
    """Of the weights of an encoder of pictures, which are read in fp32: a folder as transformers writes it, or a file
    of Wan's authors, which holds one of texts too."""
    return 4 * _num_values(place, variant, PICTURES if place.is_file() else "")


def _traced(module: Any, num_prompts: int, tokens: int, dtype: torch.dtype) -> int:
    """What an encoder of `transformers` holds at most beside its weights while it reads."""
    with without_values():
        bare: Any = hollow(lambda: type(module)(module.config), module.state_dict(keep_vars=True))
        mask = torch.ones(num_prompts, tokens, dtype=torch.long)

        def run() -> object:
            rows = torch.empty(num_prompts, tokens, module.config.d_model, dtype=dtype)
            return bare(inputs_embeds=rows, attention_mask=mask)

        return footprint(run).peak


def _num_values(place: Path, variant: str, prefix: str = "") -> int:
    """Numbers in the weights of an encoder, under names that begin so, without those of a decoder beside it."""
    # a file of the authors was allowed when it was found
    source = open_source(place, allow_pickle=True, variant=variant_there(place, variant))
    names = [name for name in source.names() if name.startswith(prefix) and not is_unused(name)]
    if set(TABLES) <= set(names):
        names.remove(TABLES[1])  # the same once more
    num_values = sum(prod(source.info(name).shape) for name in names)
    close(source)
    return num_values
