"""Encoders that are not ours, loaded by `transformers` from a folder on this machine.

Only safetensors are read, no code of a checkpoint is run and nothing is fetched. `transformers` is an optional
dependency, imported when a model is loaded.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitascope.core.errors import CapabilityError, CheckpointError, VitascopeError, choice, is_out_of_memory
from vitascope.models.parts import close
from vitascope.weights.foreign import read_object
from vitascope.weights.sources import TensorSource, open_source
from vitascope.weights.streaming import check_kind

_UNUSED = re.compile(r"decoder\.|lm_head\.|visual_projection\.|.*\.position_ids$")
"""Weights that lie beside an encoder's in checkpoints of the whole model, and that an encoder has no use for."""


@dataclass(frozen=True)
class Quantiser:
    """How `transformers` stores matrices in fewer bits: the packages it needs, and its setting for a dtype.

    gpu_only: on a CPU the package is not used, as it may fetch code for it.
    """

    packages: tuple[str, ...]
    setting: Callable[[torch.dtype], Any]
    gpu_only: bool = False


def _bits_and_bytes(**fixed: Any) -> Callable[[torch.dtype], Any]:
    def setting(dtype: torch.dtype) -> Any:
        extra = {"bnb_4bit_compute_dtype": dtype} if "load_in_4bit" in fixed else {}
        return transformers("weights in 8 or 4 bits").BitsAndBytesConfig(**fixed, **extra)

    return setting


def _torchao(name: str) -> Callable[[torch.dtype], Any]:
    def setting(dtype: torch.dtype) -> Any:
        kind = getattr(import_module("torchao.quantization"), name)
        return transformers("weights in 8 bits").TorchAoConfig(kind())

    return setting


QUANTISERS: dict[str, Quantiser] = {
    "bnb_int8": Quantiser(("bitsandbytes", "accelerate"), _bits_and_bytes(load_in_8bit=True)),
    "bnb_nf4": Quantiser(
        ("bitsandbytes", "accelerate"), _bits_and_bytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"), gpu_only=True
    ),
    "torchao_int8": Quantiser(("torchao", "accelerate"), _torchao("Int8WeightOnlyConfig")),
    "torchao_fp8": Quantiser(("torchao", "accelerate"), _torchao("Float8WeightOnlyConfig")),
}
"""The valid values of `quantise`."""


def transformers(purpose: str) -> Any:
    """The package `transformers`. Raises CapabilityError, naming the extra to install, where it is missing."""
    try:
        return import_module("transformers")
    except ImportError as error:
        raise CapabilityError(
            f"{purpose} need the package transformers: pip install '.[checkpoints]' ({_one_line(error)})"
        ) from error


def import_pretrained(classes: Mapping[str, str]) -> None:
    """Import the code of models, by their names in `transformers` (the values). Raises CapabilityError without it."""
    library = transformers("encoders of public models")
    for name in classes.values():
        getattr(library, name)


def is_unused(name: str) -> bool:
    """Whether a weight of a checkpoint of the whole model is none of its encoder's."""
    return _UNUSED.match(name) is not None


def check_quantise(quantise: str | None, device: torch.device | str) -> None:
    """Raise InputError for a name that is not known, CapabilityError where a package or GPU it needs is missing."""
    if quantise is None:
        return
    quantiser = QUANTISERS[choice("quantise", quantise, QUANTISERS)]
    if quantiser.gpu_only and torch.device(device).type == "cpu":
        raise CapabilityError(f"quantise {quantise!r} needs a GPU; the device is {str(device)!r}")
    for package in quantiser.packages:
        if find_spec(package) is None:
            raise CapabilityError(f"quantise {quantise!r} needs the package {package}: pip install {package}")


@contextmanager
def loading(what: str) -> Iterator[None]:
    """A block that has `transformers` read a folder: it says nothing (its bars and tables stand between our lines), and
    whatever it raises on a damaged folder becomes one CheckpointError about `what`."""
    logging = transformers("text encoders of public checkpoints").logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (VitascopeError, MemoryError):
        raise
    except Exception as error:  # tokenizers raises no narrower class for a damaged file
        if is_out_of_memory(error):
            raise  # the files are not to blame
        raise CheckpointError(f"{what} cannot be loaded: {_one_line(error)[:200]}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def check_encoder(folder: Path, source: TensorSource) -> None:
    """Raise CheckpointError for weights of an encoder that were quantised (`transformers` would take the whole numbers
    for the weights themselves), and for more layers than there are tensors (it would build them without end)."""
    names = source.names()
    for name in names:
        if not is_unused(name):
            check_kind(name, source.info(name).dtype, torch.float32, source.label)
    values = read_object(folder / "config.json")
    for key in ("num_layers", "num_hidden_layers"):
        if isinstance(values.get(key), int) and values[key] > len(names):
            raise CheckpointError(f"{folder} speaks of {key} {values[key]}, the weights have {len(names)} tensors")


def encoder_class(folder: Path, classes: Mapping[str, str]) -> Any:
    """The class in `transformers` of the model in a folder, of those in `classes` by the `model_type` of config.json.
    Raises CheckpointError for another model, CapabilityError without the package."""
    kind = str(read_object(folder / "config.json").get("model_type"))
    if kind not in classes:
        raise CheckpointError(f"{folder} holds a model of type {kind!r}; valid types: {', '.join(classes)}")
    return getattr(transformers(f"models of type {kind!r}"), classes[kind])


def variant_there(folder: Path, variant: str) -> str:
    """`variant` where the folder has weights of that name, such as model.fp16.safetensors, else "" for those without
    one: encoders are often saved in one variant alone, beside parts with several."""
    return variant if variant and any(folder.glob(f"model*.{variant}[.-]*")) else ""


def load_pretrained(
    folder: str | Path,
    classes: Mapping[str, str],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quantise: str | None = None,
    variant: str = "",
) -> nn.Module:
    """The model in `folder` (config.json and safetensors, whole or in shards), in eval mode and without gradients.

    classes: names in `transformers` by the `model_type` of config.json. variant: see `variant_there`. quantise: one of
    QUANTISERS, which then stay on the device they were loaded to. Raises CheckpointError when files are missing,
    damaged or of another model.
    """
    folder = Path(folder)
    check_quantise(quantise, device)
    cls = encoder_class(folder, classes)
    source = open_source(folder, variant=variant)  # says in one line which shard is missing, and if there is no other
    check_encoder(folder, source)
    close(source)
    settings: dict[str, Any] = {}
    if quantise is not None:
        settings = {"quantization_config": QUANTISERS[quantise].setting(dtype), "device_map": {"": str(device)}}
    with loading(str(folder)):
        model, report = cls.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            variant=variant or None,
            local_files_only=True,
            attn_implementation="sdpa",  # never what a configuration may ask to be fetched
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report, and refused by their names
            **settings,
        )
    _check_report(folder, report)
    return (model if quantise else model.to(device)).eval().requires_grad_(False)


def _check_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Raise CheckpointError for weights that were missing, left over or of another shape."""
    left_over = [name for name in report.get("unexpected_keys", ()) if not is_unused(name)]
    mis_shaped = [str(key[0]) if isinstance(key, tuple) else str(key) for key in report.get("mismatched_keys", ())]
    for what, names in (
        ("missing", sorted(report.get("missing_keys", ()))),
        ("of another model", sorted(left_over)),
        ("of another shape", sorted(mis_shaped)),
    ):
        if names:
            rest = ", ..." if len(names) > 3 else ""
            raise CheckpointError(f"{folder}: {len(names)} weights {what} ({', '.join(names[:3])}{rest})")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
