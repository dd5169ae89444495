"""What the C library does with freed memory."""

from __future__ import annotations

import ctypes
import ctypes.util
import sys

# Numbers of glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_SETTINGS = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 2**29, _ARENA_MAX: 1}


def keep_freed_memory() -> bool:
    """Let freed memory stay with the process, to be handed out again; True where the C library (glibc) could be told.

    By default every large tensor is given back to the system when it is freed, and the next one of its size is mapped
    and cleared page by page: on a CPU a fifth of a training step. To be called before there are threads.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(ctypes.util.find_library("c")).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return all(mallopt(option, value) for option, value in _SETTINGS.items())
