"""Files of LoRAs: what they add to which layer, by the names that they use.

Low-rank adaptation: W + scale * up @ down with scale = alpha / rank (Hu et al. 2021). Names end in what PEFT
(`lora_A`, `lora_B`), kohya (`lora_down`, `lora_up`, `alpha`) or diffusers call the factors; files of the Wan community
also hold whole differences: `diff` of a weight, `diff_b` of a bias, `diff_m` of a modulation. Nothing here knows a
model; `lora_fit` does the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from vitascope.core.errors import CheckpointError
from vitascope.weights.lora_settings import LoraSettings, read_settings
from vitascope.weights.sources import PICKLES, SafetensorsSource, TensorSource, open_source

FOLDER_FILES = ("adapter_model", "pytorch_lora_weights")
"""What PEFT and diffusers call the tensors in a folder."""
PEFT_PREFIX = "base_model.model."
PREFIXES = (
    PEFT_PREFIX, "pipe.dit.", "model.diffusion_model.", "diffusion_model.", "transformer.", "module.", "model."
)  # fmt: skip
"""What may stand before the name of a layer, several of them one after the other."""
FLAT_PREFIXES = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")
"""What stands before a name of a layer that has underscores where others have dots."""
_ROLES = {
    "down": r"lora_A(\.[^.]+)?\.weight|lora_A|lora_down(\.weight)?|lora\.down\.weight",
    "up": r"lora_B(\.[^.]+)?\.weight|lora_B|lora_up(\.weight)?|lora\.up\.weight",
    "up_bias": r"lora_B(\.[^.]+)?\.bias|lora_up\.bias",
    "alpha": r"alpha",
    "diff": r"diff",
    "diff_b": r"diff_b",
    "diff_m": r"diff_m",
}
_ENDINGS = {role: re.compile(rf"(?P<layer>.+)\.({ending})") for role, ending in _ROLES.items()}
_OTHER_KINDS = {
    "DoRA": re.compile(r".*\.(dora_scale|lora_magnitude_vector)\b.*"),
    "LoHa": re.compile(r".*\.hada_[wt].*"),
    "LoKr": re.compile(r".*\.lokr_[wt].*"),
    "LoCon with a middle factor": re.compile(r".*\.lora_mid\b.*"),
    "OFT": re.compile(r".*\.b?oft_.*"),
    "LoRA that reshapes weights": re.compile(r".*\.(reshape_weight|set_weight)"),
}
_TEXT_ENCODER = re.compile(r"(base_model\.model\.)?(text_encoders?(_\d+)?[._]|lora_te\d*_|te\d*\.).*")


@dataclass(frozen=True)
class LowRank:
    """`scale` * up @ down, in the dtype of the file. down: (r, *inputs), as the layer's weight; up: (outputs, r)."""

    down: Tensor
    up: Tensor
    scale: float

    def delta(self, device: torch.device) -> Tensor:
        """The whole update (outputs, *inputs) in fp32."""
        product = self.up.to(device).float() @ self.down.to(device).float().flatten(1)
        return (self.scale * product).unflatten(1, self.down.shape[1:])


@dataclass(frozen=True)
class Difference:
    """What is added to a tensor as it is."""

    values: Tensor

    def delta(self, device: torch.device) -> Tensor:
        """The update in fp32."""
        return self.values.to(device).float()


Update = LowRank | Difference


@dataclass(frozen=True, order=True)
class Target:
    """A tensor by the name of its layer, without prefixes: its "weight", its "bias" or its "modulation". flat: the
    name has underscores where there may be dots."""

    layer: str
    leaf: str = "weight"
    flat: bool = False


@dataclass(frozen=True)
class Lora:
    """What a file adds. left_out: how many of its tensors are for the text encoder, which stays as it is. files: that
    it was read from."""

    label: str
    updates: dict[Target, Update]
    left_out: int = 0
    files: tuple[Path, ...] = ()


def read_lora(path: str | Path, *, allow_pickle: bool = False) -> Lora:
    """The LoRA in a file, or in a folder as PEFT or diffusers write it.

    Without settings beside it or in its head, alpha is what the file says for a layer, or else its rank (scale 1). A
    pickle is read only where `allow_pickle` says so. Raises CheckpointError for what is missing, damaged, not a LoRA or
    of a kind that is not known.
    """
    file = _file_of(Path(path))
    source = open_source(file, allow_pickle=allow_pickle)
    try:
        settings, beside = read_settings(file)
        groups, left_out = _sort(source)
        updates: dict[Target, Update] = {}
        for target, roles in groups.items():
            tensors = {role: source.get(name) for role, name in roles.items()}
            called = _called(target.layer, roles)
            for place, update in _updates(target, tensors, settings, called, source.label):
                if place in updates:
                    raise CheckpointError(f"{source.label} adds to the {place.leaf} of {place.layer} twice")
                updates[place] = update
    finally:
        if isinstance(source, SafetensorsSource):
            source.__exit__()
    if not updates:
        what = f"all its {left_out} tensors are for the text encoder" if left_out else "it is empty"
        raise CheckpointError(f"{source.label} adds nothing to a denoiser: {what}")
    return Lora(source.label, updates, left_out, (file, *beside))


