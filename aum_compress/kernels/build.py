"""Compiles the fused scan (scan.c, lanes.h) once per user and machine with the system's C compiler. Torch-free.

Environment: `AUM_NO_KERNEL=1` switches the kernel off, `AUM_CACHE` replaces `~/.cache/aum-compress`, `CC` names the
compiler.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

_log = logging.getLogger(__name__)

_SOURCES = [Path(__file__).with_name(name) for name in ("scan.c", "lanes.h")]
_FLAGS = ["-std=gnu11", "-O3", "-fPIC", "-shared"]  # never -ffast-math: scan.c says why
# Best first; the first set that compiles and loads is kept. Apple's clang has no -fopenmp, an older one for arm no
# -march=native.
_MACHINE_FLAGS = [
    ["-march=native", "-fopenmp"],
    ["-mcpu=native", "-fopenmp"],
    ["-march=native"],
    ["-mcpu=native"],
    ["-fopenmp"],
    [],
]
_COMPILE_SECONDS = 120


class _BuildError(Exception):
    """Why there is no kernel; never leaves this module."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None: silently where switched off, after one logged warning where it cannot be built.

    Safe when several processes call it at once: each compiles beside the cached file and renames into place.
    """
    if os.environ.get("AUM_NO_KERNEL") == "1":
        return None
    try:
        compiler = _compiler()
        path = _cache_dir() / f"scan-{_key(compiler)}.so"
        if path.is_file():
            with suppress(OSError):  # a damaged file is built again
                return _load(path)
        return _build(compiler, path)
    except (_BuildError, OSError, RuntimeError, ValueError) as problem:  # no home folder, CC with an open quote, ...
        _log.warning(
            "The fused CPU scan could not be built: %s. Going on with the loop in torch: same values, several times "
            "slower. To mend it, install a C compiler (gcc or clang) or name one in CC, and see that the folder in "
            "AUM_CACHE (default ~/.cache/aum-compress) can be written; AUM_NO_KERNEL=1 silences this message.",
            problem,
        )
        return None


def _compiler() -> list[str]:
    """The command that starts the C compiler: `CC` when set, else the first of cc, gcc and clang on the path."""
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    raise _BuildError(f"no C compiler found (looked for {named[0] + ', from CC' if named else 'cc, gcc, clang'})")


def _cache_dir() -> Path:
    folder = Path(os.environ.get("AUM_CACHE") or Path.home() / ".cache" / "aum-compress")
    # Code is loaded from here, so a folder made here is the user's alone.
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _key(compiler: list[str]) -> str:
    """Whatever changes the compiled code: sources, flags, the compiler, and the processor behind `native`."""
    parts = [source.read_text() for source in _SOURCES]
    parts += [repr((_FLAGS, _MACHINE_FLAGS, compiler)), _run([*compiler, "--version"]), _cpu()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _cpu() -> str:
    """Processor model with its feature flags: under virtual machines one model name comes with different features."""
    told = [platform.machine(), platform.processor()]
    with suppress(OSError):  # Linux only
        first_core = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
        wanted = ("model name", "flags", "Features", "CPU part")
        told += [line for line in first_core.splitlines() if line.startswith(wanted)]
    return "\n".join(told)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_COMPILE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as problem:
        raise _BuildError(f"`{shlex.join(command)}` did not end within {_COMPILE_SECONDS} s") from problem
    if done.returncode != 0:
        last_words = (done.stderr or done.stdout).strip()[-600:]
        raise _BuildError(f"`{shlex.join(command)}` ended with {done.returncode}: {last_words}")
    return done.stdout


def _build(compiler: list[str], path: Path) -> ctypes.CDLL:
    """Compile beside `path` and rename into place: a process that starts meanwhile sees a whole file or none."""
    with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as scratch:
        candidate = Path(scratch) / path.name
        for machine_flags in _MACHINE_FLAGS:
            try:
                _run([*compiler, *_FLAGS, *machine_flags, str(_SOURCES[0]), "-o", str(candidate)])
                lib = _load(candidate)
            except (_BuildError, OSError) as problem:
                failure = problem  # the plainest flags come last: their complaint is the one that counts
                continue
            os.replace(candidate, path)
            return lib
    raise _BuildError(str(failure))


def _load(path: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path))
    lib.aum_scan_groups.argtypes = [ctypes.c_int64]
    lib.aum_scan_groups.restype = ctypes.c_int64
    lib.aum_scan_scratch.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
    lib.aum_scan_scratch.restype = ctypes.c_int64
    for entry in (lib.aum_scan_forward, lib.aum_scan_backward):
        entry.argtypes = [ctypes.c_void_p]
        entry.restype = None
    return lib
