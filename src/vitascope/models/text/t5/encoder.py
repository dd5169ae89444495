"""T5-XXL (LTX-Video, Mochi) and umT5-XXL (Wan): prompts to a vector per token.

B prompts, S tokens, L tokens of a text, D width (4096 for XXL).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitascope.core.errors import CapabilityError, CheckpointError, InputError, PromptError
from vitascope.core.tracks import TextContext
from vitascope.models.offload.offloaded import Layers, Offloaded
from vitascope.models.pretrained import check_quantise, load_pretrained, loading, transformers, variant_there
from vitascope.models.text.cache import CachedTextEncoder, CacheFolder, WhatAfter, model_identity
from vitascope.models.text.rows import TextRow, assemble, check_prompts, warn_of_cut
from vitascope.models.text.t5.options import T5Options
from vitascope.models.text.t5.original import load_original, original_sizes, original_tokens
from vitascope.models.text.t5.streamed import CLASSES, close_layers, open_layers
from vitascope.nn.footprint import is_finite
from vitascope.weights.foreign import ForeignConfig, read_object
from vitascope.weights.sources import open_source

ENCODER, TOKENIZER = "text_encoder", "tokenizer"
"""The folders of a pipeline as diffusers writes it."""
VOCABULARIES = ("tokenizer.json", "spiece.model")
"""One of them holds the words of a tokeniser."""
PROMPTS_AT_ONCE = 8


@dataclass(frozen=True)
class T5Files:
    """Where an encoder and its tokeniser lie. encoder: a folder as transformers writes it, or a file of Wan's authors.

    allow_pickle: whether that file may be a pickle, of which only tensors are read. variant: such as "fp16", part of
    the weights' file names.
    """

    encoder: Path
    tokenizer: Path
    allow_pickle: bool = False
    variant: str = ""

    @staticmethod
    def of(folder: str | Path | T5Files, variant: str = "") -> T5Files:
        """The folders `text_encoder` and `tokenizer` of a pipeline as diffusers writes it, or a folder that holds both
        models together, as transformers does. variant: taken where it is there (`pretrained.variant_there`)."""
        if isinstance(folder, T5Files):
            return folder
        folder = Path(folder)
        encoder, tokenizer = folder, folder
        if (folder / ENCODER).is_dir() or not (folder / "config.json").is_file():
            encoder, tokenizer = folder / ENCODER, folder / TOKENIZER
        return T5Files(encoder, tokenizer, variant=variant_there(encoder, variant))

    @property
    def kind(self) -> str:
        """The type of the encoder, as `transformers` calls it. Raises CheckpointError."""
        if self.encoder.is_file():
            return "umt5"
        return str(read_object(self.encoder / "config.json").get("model_type"))

    @property
    def num_vectors(self) -> int:
        """Tokens that the encoder has a vector for, 0 where that is not said. Raises CheckpointError."""
        if self.encoder.is_file():
            return original_tokens(open_source(self.encoder, allow_pickle=self.allow_pickle))
        path = self.encoder / "config.json"
        return ForeignConfig(read_object(path), str(path)).whole("vocab_size")

    @property
    def width(self) -> int:
        """Of the embeddings. Raises CheckpointError where that cannot be told."""
        return self.sizes[0]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Width of the embeddings, of the feed-forwards inside, and number of heads. Raises CheckpointError."""
        if self.encoder.is_file():
            return original_sizes(open_source(self.encoder, allow_pickle=self.allow_pickle))
        path = self.encoder / "config.json"
        config = ForeignConfig(read_object(path), str(path))
        width, hidden, heads = (config.whole(name) for name in ("d_model", "d_ff", "num_heads"))
        if width < 1:
            raise CheckpointError(f"{path} lacks the width d_model of an encoder")
        return width, hidden, heads


