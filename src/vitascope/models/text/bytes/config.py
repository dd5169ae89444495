"""The shape of a byte-level text encoder."""

from __future__ import annotations

from dataclasses import dataclass

from vitascope.core.errors import InputError
from vitascope.nn.attention import head_width


@dataclass(frozen=True)
class BytesConfig:
    """`width`, `depth` and `num_heads` of the layers over words; `byte_width` of a byte's vector before pooling.

    max_words: words a prompt may have; max_word_bytes: longer words are cut into pieces of that many bytes.
    lower_case: "A Red Ball" reads as "a red ball". Raises InputError where values are not positive.
    """

    width: int = 192
    depth: int = 2
    num_heads: int = 3
    feed_forward_ratio: float = 4.0
    byte_width: int = 64
    max_words: int = 64
    max_word_bytes: int = 12
    lower_case: bool = True

    def __post_init__(self) -> None:
        if min(self.depth, self.byte_width, self.max_words, self.max_word_bytes) < 1:
            raise InputError("depth, byte_width, max_words and max_word_bytes must be positive")
        head_width(self.width, self.num_heads)

    def check_words(self, num_words: int) -> None:
        """Raise InputError unless prompts of that many words can be read."""
        if not 1 <= num_words <= self.max_words:
            raise InputError(f"num_words must lie in 1..{self.max_words}, the max_words of the text, got {num_words}")
