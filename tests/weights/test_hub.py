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


def test_only_weights_and_descriptions_are_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.fetch("who/what@v1", ("transformer",)) == tmp_path
    assert (asked["name"], asked["revision"], asked["local_files_only"]) == ("who/what", "v1", False)
    patterns = asked["allow_patterns"]
    assert "transformer/*.safetensors" in patterns
    assert not any(pattern.endswith((".py", ".bin", ".pt", ".pth", "*")) for pattern in patterns)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(CapabilityError, match=r"vitascope\[checkpoints\]"):
        hub.fetch("who/what")
