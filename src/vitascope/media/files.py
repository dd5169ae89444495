"""Files as such: checks before reading, errors as one line, and writing that leaves no partial file."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from av.error import FFmpegError
from PIL import Image

from vitascope.core.errors import MediaError

_WHAT_DECODERS_RAISE = (FFmpegError, OSError, EOFError, ValueError, SyntaxError, struct.error, IndexError)
"""PyAV's errors, and what Pillow lets out of its decoders on damaged files."""


def check_readable(path: Path | str) -> Path:
    """The path, if it names a file that is there, is not empty and may be read; else MediaError."""
    path = Path(path)
    try:
        if path.is_dir():
            raise MediaError(f"{path} is a folder, not a file")
        with path.open("rb") as file:
            if not file.read(1):
                raise MediaError(f"{path} is empty")
    except FileNotFoundError:
        raise MediaError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise MediaError(f"{path} cannot be read: {reason(error)}") from None
    return path


def check_writable(path: Path | str) -> Path:
    """The path, if a file of that name can be written now; else MediaError. Leaves nothing behind."""
    path = Path(path)
    part = _create_part(path)
    part.unlink(missing_ok=True)
    return path


def reason(error: BaseException) -> str:
    """The cause in one short line, without the path and the number that the system puts before it."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split()).rstrip(".")


@contextlib.contextmanager
def read_errors(path: Path, kind: str) -> Iterator[None]:
    """Turn what decoders raise into MediaError: '<path> cannot be read as <kind>: <reason>'."""
    try:
        yield
    except MediaError:
        raise
    except Image.DecompressionBombError:
        raise MediaError(f"{path} is too large to be read as {kind}") from None
    except _WHAT_DECODERS_RAISE as error:
        raise MediaError(f"{path} cannot be read as {kind}: {reason(error)}") from error


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn what encoders and the system raise while writing into MediaError: '<path> cannot be written: <reason>'."""
    try:
        yield
    except MediaError:
        raise
    except (FFmpegError, OSError) as error:
        if error.errno == errno.EFBIG:
            raise MediaError(f"{path} cannot be written: the file would exceed the size limit set here") from error
        raise MediaError(f"{path} cannot be written: {reason(error)}") from error


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[BinaryIO]:
    """A file open for writing that takes the place of `path` once all of it is on the disk.

    Until then it is a hidden file beside it; on any exception (Ctrl-C too) that is removed and `path` stays as it was.
    Raises MediaError if the folder is missing or not writable, or the disk is full.
    """
    path = Path(path)
    part = _create_part(path)
    try:
        with write_errors(path):
            with part.open("r+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _create_part(path: Path) -> Path:
    """Create the empty hidden file beside `path`, with the permissions that a new file gets here."""
    if path.is_dir():
        raise MediaError(f"{path} is a folder, not a file")
    part = path.with_name(f".{path.name[:64]}.{secrets.token_hex(4)}.part")
    try:
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        if path.exists() and not os.access(path, os.W_OK):
            part.unlink(missing_ok=True)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except FileNotFoundError:
        raise MediaError(f"{path} cannot be written: the folder {path.parent} does not exist") from None
    except (OSError, ValueError) as error:
        raise MediaError(f"{path} cannot be written: {reason(error)}") from None
    return part
