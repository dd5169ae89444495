"""How each family of public models has its prompts read by T5, and how prompts are cleaned before."""

from __future__ import annotations

import html
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Literal, get_args

from vitascope.core.errors import InputError, choice
from vitascope.models.text.rows import Padding

Attention = Literal["words", "all"]
Cleaning = Literal["as_is", "lower", "web_text"]
Empty = Literal["encoded", "masked"]
TooLong = Literal["refuse", "cut"]


@dataclass(frozen=True)
class T5Options:
    """What a denoiser expects of its text.

    max_tokens: tokens a prompt may have, its end mark included. padding: `rows.Padding`.
    attention: the encoder reads the words alone, or padding up to max_tokens with them.
    cleaning: prompts as they are, in lower case without outer spaces, or `clean_web_text`.
    empty: the empty prompt is encoded (as an end mark), or has no words at all.
    too_long: PromptError, or the end of the prompt is cut away with a UserWarning that quotes it.
    Raises InputError for other values.
    """

    max_tokens: int = 512
    padding: Padding = "zero"
    attention: Attention = "words"
    cleaning: Cleaning = "as_is"
    empty: Empty = "encoded"
    too_long: TooLong = "refuse"

    def __post_init__(self) -> None:
        if self.max_tokens < 2:
            raise InputError(f"max_tokens must be at least 2 (a word and its end mark), got {self.max_tokens}")
        for name, valid in _VALID.items():
            choice(name, getattr(self, name), valid)

    @property
    def row_tokens(self) -> int | None:
        """Tokens of every batch; None where the longest prompt says."""
        return None if self.padding == "cut" else self.max_tokens

    def clean(self, prompt: str) -> str:
        """The text that is given to the tokeniser. What cannot be written as UTF-8 becomes a question mark."""
        text = prompt.encode("utf-8", "replace").decode("utf-8")
        if self.cleaning == "web_text":
            return clean_web_text(text)
        return text.lower().strip() if self.cleaning == "lower" else text


_VALID: dict[str, tuple[str, ...]] = {
    "padding": get_args(Padding),
    "attention": get_args(Attention),
    "cleaning": get_args(Cleaning),
    "empty": get_args(Empty),
    "too_long": get_args(TooLong),
}

T5_OPTIONS: dict[str, T5Options] = {
    "wan": T5Options(512, "zero", cleaning="web_text"),
    "ltx": T5Options(128, "cut", attention="all"),
    "mochi": T5Options(256, "cut", empty="masked"),
}
"""By family of denoisers. Sources: the pipelines of diffusers. Wan reads all 512 places, so its padding must be zeros;
the others have a mask, so theirs may be cut. LTX-Video with keyframes reads 256 tokens. The authors of LTX-Video have
"lower" and attention to "words"; those of Mochi mask the empty prompt (`force_zeros_for_empty_prompt` in diffusers)."""


def clean_web_text(text: str) -> str:
    """Text as Wan's captions were cleaned: broken encodings mended (where the package ftfy is installed), twice escaped
    HTML unescaped, runs of white space made one space, none at the ends."""
    if find_spec("ftfy") is not None:
        text = import_module("ftfy").fix_text(text)
    return " ".join(html.unescape(html.unescape(text)).split())
