"""Names of the hub, and what is said when there is nothing to fetch; nothing here needs a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vitascope.core.errors import CapabilityError, CheckpointError
from vitascope.weights import hub


def store(cache: Path, commit: str = "0" * 40) -> Path:
    """A model in the cache of the hub, as huggingface_hub lays it out, under the branch main."""
    model = cache / "models--who--what"
    snapshot = model / "snapshots" / commit
    (snapshot / "transformer").mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (snapshot / "transformer" / "config.json").write_text("{}")
    (model / "refs").mkdir(exist_ok=True)
    (model / "refs" / "main").write_text(commit)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("text", ["who/what", "who/what@main", "who/what@v1.0", "Who-1/wh.at_2@0a1b2c"])
def test_names_of_the_hub(text: str) -> None:
    assert hub.is_hub_name(text)


@pytest.mark.parametrize(
    "text",
    ["pocket", "./who/what", "/who/what", "a/b/c", "who/what@", "who/..", "-a/b", "", "a b/c", "a/b.safetensors"],
)
def test_what_is_no_name_of_the_hub(text: str) -> None:
    assert not hub.is_hub_name(text)


def test_a_path_that_is_there_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "who" / "what").mkdir(parents=True)
    assert not hub.is_hub_name("who/what")


def test_what_is_in_the_cache_is_found_without_a_network(cache: Path) -> None:
    first, second = store(cache, "1" * 40), store(cache, "2" * 40)
    assert hub.fetch("who/what", offline=True).resolve() == second.resolve()
    assert hub.fetch(f"who/what@{'1' * 40}", offline=True).resolve() == first.resolve()


def test_what_is_not_in_the_cache_is_refused_in_one_line(cache: Path) -> None:
    for name in ("who/else", "who/what@v9"):
        with pytest.raises(CheckpointError, match="not in the cache") as caught:
            hub.fetch(name, offline=True)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="OWNER/NAME"):
        hub.fetch("what")


PIPELINE = ("transformer/config.json", "transformer/model.safetensors", "vae/config.json")
CODE = ("run.py", "old.bin", "VAE.pth", "transformer/old.pt")
TOP = ("config.json", "one.safetensors")
DEEP = "steps/100/one.safetensors"


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        # beside a pipeline of diffusers, weights at the top are the same again
        (("model_index.json", *PIPELINE, *TOP), ("model_index.json", *PIPELINE)),
        (("model_index.json", *PIPELINE, "safety/model.safetensors"), ("model_index.json", *PIPELINE)),
        # a model of this package, and one of its authors with a folder beside the weights
        (("pipeline.json", "denoiser.safetensors"), ("pipeline.json", "denoiser.safetensors")),
        ((*TOP, "vae/config.json", "vae/model.safetensors"), (*TOP, "vae/config.json", "vae/model.safetensors")),
        # of a text encoder and the like, the first folder is enough without an index
        ((*PIPELINE, *TOP), PIPELINE),
    ],
)
def test_what_is_fetched(
    there: tuple[str, ...], wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked: list[tuple[Any, ...]] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"], options["local_files_only"]))
        for file in filter_repo_objects(
            (*there, *CODE, DEEP),
            allow_patterns=options["allow_patterns"],
            ignore_patterns=options["ignore_patterns"],
        ):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.fetch("who/what@v1", ("transformer", "vae")) == tmp_path
    assert set(asked) == {("who/what", "v1", False)}
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == set(wanted)
    # without folders all is wanted, but never code and pickles
    hub.fetch("who/what@v1")
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {*there, DEEP}


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(CapabilityError, match=r"vitascope\[checkpoints\]"):
        hub.fetch("who/what")
