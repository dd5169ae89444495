"""Texts one by one, and put together to a batch: what encoders give and caches keep.

B prompts, S tokens of the batch, L tokens of a text, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from vitascope.core.errors import PromptError
from vitascope.core.tracks import TextContext

Padding = Literal["zero", "kept", "cut"]
"""What stands where a prompt has no words: zeros up to the most tokens, what the encoder made of padding up to the most
tokens, or nothing but what the longest prompt of the batch asks for (zeros)."""


@dataclass(frozen=True)
class TextRow:
    """Embeddings (L, D) of one text; the first `num_tokens` are of words, any others of padding.

    removed: the end of the text where it was too long and was cut.
    """

    embeddings: Tensor
    num_tokens: int
    removed: str = ""


class RowEncoder(Protocol):
    """What can be cached: texts to rows."""

    def encode(self, prompts: Sequence[str]) -> list[TextRow]: ...


def assemble(rows: Sequence[TextRow], num_tokens: int | None, device: torch.device | str) -> TextContext:
    """Embeddings (B, S, D) and mask (B, S) on `device`; S is `num_tokens`, or that of the longest row (at least 1)."""
    length = num_tokens if num_tokens is not None else max(1, *(len(row.embeddings) for row in rows))
    first = rows[0].embeddings
    embeddings = torch.zeros(len(rows), length, first.shape[1], dtype=first.dtype, device=device)
    mask = torch.zeros(len(rows), length, dtype=torch.bool, device=device)
    for index, row in enumerate(rows):
        embeddings[index, : len(row.embeddings)] = row.embeddings.to(device)
        mask[index, : row.num_tokens] = True
    return TextContext(embeddings, mask)


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise PromptError for no prompts at all, or for what is not a sequence of strings."""
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise PromptError("prompts must be a non-empty sequence of strings")


def warn_of_cut(removed: str, max_tokens: int) -> None:
    """Say with a UserWarning what of a prompt was not read."""
    warnings.warn(f"the prompt was cut to {max_tokens} tokens; not read: {removed!r}", stacklevel=2)
