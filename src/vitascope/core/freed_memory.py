"""What the C library (glibc) does with freed memory: keeps it, gives it back, or gives it back now.

By default it keeps what was freed, of up to 32 MB each, to hand it out again, and gives larger pieces back at once. To
be chosen before there are threads, once for a process. Other C libraries are left as they are.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import sys

# Numbers of glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -2, -3, -4, -8
_LARGE_BYTES = 1 << 20
_KEEP = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 2**29, _ARENA_MAX: 1}
_RETURN = {_MMAP_THRESHOLD: _LARGE_BYTES, _TRIM_THRESHOLD: _LARGE_BYTES}


def keep_freed_memory() -> bool:
    """Let freed memory stay with the process, to be handed out again; True where the C library could be told.

    By default every large tensor is given back to the system when it is freed, and the next one of its size is mapped
    and cleared page by page: on a CPU a fifth of a training step.
    """
    return _tell(_KEEP)


def return_freed_memory() -> bool:
    """Let every large tensor go back to the system when it is freed; True where the C library could be told.

    What a process holds says little about what it uses without it. Slower by the clearing of fresh pages, so for runs
    that have a limit to keep.
    """
    return _tell(_RETURN)


def release_freed_memory() -> None:
    """Give back at once what the C library holds of freed memory."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _tell(settings: dict[int, int]) -> bool:
    library = _glibc()
    if library is None:
        return False
    told = [library.mallopt(option, value) for option, value in settings.items()]
    return all(told)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    try:
        library = ctypes.CDLL(ctypes.util.find_library("c"))
        return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
    except (OSError, TypeError):
        return None
