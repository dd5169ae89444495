"""What verbs tell the user: progress on stderr, results for machines on stdout, and lengths in frames."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from math import floor, inf
from typing import TYPE_CHECKING, Any, TypeVar

from vitascope.core.errors import InputError, MediaError, ShapeError

if TYPE_CHECKING:
    from rich.console import Console

Item = TypeVar("Item")
MAX_FRAMES = 1_000_000


def stderr_console() -> Console:
    """A console on stderr: colours and bars on a terminal, plain lines elsewhere."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def say(line: str) -> None:
    """One plain line on stderr."""
    sys.stderr.write(line + "\n")


def print_json(value: object) -> None:
    """A result on stdout, for machines: one JSON document in ASCII, dataclasses and tensors as plain values.

    Raises MediaError where stdout does not take it (a full disk), BrokenPipeError where nobody reads it any more.
    """
    text = json.dumps(plain(value)) + "\n"
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # What is left in the buffer must not fail once more when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise MediaError(f"the result cannot be written to stdout: {error.strerror}") from error


def track(items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
    """The items, with a bar and the time left while they are worked on; silent where stderr is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = stderr_console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield from bar.track(items, total=total, description=description)


def plain(value: object) -> Any:
    """A value as JSON knows it: dataclasses are objects, tensors and tuples lists, numbers that are not finite null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {entry.name: plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if value - value == 0 else None
    if hasattr(value, "tolist"):
        return plain(value.tolist())  # pyright: ignore[reportAttributeAccessIssue]
    raise InputError(f"a {type(value).__name__} cannot be written as JSON")


def whole_frames(seconds: float, fps: float) -> int:
    """Frames in `seconds` at `fps`; ShapeError names the nearest lengths where that is no whole number from 1 up."""
    count = seconds * fps
    if not (0 < seconds < inf and 0 < fps < inf):
        raise ShapeError(f"the length and the frame rate must be positive and finite, got {seconds} s at {fps} fps")
    if count > MAX_FRAMES:
        raise ShapeError(f"{seconds:g} s at {fps:g} fps are too many frames; at most {MAX_FRAMES}")
    if abs(count - round(count)) > 0.02 or round(count) < 1:
        below = floor(count)
        near = " or ".join(f"{frames / fps:.4g} s ({frames} frames)" for frames in (below, below + 1) if frames > 0)
        raise ShapeError(f"{seconds:g} s is not a whole number of frames at {fps:g} fps; nearest: {near}")
    return round(count)
