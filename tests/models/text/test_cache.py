"""The cache of embeddings: what is encoded again and what is not, damage, many writers, and memory given back."""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vitascope.core.errors import CheckpointError, InputError, PromptError
from vitascope.core.protocols import TextEncoder
from vitascope.core.tracks import TextContext
from vitascope.models.text.cache import CachedTextEncoder, CacheFolder, WhatAfter, model_identity, user_cache_folder
from vitascope.models.text.rows import TextRow, assemble, warn_of_cut
from vitascope.models.text.t5.encoder import T5TextEncoder, load_t5, open_t5
from vitascope.models.text.t5.options import T5_OPTIONS, T5Options

OPTIONS = T5Options(8, "zero", cleaning="web_text")
WIDTH = 4


class Letters:
    """An encoder of a vector per letter that writes down what it was asked."""

    def __init__(self, asked: list[list[str]], options: T5Options) -> None:
        self.asked, self.options = asked, options

    def encode(self, prompts: Sequence[str]) -> list[TextRow]:
        self.asked.append(list(prompts))
        rows = []
        for text in map(self.options.clean, prompts):
            kept, removed = text[: self.options.max_tokens], text[self.options.max_tokens :]
            values = torch.tensor([[ord(letter) + k for k in range(WIDTH)] for letter in kept], dtype=torch.bfloat16)
            if removed:
                warn_of_cut(removed, self.options.max_tokens)
            rows.append(TextRow(values.reshape(-1, WIDTH), len(kept), removed))
        return rows


class Desk:
    """A cached encoder over a folder, with what was asked of it and how often it was loaded."""

    def __init__(
        self,
        folder: Path | None,
        options: T5Options = OPTIONS,
        identity: str = "letters",
        after: WhatAfter = "release",
    ) -> None:
        self.asked: list[list[str]] = []
        self.loads: list[weakref.ref[Letters]] = []
        self.options = options
        cache = None if folder is None else CacheFolder(folder, lambda: identity)
        self.encoder = CachedTextEncoder(self._load, options, cache, width=WIDTH, after=after)

    def _load(self) -> Letters:
        letters = Letters(self.asked, self.options)
        self.loads.append(weakref.ref(letters))
        return letters

    def expected(self, prompts: Sequence[str]) -> TextContext:
        return assemble(Letters([], self.options).encode(prompts), self.options.row_tokens, "cpu")


def check(desk: Desk, prompts: Sequence[str]) -> None:
    """The embeddings of `prompts` are those of the encoder itself."""
    found, expected = desk.encoder(prompts), desk.expected(prompts)
    assert found.embeddings.dtype == expected.embeddings.dtype
    assert torch.equal(found.embeddings, expected.embeddings)
    assert torch.equal(found.mask, expected.mask)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*"))


def test_only_what_is_missing_is_encoded(tmp_path: Path) -> None:
    first = Desk(tmp_path)
    encoder: TextEncoder = first.encoder
    assert encoder(["red"]).embeddings.shape == (1, 8, WIDTH)
    check(first, ["red", "wind", "", "wind"])
    assert first.asked == [["red"], ["wind", ""]]
    second = Desk(tmp_path)
    check(second, ["", "red", "wind", "red", " wind&amp;#32;"])  # cleaned, the last is "wind"
    assert (second.asked, second.loads) == ([], [])
    assert len(entries(tmp_path)) == 3


