"""Models of somebody else in files: the files are closed when they have been read."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from vitascope.models.parts import close
from vitascope.weights.sources import Joined, SafetensorsSource, Under, open_source


def test_the_files_of_all_kinds_of_sources_are_closed(tmp_path: Path) -> None:
    files: dict[str, SafetensorsSource] = {}
    for name in ("encoder", "decoder"):
        save_file({"vae.weight": torch.ones(2)}, tmp_path / f"{name}.safetensors")
        source = open_source(tmp_path / f"{name}.safetensors")
        assert isinstance(source, SafetensorsSource)
        files[f"{name}."] = source
    joined = Joined({prefix: Under(source, "vae.") for prefix, source in files.items()})
    for name in joined.names():
        joined.get(name)
    assert all(source._files for source in files.values())
    close(Under(joined, ""))
    assert not any(source._files for source in files.values())
    assert joined.get("decoder.weight").tolist() == [1, 1]  # it opens again
