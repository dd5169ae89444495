"""Models by the name they have on the Hugging Face hub: fetched once, kept in its cache, found there without a network.

Only weights as safetensors, configurations and tokenisers are fetched: never code, never pickles.
"""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vitascope.core.errors import CapabilityError, CheckpointError

HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
"""OWNER/NAME or OWNER/NAME@REVISION, with a branch, a tag or a commit."""
_FILES = (".safetensors", ".json", ".pth", ".pt", ".bin", ".ckpt", ".gguf")
"""What ends so is a file that is not there."""
FETCHED = ("*.json", "*.safetensors", "*.model", "*.txt")
INDEX = "model_index.json"
"""At the top of a pipeline as diffusers writes it."""
_DEEPER = "*/*.safetensors"
"""Weights that are not at the top."""


def is_hub_name(text: str) -> bool:
    """Whether a text may be the name of a model on the hub, which a path that is there never is."""
    return HUB_NAME.fullmatch(text) is not None and not text.endswith(_FILES) and not Path(text).exists()


def fetch(text: str, folders: tuple[str, ...] = (), *, offline: bool = False) -> Path:
    """The folder of a model of the hub on this machine, by OWNER/NAME[@REVISION].

    folders: of a pipeline as diffusers writes it that are wanted; all files unless given. Weights at the top of a
    repository are fetched where it is no such pipeline (no model_index.json, nor the first of the folders): there they
    are the model, of this package, of its authors, or one part; beside a pipeline they are the same weights again.
    offline: only what is in the cache already, as the variable HF_HUB_OFFLINE=1 of `huggingface_hub` also says. Raises
    CapabilityError without that package, CheckpointError for a model or revision that is not there or cannot be
    reached.
    """
    match = HUB_NAME.fullmatch(text)
    if match is None:
        raise CheckpointError(f"{text!r} is not the name of a model on the hub: OWNER/NAME or OWNER/NAME@REVISION")
    if find_spec("huggingface_hub") is None:
        raise CapabilityError("models of the hub need huggingface_hub: install vitascope[checkpoints]")
    hub: Any = import_module("huggingface_hub")
    errors: Any = import_module("huggingface_hub.errors")

    def snapshot(*patterns: str, ignored: tuple[str, ...] = ()) -> Path:
        return Path(
            hub.snapshot_download(
                match["name"],
                revision=match["revision"],
                allow_patterns=list(patterns),
                ignore_patterns=list(ignored),
                local_files_only=offline,
            )
        )

    try:
        if not folders:
            return snapshot(*FETCHED)
        found = snapshot(INDEX, *(f"{folder}/{kind}" for folder in folders for kind in FETCHED))
        if not (found / INDEX).is_file() and not (found / folders[0]).is_dir():
            # a pattern's * matches slashes too
            found = snapshot(*FETCHED, ignored=(_DEEPER,))
        return found
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"there is no folder {text}, and as a model of the hub it is not in the cache, nor can the hub be reached"
        ) from error
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{text} asks for permission: accept its terms on the hub and log in") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        what = "that revision is not" if isinstance(error, errors.RevisionNotFoundError) else "it is not"
        raise CheckpointError(f"there is no folder {text}, and {what} on the hub, or not for this account") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, ValueError) as error:
        raise CheckpointError(f"{text} cannot be fetched: {' '.join(str(error).split())[:200]}") from error
