"""The tiny model, loaded once."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitascope.tasks.load import load_pipeline
from vitascope.tasks.pipeline import Pipeline


@pytest.fixture(scope="session")
def pipeline(tiny_model: Path) -> Pipeline:
    return load_pipeline(str(tiny_model), "cpu", "fp32")
