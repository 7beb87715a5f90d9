"""Arrays from .npz files that somebody else may have written. Torch-free."""

import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

_BROKEN = (OSError, ValueError, KeyError, EOFError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What numpy and zipfile raise: RuntimeError for a member that is encrypted or, as NotImplementedError, packed in an
unknown way."""


def read_arrays(path: Path, required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """Name -> array, of those that are there; never a pickle.

    Raises:
        ValueError: no .npz file, a damaged one, or one without what is required, in one line.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            names = [*required, *(name for name in optional if name in stored)]
            found = {name: stored[name] for name in names}
    except _BROKEN as error:
        raise ValueError(str(error)) from None
    if strange := [name for name, array in found.items() if not isinstance(array, np.ndarray)]:
        raise ValueError(f"{', '.join(strange)}: not stored as arrays")
    return found
