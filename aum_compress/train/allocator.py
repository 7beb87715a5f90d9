"""Keeping freed memory in the process while a CPU trains.

glibc's malloc takes every large block (from 128 kB at first, from 32 MB in the end) from the system and gives it back
when it is freed; it gives back the top of its heap too. A training step frees all its activations, so the next step
gets pages that the system has to clear and map anew, one fault for 4 kB. Told to keep what it has, malloc serves each
step from the memory of the one before. Measured by benchmarks/allocator.py.
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Numbers of `mallopt`'s parameters, from glibc's malloc.h."""
TOP_PAD_BYTES = 64 * 2**20
"""How much more than needed the heap grows at a time: address space, which costs memory only once it is written to."""
SETTINGS = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: TOP_PAD_BYTES}
"""No block of its own for a large tensor; the heap's top is never given back."""


def keep_freed_memory() -> bool:
    """Sets this process' malloc so; whether it did. A setting from the environment is left alone.

    Does nothing, and never fails, where malloc is not glibc's: musl, macOS, Windows.
    """
    if not sys.platform.startswith("linux") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    if "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - musl has a mallopt in name only, and not this one
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(parameter, value) == 1 for parameter, value in SETTINGS.items())