class T5TextEncoder(nn.Module):
    """`core.protocols.TextEncoder`: a T5 or umT5 encoder and a tokeniser of `transformers`, read as `options` say.

    held: the weights of `model` where they are there while it reads prompts only (`streamed.open_layers`).
    """

    def __init__(self, model: nn.Module, tokenizer: Any, options: T5Options, held: Offloaded | None = None) -> None:
        super().__init__()
        self.model, self.tokenizer, self.options, self.held = model, tokenizer, options, held

    @property
    def width(self) -> int:
        """Width of the embeddings."""
        return self._table.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the encoder is."""
        return self._table.device

    @property
    def _table(self) -> Tensor:
        """The vectors of all tokens (V, D), or none (0, D) where they stay in their file; embeddings come in its
        dtype."""
        model: Any = self.model
        return model.get_input_embeddings().weight

    def forward(self, prompts: Sequence[str]) -> TextContext:
        """Embeddings (B, S, D) and mask (B, S). Raises PromptError for prompts that are not text or too long."""
        return assemble(self.encode(prompts), self.options.row_tokens, self.device)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[TextRow]:
        """A row for each prompt, on the encoder's device; see `forward`."""
        if self.held is None:
            return self._encode(prompts)
        try:
            self.held.bring()
            return self._encode(prompts)
        finally:
            close_layers(self.held)

    def _encode(self, prompts: Sequence[str]) -> list[TextRow]:
        check_prompts(prompts)
        texts = [self.options.clean(prompt) for prompt in prompts]
        removed = [self._remove(text) for text in texts]
        rows = [self._empty_row()] * len(texts)
        there = [i for i, text in enumerate(texts) if text or self.options.empty == "encoded"]
        for start in range(0, len(there), PROMPTS_AT_ONCE):
            part = there[start : start + PROMPTS_AT_ONCE]
            for i, (embeddings_LD, num_tokens) in zip(part, self._run([texts[i] for i in part]), strict=True):
                rows[i] = TextRow(embeddings_LD, num_tokens, removed[i])
        return rows

    def _remove(self, text: str) -> str:
        """What of a text does not fit. Raises PromptError or warns, as the options say."""
        ids = self.tokenizer(text, add_special_tokens=True, truncation=False, verbose=False).input_ids
        most = self.options.max_tokens
        if len(ids) <= most:
            return ""
        removed = self.tokenizer.decode(ids[most - 1 : -1])
        if self.options.too_long == "refuse":
            raise PromptError(f"the prompt has {len(ids)} tokens, at most {most} fit; too much is: {removed[:60]!r}")
        warn_of_cut(removed, most)
        return removed

    def _run(self, texts: list[str]) -> list[tuple[Tensor, int]]:
        """Embeddings (L, D) and the number of words of each text."""
        options = self.options
        full = options.padding == "kept" or options.attention == "all"
        tokens = self.tokenizer(
            texts,
            padding="max_length" if full else "longest",
            max_length=options.max_tokens,
            truncation=True,
            padding_side="right",
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask_BS = tokens.attention_mask.to(self.device)
        read_BS = mask_BS if options.attention == "words" else None
        states_BSD = self.model(tokens.input_ids.to(self.device), attention_mask=read_BS).last_hidden_state
        states_BSD = states_BSD.to(self._table.dtype)
        if not is_finite(states_BSD):
            raise CheckpointError("the text encoder gives no finite numbers: its weights may be damaged")
        counts = tokens.attention_mask.sum(1).tolist()
        return [
            (states_SD if options.padding == "kept" else states_SD[:count], count)
            for states_SD, count in zip(states_BSD, counts, strict=True)
        ]

    def _empty_row(self) -> TextRow:
        length = self.options.max_tokens if self.options.padding == "kept" else 0
        return TextRow(torch.zeros(length, self.width, dtype=self._table.dtype, device=self.device), 0)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype == torch.float16:
        raise InputError("T5 overflows in fp16: give torch.bfloat16 or torch.float32")


def load_t5(
    folder: str | Path | T5Files,
    options: T5Options,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    quantise: str | None = None,
    layers: Layers | None = None,
) -> T5TextEncoder:
    """The encoder in a folder that `T5Files.of` knows, such as a snapshot of the hub on this machine.

    quantise: one of `models.pretrained.QUANTISERS`. layers: where they are given, weights are read from the files (not
    mapped, and of the table of tokens rows alone) while prompts are, and nothing is in memory between. Raises
    CheckpointError for what is missing, damaged or another model; CapabilityError for a package that is missing, and
    for quantised layers that come and go; InputError for an unknown `quantise` and for fp16.
    """
    check_quantise(quantise, device)
    _check_dtype(dtype)
    files = T5Files.of(folder)
    tokenizer = _load_tokenizer(files.tokenizer, files.num_vectors)
    if layers is not None:
        if quantise is not None:
            raise CapabilityError("layers that come from files cannot be quantised: leave one of the two away")
        place, pickle = files.encoder, files.allow_pickle
        held = open_layers(place, dtype=dtype, device=device, layers=layers, allow_pickle=pickle, variant=files.variant)
        return T5TextEncoder(held.module, tokenizer, options, held).eval()
    if files.encoder.is_file():
        if quantise is not None:
            raise CapabilityError("an encoder in a file of Wan's authors cannot be quantised: convert it first")
        source = open_source(files.encoder, allow_pickle=files.allow_pickle)
        return T5TextEncoder(load_original(source, dtype=dtype, device=device), tokenizer, options).eval()
    model = load_pretrained(
        files.encoder, CLASSES, dtype=dtype, device=device, quantise=quantise, variant=files.variant
    )
    return T5TextEncoder(model, tokenizer, options).eval()


def open_t5(
    folder: str | Path | T5Files,
    options: T5Options,
    *,
    cache: Path | None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    quantise: str | None = None,
    after: WhatAfter = "release",
    layers: Layers | None = None,
) -> CachedTextEncoder:
    """The encoder of `load_t5`, loaded only for prompts that the folder `cache` (None: no cache) does not know.

    after: `CachedTextEncoder`. layers: `load_t5`; embeddings are the same, so they share the cache. Raises at once what
    can be known without loading: missing folders, wrong names.
    """
    check_quantise(quantise, device)
    _check_dtype(dtype)
    files = T5Files.of(folder)
    if not files.tokenizer.is_dir():
        parent = files.tokenizer.parent
        there = f"{parent} has no folder {files.tokenizer.name}" if parent.is_dir() else f"there is no folder {parent}"
        raise CheckpointError(there)
    parts = (files.encoder, files.tokenizer)
    settings = [str(dtype), str(quantise), *([files.variant] if files.variant else [])]
    return CachedTextEncoder(
        lambda: load_t5(files, options, dtype=dtype, device=device, quantise=quantise, layers=layers),
        options,
        None if cache is None else CacheFolder(cache, lambda: model_identity(parts, cache, *settings)),
        width=files.width,
        device=device,
        after=after,
    )


def _load_tokenizer(folder: Path, num_vectors: int) -> Any:
    """num_vectors: tokens that the encoder knows, 0 where that is not said. Raises CheckpointError."""
    library = transformers("text encoders of public checkpoints")
    if not folder.is_dir():
        raise CheckpointError(f"no folder {TOKENIZER} at {folder}")
    # without them `transformers` makes a tokeniser that knows no words
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise CheckpointError(f"the tokeniser in {folder} has no words: neither {' nor '.join(VOCABULARIES)} is there")
    with loading(f"the tokeniser in {folder}"):
        tokenizer = library.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        count = len(tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"the tokeniser in {folder} lacks its end or padding mark: tokenizer_config.json is missing"
        )
    if num_vectors and count > num_vectors:
        raise CheckpointError(
            f"the tokeniser in {folder} is of another encoder: it has {count} tokens, the encoder {num_vectors}"
        )
    return tokenizer
