"""The one exception tree of the package.

    VitascopeError                 every error that a caller may want to catch
    ├── InputError                 a value given by the caller cannot be used (also a ValueError)
    │   ├── ShapeError             a size, length or rate does not fit; names the nearest valid ones
    │   ├── PromptError            a prompt is empty, too long or not understood
    │   └── CapabilityError        the model cannot do what the task asks of it
    ├── MediaError                 a picture, sound or video file cannot be read or written
    ├── CheckpointError            weights are missing, damaged or belong to another model
    └── TrainingError              a training run cannot start, go on or resume

A message is one line: what was wrong, then what would be right.
"""

from __future__ import annotations

from collections.abc import Iterable


class VitascopeError(Exception):
    """Base of all errors raised on purpose by this package."""


class InputError(VitascopeError, ValueError):
    """A value given by the caller cannot be used."""


class ShapeError(InputError):
    """A size, length or rate does not fit; the message names the nearest valid ones."""


class PromptError(InputError):
    """A prompt is empty, too long or cannot be read."""


class CapabilityError(InputError):
    """The model cannot do what the task asks of it."""


class MediaError(VitascopeError):
    """A picture, sound or video file cannot be read or written."""


class CheckpointError(VitascopeError):
    """Weights are missing, damaged or belong to another model."""


class TrainingError(VitascopeError):
    """A training run cannot start, go on or resume."""


def choice(name: str, value: str, valid: Iterable[str]) -> str:
    """Return `value` if it is one of `valid`, else raise InputError naming them all."""
    options = tuple(valid)
    if value not in options:
        raise InputError(f"{name} {value!r} is not known; valid values: {', '.join(options)}")
    return value


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch raised this for lack of memory: on a GPU it has a type of its own, on the CPU only a text."""
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "DefaultCPUAllocator" in text)
