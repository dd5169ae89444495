"""Text by its bytes: bytes pooled into words, a small transformer over the words.

B prompts, S words, U different words, W bytes of a word, E width of a byte, D width. Words are runs of letters and
digits, or single other characters; spaces only divide. There is no vocabulary to miss a word: a misspelt one is close
to the right one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitascope.core.errors import PromptError
from vitascope.core.tracks import TextContext
from vitascope.models.text.bytes.config import BytesConfig
from vitascope.nn.attention import SelfAttention
from vitascope.nn.embeddings import normal_table
from vitascope.nn.feed_forward import FeedForward
from vitascope.nn.norms import RMSNorm

PADDING, EMPTY = 0, 257
"""Byte b is number b + 1; number 0 fills up a word, number 257 alone is the word of the empty prompt."""
NUM_SYMBOLS = 258

_WORDS = re.compile(r"\w+|[^\w\s]")


UNIQUE_STEP = 128
"""Different words are padded to a multiple of this where prompts are padded, so that few shapes occur."""


@dataclass(frozen=True)
class ByteTokens:
    """The different words of a batch as numbers of bytes (U, W), which of them each word is (B, S), and a mask of words
    (B, S), True where a word is real. Captions repeat their words, so each is pooled once."""

    words_UW: Tensor
    index_BS: Tensor
    mask_BS: Tensor

    def to(self, device: torch.device | str) -> ByteTokens:
        """The same on another device."""
        return ByteTokens(self.words_UW.to(device), self.index_BS.to(device), self.mask_BS.to(device))


def tokenize(prompts: Sequence[str], config: BytesConfig, num_words: int | None = None) -> ByteTokens:
    """Prompts to byte numbers, on the CPU. The empty prompt (or spaces alone) is one word of its own.

    num_words: pad to this many words (one shape for every batch); None pads to the longest prompt.
    Raises PromptError for no prompts at all, one that is not text, or one with more words than fit; InputError for
    another number of words than the model has places for.
    """
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise PromptError("prompts must be a non-empty sequence of strings")
    limit = config.max_words if num_words is None else num_words
    config.check_words(limit)
    split = [_words(prompt, config) for prompt in prompts]
    for prompt, words in zip(prompts, split, strict=True):
        if len(words) > limit:
            raise PromptError(f"the prompt has {len(words)} words, at most {limit} fit: {prompt[:40]!r}")
    length = max(map(len, split)) if num_words is None else num_words
    index = np.zeros((len(prompts), length), dtype=np.int64)
    mask = np.zeros((len(prompts), length), dtype=bool)
    places: dict[tuple[int, ...], int] = {}
    for row, words in enumerate(split):
        mask[row, : len(words)] = True
        index[row, : len(words)] = [places.setdefault(word, len(places)) for word in words]
    count = len(places) if num_words is None else -(-len(places) // UNIQUE_STEP) * UNIQUE_STEP
    numbers = np.zeros((count, config.max_word_bytes), dtype=np.int64)
    for word, place in places.items():
        numbers[place, : len(word)] = word
    return ByteTokens(torch.from_numpy(numbers), torch.from_numpy(index), torch.from_numpy(mask))


def _words(prompt: str, config: BytesConfig) -> list[tuple[int, ...]]:
    text = prompt.lower() if config.lower_case else prompt
    pieces: list[tuple[int, ...]] = []
    for word in _WORDS.findall(text):
        numbers = tuple(byte + 1 for byte in word.encode("utf-8", "replace"))
        pieces += [numbers[i : i + config.max_word_bytes] for i in range(0, len(numbers), config.max_word_bytes)]
    return pieces or [(EMPTY,)]


class WordLayer(nn.Module):
    """Attention over the words and a feed-forward, normalised before each."""

    def __init__(self, config: BytesConfig) -> None:
        super().__init__()
        self.norm_attention, self.norm_feed_forward = RMSNorm(config.width), RMSNorm(config.width)
        self.attention = SelfAttention(config.width, config.num_heads, config.num_heads)
        self.feed_forward = FeedForward(config.width, round(config.width * config.feed_forward_ratio))

    def forward(self, x_BSD: Tensor, mask: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attention(self.norm_attention(x_BSD), mask=mask)
        return x_BSD + self.feed_forward(self.norm_feed_forward(x_BSD))


class ByteTextEncoder(nn.Module):
    """`core.protocols.TextEncoder`: prompts, or what `tokenize` made of them, to a vector per word."""

    def __init__(self, config: BytesConfig) -> None:
        super().__init__()
        self.config = config
        self.bytes = nn.Embedding(NUM_SYMBOLS, config.byte_width)
        self.places = normal_table(config.max_word_bytes, config.byte_width)
        self.mix = nn.Linear(3 * config.byte_width, config.width)
        self.pool = nn.Linear(config.width, config.width)
        self.positions = normal_table(config.max_words, config.width, std=0.2)
        self.layers = nn.ModuleList(WordLayer(config) for _ in range(config.depth))
        self.norm_out = RMSNorm(config.width)

    @property
    def width(self) -> int:
        """Width of the embeddings."""
        return self.config.width

    def tokenize(self, prompts: Sequence[str], num_words: int | None = None) -> ByteTokens:
        """`tokenize` with this encoder's configuration, on its device."""
        return tokenize(prompts, self.config, num_words).to(self.places.device)

    def forward(self, prompts: Sequence[str] | ByteTokens) -> TextContext:
        """Embeddings (B, S, D) and mask. Raises PromptError for prompts that do not fit (`tokenize`)."""
        tokens = prompts if isinstance(prompts, ByteTokens) else self.tokenize(prompts)
        x_BSD = self._pool(tokens.words_UW)[tokens.index_BS] + self.positions[: tokens.index_BS.shape[1]]
        mask = tokens.mask_BS[:, None, None, :]
        for layer in self.layers:
            x_BSD = layer(x_BSD, mask)
        return TextContext(self.norm_out(x_BSD), tokens.mask_BS)

    def _pool(self, words_UW: Tensor) -> Tensor:
        """A vector per word: bytes with their neighbours through one non-linear map, summed over the real bytes."""
        real = (words_UW != PADDING).unsqueeze(-1)
        e_UWE = (self.bytes(words_UW) + self.places) * real
        around = torch.cat([F.pad(e_UWE, (0, 0, 1, 0))[:, :-1], e_UWE, F.pad(e_UWE, (0, 0, 0, 1))[:, 1:]], -1)
        mixed = F.gelu(self.mix(around), approximate="tanh") * real
        return self.pool(mixed.sum(1) * real.sum(1).clamp_min(1).rsqrt())