def test_what_is_missing_is_told_without_loading(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    assert desk.encoder.missing(["one", "two", "one"]) == ["one", "two"]
    desk.encoder.fill(["two"])
    assert desk.encoder.missing(["one", "two"]) == ["one"]
    assert len(desk.loads) == 1
    assert Desk(None).encoder.missing(["one", "one"]) == ["one"]
    with pytest.raises(PromptError):
        desk.encoder.missing([])


def test_another_encoder_option_or_prompt_is_another_entry(tmp_path: Path) -> None:
    check(Desk(tmp_path), ["red"])
    others = [
        Desk(tmp_path, identity="other letters"),
        *(Desk(tmp_path, replace(OPTIONS, **change)) for change in ({"max_tokens": 9}, {"padding": "cut"})),
        Desk(tmp_path, replace(OPTIONS, cleaning="as_is")),
    ]
    for number, desk in enumerate(others, start=2):
        check(desk, ["red"])
        assert desk.asked == [["red"]]
        assert len(entries(tmp_path)) == number
    check(others[0], ["Red"])
    assert others[0].asked == [["red"], ["Red"]]


def test_the_encoder_is_released_or_kept(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.encoder.fill(["red", "wind"])
    assert not desk.encoder.loaded
    assert desk.loads[0]() is None
    check(desk, ["wind", "red"])
    assert len(desk.loads) == 1
    keeping = Desk(tmp_path / "other", after="keep")
    check(keeping, ["red"])
    check(keeping, ["wind"])
    assert len(keeping.loads) == 1
    assert keeping.encoder.loaded
    keeping.encoder.release()
    keeping.encoder.release()
    assert keeping.loads[0]() is None
    check(keeping, ["red ball"])
    assert len(keeping.loads) == 2
    with pytest.raises(InputError, match="after 'forget' is not known"):
        Desk(None, after="forget")  # type: ignore[arg-type]


def test_an_encoder_that_fails_is_released_and_nothing_is_kept(tmp_path: Path) -> None:
    desk = Desk(tmp_path, replace(OPTIONS, max_tokens=3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="not read: ' ball'"):
            desk.encoder(["red ball"])
    assert not desk.encoder.loaded
    assert entries(tmp_path) == []
    for wrong in ([], "red", [3]):
        with pytest.raises(PromptError, match="sequence of strings"):
            desk.encoder(wrong)  # type: ignore[arg-type]


def test_a_prompt_that_was_cut_says_so_every_time(tmp_path: Path) -> None:
    for desk in (Desk(tmp_path), Desk(tmp_path)):
        with pytest.warns(UserWarning, match="cut to 8 tokens; not read: 'll bounces'"):
            text = desk.encoder(["a red ball bounces"])
        assert text.mask.all()
    assert desk.loads == []


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a bit": flip,
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "nothing": lambda path: path.write_bytes(b""),
    "no safetensors": lambda path: path.write_text("embeddings"),
    "words fewer": lambda path: path.write_bytes(path.read_bytes().replace(rb"num_tokens\": 4", rb"num_tokens\": 3")),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_entry_is_made_again(what: str, tmp_path: Path) -> None:
    check(Desk(tmp_path), ["wind", "red"])
    path = next(path for path in entries(tmp_path) if rb"num_tokens\": 4" in path.read_bytes())
    good = path.read_bytes()
    DAMAGE[what](path)
    assert path.read_bytes() != good
    desk = Desk(tmp_path)
    check(desk, ["wind", "red"])
    assert desk.asked == [["wind"]]
    assert path.read_bytes() == good


def test_an_entry_under_another_name_is_not_taken(tmp_path: Path) -> None:
    check(Desk(tmp_path), ["wind", "rain"])
    first, second = entries(tmp_path)
    second.write_bytes(first.read_bytes())
    desk = Desk(tmp_path)
    check(desk, ["wind", "rain"])
    assert len(desk.asked) == 1


def test_without_a_cache_every_call_encodes() -> None:
    desk = Desk(None)
    check(desk, ["red", "red"])
    check(desk, ["red"])
    assert len(desk.loads) == 2


def test_a_disk_that_takes_nothing_is_said_and_does_no_harm(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("not a folder")
    desk = Desk(place)
    with pytest.warns(UserWarning, match="embeddings of a prompt are not kept: cannot write"):
        check(desk, ["red"])


def test_many_writers_of_one_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    prompts = ["red", "wind", "ball", "a", "b", "c"]
    desks = [Desk(tmp_path) for _ in range(6)]
    start = threading.Barrier(len(desks) * 2)

    def work(number: int) -> None:
        start.wait()
        for prompt in prompts:
            check(desks[number % len(desks)], [prompt])  # each encoder is shared by two threads

    with ThreadPoolExecutor(len(desks) * 2) as pool:
        list(pool.map(work, range(len(desks) * 2)))
    assert len(entries(tmp_path)) == len(prompts)
    for desk in desks:
        asked = [prompt for prompts in desk.asked for prompt in prompts]
        assert len(asked) == len(set(asked))
    again = Desk(tmp_path)
    check(again, prompts)
    assert again.asked == []


def test_identity_follows_content_and_settings(tmp_path: Path) -> None:
    folder, memory = tmp_path / "encoder", tmp_path / "memory"
    folder.mkdir()
    large = folder / "model.safetensors"
    large.write_bytes(bytes(3 << 20))
    (folder / "config.json").write_text("{}")
    first = model_identity([folder], memory, "bf16")
    assert model_identity([folder], memory, "bf16") == model_identity([folder], tmp_path / "new", "bf16") == first
    assert model_identity([folder], memory, "fp32") != first
    (folder / "README.md").write_text("does not count")
    assert model_identity([folder], memory, "bf16") == first
    (notes,) = (memory / "files").iterdir()
    notes.write_text("{")  # damaged: read through again
    assert model_identity([folder], memory, "bf16") == first
    large.write_bytes(bytes((3 << 20) - 1) + b"1")
    changed = model_identity([folder], memory, "bf16")
    assert changed != first
    (folder / "tokenizer.json").write_text("{}")
    assert model_identity([folder], memory, "bf16") not in (first, changed)
    with pytest.raises(CheckpointError, match="no file or folder at"):
        model_identity([tmp_path / "none"], memory)


def test_large_files_are_read_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(2 << 20))
    first = model_identity([tmp_path], tmp_path / "memory")

    def never(path: Path) -> str:
        raise AssertionError(path)

    monkeypatch.setattr("vitascope.models.text.cache.file_digest", never)
    assert model_identity([tmp_path], tmp_path / "memory") == first


def test_the_folder_of_a_user() -> None:
    assert user_cache_folder({"XDG_CACHE_HOME": "/var/caches"}) == Path("/var/caches/vitascope/text")
    for environment in ({}, {"XDG_CACHE_HOME": ""}, {"XDG_CACHE_HOME": "relative"}):
        assert user_cache_folder(environment) == Path.home() / ".cache" / "vitascope" / "text"


def test_t5_from_the_cache_is_t5(text_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, options, prompts = text_folders / "umt5", T5_OPTIONS["mochi"], ["a red ball", ""]
    expected = load_t5(folder, options)(prompts)
    models: list[weakref.ref[object]] = []

    def load(*given: Any, **settings: Any) -> T5TextEncoder:
        loaded = load_t5(*given, **settings)
        models.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr("vitascope.models.text.t5.encoder.load_t5", load)
    encoder = open_t5(folder, options, cache=tmp_path)
    assert encoder.width == 16
    made = encoder(prompts)
    assert [model() for model in models] == [None]  # its memory is free again
    monkeypatch.setitem(sys.modules, "transformers", None)  # what is known needs no encoder
    kept = open_t5(folder, options, cache=tmp_path)(prompts)
    for text in (made, kept):
        assert torch.equal(text.embeddings, expected.embeddings)
        assert torch.equal(text.mask, expected.mask)
    with pytest.raises(InputError, match="need the package transformers"):
        open_t5(folder, options, cache=tmp_path, dtype=torch.float32)(prompts)  # other numbers: not the same entry
