"""A pipeline on several processes: every one of them is given the same request and makes the same clip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vitascope.core.errors import choice
from vitascope.core.protocols import KeepsTexts, TextEncoder
from vitascope.core.tracks import TextContext
from vitascope.models.codecs.parallel import share_codec
from vitascope.models.parallel import SharedDenoiser
from vitascope.parallel.ranks import Ranks
from vitascope.parallel.tokens import SHARINGS
from vitascope.tasks.load import Beside, load_pipeline
from vitascope.tasks.pipeline import Pipeline

TENSOR = "tensor"
KINDS = (TENSOR, *SHARINGS)
"""What processes share: the matrices of the denoiser, or its tokens by one of two ways of attending."""


def load_parallel(
    model: str,
    kind: str,
    ranks: Ranks,
    precision: str = "auto",
    beside: Beside | None = None,
    *,
    text_cache: Path | None = None,
) -> Pipeline:
    """`tasks.load.load_pipeline` for the processes of `ranks`, each on its device.

    kind: one of KINDS; by "tensor" a process keeps its part of the denoiser and, of a published one, loads no more.
    Frames are decoded in strips; texts are encoded by the first process. Raises InputError for another kind,
    CapabilityError and ShapeError for a model that cannot be shared so, and CheckpointError.
    """
    divided = ranks if choice("kind of sharing", kind, KINDS) == TENSOR else None
    pipeline = load_pipeline(model, str(ranks.device), precision, beside, text_cache=text_cache, ranks=divided)
    denoiser = pipeline.denoiser if divided else SharedDenoiser(pipeline.denoiser, SHARINGS[kind](ranks))
    encode = SharedKeeper if isinstance(pipeline.text_encoder, KeepsTexts) else SharedTexts
    return replace(
        pipeline,
        denoiser=denoiser,
        video_codec=share_codec(pipeline.video_codec, ranks),
        text_encoder=encode(pipeline.text_encoder, ranks),
    )


class SharedTexts:
    """`core.protocols.TextEncoder` of the first process, which tells the others: a large one is loaded once."""

    def __init__(self, encoder: TextEncoder, ranks: Ranks) -> None:
        self.encoder, self.ranks = encoder, ranks

    def __call__(self, prompts: Sequence[str]) -> TextContext:
        """On every process what the encoder gives or raises on the first."""

        def encode() -> tuple[torch.Tensor, torch.Tensor]:
            text = self.encoder(prompts)
            return text.embeddings.cpu(), text.mask.cpu()

        embeddings, mask = self.ranks.from_first(encode)
        return TextContext(embeddings.to(self.ranks.device), mask.to(self.ranks.device))


class SharedKeeper(SharedTexts):
    """Of an encoder that keeps what it made (`core.protocols.KeepsTexts`)."""

    def fill(self, prompts: Sequence[str]) -> None:
        """The first process fills its cache."""
        keeper = self.encoder
        assert isinstance(keeper, KeepsTexts)
        self.ranks.from_first(lambda: keeper.fill(prompts))

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """In the cache of the first process."""
        keeper = self.encoder
        assert isinstance(keeper, KeepsTexts)
        return self.ranks.from_first(lambda: keeper.missing(prompts))