def few(names: Iterable[str], most: int = 3) -> str:
    """The first of some names, for a message."""
    listed = list(names)
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")


def _file_of(path: Path) -> Path:
    """The file of tensors: the path itself, or the one in a folder that has a known name or is alone."""
    if not path.is_dir():
        return path
    known = [path / f"{stem}.safetensors" for stem in FOLDER_FILES]
    found = [file for file in known if file.is_file()] or sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"{path} holds several LoRAs, name one: {few(file.name for file in found)}")
    pickles = sorted(file for file in path.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise CheckpointError(f"{path} holds no safetensors but the pickle {pickles[0].name}: convert it")
    raise CheckpointError(f"{path} holds no LoRA: no {' or '.join(file.name for file in known)}")


def _sort(source: TensorSource) -> tuple[dict[Target, dict[str, str]], int]:
    """The names of the file by layer and role, and how many are for the text encoder."""
    groups: dict[Target, dict[str, str]] = {}
    left_out, strange = 0, []
    for name in source.names():
        for kind, pattern in _OTHER_KINDS.items():
            if pattern.fullmatch(name):
                raise CheckpointError(f"{source.label} is of the kind {kind} ({name}); only plain LoRAs are known")
        if _TEXT_ENCODER.fullmatch(name):
            left_out += 1
            continue
        matches = ((role, pattern.fullmatch(name)) for role, pattern in _ENDINGS.items())
        role, match = next(((role, match) for role, match in matches if match), ("", None))
        if match is None:
            strange.append(name)
            continue
        group = groups.setdefault(_target(match["layer"]), {})
        if role in group:
            raise CheckpointError(f"{source.label} has two of a kind for one layer: {group[role]} and {name}")
        group[role] = name
    if strange:
        raise CheckpointError(f"{source.label} holds {len(strange)} tensors that no LoRA has ({few(strange)})")
    return groups, left_out


def _target(name: str) -> Target:
    for prefix in FLAT_PREFIXES:
        if name.startswith(prefix):
            return Target(name.removeprefix(prefix), flat=True)
    while found := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(found)
    return Target(name)


def _called(layer: str, roles: Mapping[str, str]) -> tuple[str, ...]:
    """What a layer may have been called when its LoRA was made, which patterns of settings are for.

    PEFT writes the whole name behind a prefix of its own; of other files the prefix may be the writer's.
    """
    found = _ENDINGS["down"].fullmatch(roles.get("down", ""))
    whole = layer if found is None else found["layer"]
    return (whole.removeprefix(PEFT_PREFIX),) if whole.startswith(PEFT_PREFIX) else (layer, whole)


def _updates(
    target: Target, tensors: Mapping[str, Tensor], settings: LoraSettings | None, called: Sequence[str], label: str
) -> list[tuple[Target, Update]]:
    """What the tensors of one layer, by role, add to it. Raises CheckpointError for those that make no sense."""
    layer, flat = target.layer, target.flat
    for role, tensor in tensors.items():
        if role != "alpha" and not (tensor.is_floating_point() and tensor.float().isfinite().all()):
            raise CheckpointError(f"{label}: {role} of {layer} holds values that are no finite numbers")
    found: list[tuple[Target, Update]] = []
    if "down" in tensors or "up" in tensors:
        pair = _pair(layer, tensors, settings, called, label)
        found.append((target, pair))
        if "up_bias" in tensors:
            found.append((Target(layer, "bias", flat), Difference(tensors["up_bias"].float() * pair.scale)))
    elif lone := [role for role in ("alpha", "up_bias") if role in tensors]:
        raise CheckpointError(f"{label}: {layer} has {lone[0]} without a pair of factors")
    for role, leaf in (("diff", "weight"), ("diff_b", "bias"), ("diff_m", "modulation")):
        if role in tensors:
            found.append((Target(layer, leaf, flat), Difference(tensors[role])))
    return found


def _pair(
    layer: str, tensors: Mapping[str, Tensor], settings: LoraSettings | None, called: Sequence[str], label: str
) -> LowRank:
    missing = [role for role in ("down", "up") if role not in tensors]
    if missing:
        names = {"down": "lora_A (lora_down)", "up": "lora_B (lora_up)"}
        raise CheckpointError(f"{label}: {layer} has half of a pair; {names[missing[0]]} is missing")
    down, up = tensors["down"], tensors["up"]
    if down.ndim < 2 or up.ndim < 2 or up.shape[2:].numel() != 1 or up.shape[1] != len(down) or not len(down):
        shapes = f"{tuple(up.shape)} and {tuple(down.shape)}"
        raise CheckpointError(f"{label}: the factors of {layer} have no rank in common: {shapes}")
    rank, alpha = len(down), None
    if "alpha" in tensors:
        given = tensors["alpha"]
        if given.numel() != 1 or given.is_complex() or not isfinite(float(given)):
            raise CheckpointError(f"{label}: alpha of {layer} is no number: {given.flatten()[:3].tolist()}")
        alpha = float(given)
    if settings is None:
        settings = LoraSettings(rank, float(rank) if alpha is None else alpha)
    return LowRank(down, up.flatten(1), settings.scale(layer, rank, alpha, called))
