"""What is said beside the tensors of a LoRA: rank and alpha, for all layers and for some.

`adapter_config.json` of a folder as PEFT writes it, or the same fields in the head of a safetensors file, as diffusers
writes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isclose, sqrt
from pathlib import Path
from reprlib import repr as shortly
from typing import Any

from vitascope.core.errors import CheckpointError
from vitascope.weights.foreign import parse_json, read_object
from vitascope.weights.sources import read_metadata

SETTINGS_FILE = "adapter_config.json"
METADATA_KEY = "lora_adapter_metadata"
_PART = "transformer."
"""What stands before the fields of a denoiser where a file holds several parts of a pipeline."""
_OTHER_KINDS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "layer replication",
}
"""Fields that, when set, make something else of the factors than a sum."""
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the weights of the model as they are."""


@dataclass(frozen=True)
class LoraSettings:
    """rank, alpha: of every layer, unless a pattern says otherwise; a pattern is a regular expression that the name of
    a layer ends with. by_root: the scale is alpha / sqrt(rank) (Kalajdzievski 2023) and not alpha / rank."""

    rank: int
    alpha: float
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    by_root: bool = False
    label: str = SETTINGS_FILE

    def scale(self, layer: str, rank: int, alpha: float | None = None, called: Sequence[str] = ()) -> float:
        """What the factors of a layer, of that rank, are multiplied by. `alpha`: what the file itself says. called: the
        names that patterns are held against, of which one suffices; that of the layer where there are none.

        Raises CheckpointError where the settings speak of another rank or alpha.
        """
        called = called or (layer,)
        said = self.rank_pattern.get(_pattern(self.rank_pattern, called), self.rank)
        if said != rank:
            raise CheckpointError(f"{self.label}: {layer} has rank {rank}, the settings say {said}")
        own = self.alpha_pattern.get(_pattern(self.alpha_pattern, called), self.alpha)
        if alpha is not None and not isclose(alpha, own, rel_tol=2**-7):  # it may have been rounded to bf16
            raise CheckpointError(f"{self.label}: {layer} has alpha {alpha:g}, the settings say {own:g}")
        return own / (sqrt(rank) if self.by_root else rank)


def read_settings(file: Path) -> tuple[LoraSettings | None, list[Path]]:
    """The settings that belong to a file of tensors, if there are any, and the files they were read from.

    Raises CheckpointError where they are damaged, or of another kind of adapter.
    """
    beside = file.with_name(SETTINGS_FILE)
    if file.stem == "adapter_model" and beside.is_file():
        return settings_from(read_object(beside), str(beside)), [beside]
    text = read_metadata(file).get(METADATA_KEY) if file.suffix == ".safetensors" else None
    if text is None:
        return None, []
    label = f"{METADATA_KEY} of {file}"
    try:
        values: Any = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{label} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{label} must hold an object, got {type(values).__name__}")
    own = {key.removeprefix(_PART): value for key, value in values.items() if key.startswith(_PART)}
    own = own or {key: value for key, value in values.items() if "." not in key}
    return (settings_from(own, label) if own else None), []


def settings_from(values: Mapping[str, Any], label: str) -> LoraSettings:
    """From the fields of a `LoraConfig` of PEFT. Raises CheckpointError for other kinds and values that do not fit."""
    kind = str(values.get("peft_type") or "LORA").rpartition(".")[-1]
    others = [name for key, name in _OTHER_KINDS.items() if values.get(key)]
    if kind != "LORA" or others:
        raise CheckpointError(f"{label} is of a {kind if kind != 'LORA' else others[0]}; only plain LoRAs are known")
    start = values.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{label}: init_lora_weights {start!r} changes the model itself; convert it to a plain LoRA with PEFT"
        )
    rank: Any = values.get("r")
    alpha: Any = values.get("lora_alpha")
    ranks, alphas = values.get("rank_pattern") or {}, values.get("alpha_pattern") or {}
    for what, given in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(given, Mapping):
            raise CheckpointError(f"{label}: {what} must be an object, got {given!r}")
    for what, number in (("r", rank), *((f"rank_pattern of {key}", value) for key, value in ranks.items())):
        if type(number) is not int or not 1 <= number < 2**31:
            raise CheckpointError(f"{label}: {what} must be a whole number above 0, got {shortly(number)}")
    for what, number in (("lora_alpha", alpha), *((f"alpha_pattern of {key}", value) for key, value in alphas.items())):
        if type(number) not in (int, float) or not abs(number) < 2**31:
            raise CheckpointError(f"{label}: {what} must be a number, got {shortly(number)}")
    for pattern in (*ranks, *alphas):
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(f"{label}: {pattern!r} is not a pattern of names: {error}") from error
    return LoraSettings(rank, float(alpha), dict(ranks), dict(alphas), bool(values.get("use_rslora")), label)


def _pattern(patterns: Mapping[str, Any], called: Sequence[str]) -> str:
    """The first of `patterns` that a name of a layer ends with, at a dot; else an empty string."""
    return next((key for key in patterns if any(re.match(rf"(.*\.)?({key})$", name) for name in called)), "")
