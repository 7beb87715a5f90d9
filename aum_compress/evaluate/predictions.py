"""Predictions as DCASE Task 1 wants them: `output.csv`. Torch-free."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aum_compress.errors import DataError


def require_new_file(path: Path) -> None:
    """Raises DataError where no file can be: said before minutes of measuring, not after."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name a file for the predictions, such as {path / 'output.csv'}")
    if not path.parent.is_dir():
        raise DataError(f"{path}: there is no folder {path.parent}; make it, or name a file in a folder that exists")


def write_predictions(
    path: Path, filenames: Sequence[str], log_probabilities: np.ndarray, labels: Sequence[str]
) -> int:
    """Writes a row a file, tab-separated: filename, scene_label (the answer), and the probability of each class.

    A file of several clips is answered by their vote: from the mean of their log-probabilities, as `predict` does.

    Args:
        filenames: (n,) of each clip. log_probabilities: (n,C), natural logarithm.

    Returns:
        How many files there are.

    Raises:
        DataError: the file cannot be written; one that was there before is left as it was.
    """
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(filenames):
        rows.setdefault(name, []).append(row)
    lines = ["\t".join(("filename", "scene_label", *labels))]
    for name, clips in rows.items():
        vote = np.exp(log_probabilities[clips].mean(0, dtype=np.float64))
        vote /= vote.sum()
        lines.append("\t".join((name, labels[int(vote.argmax())], *(f"{share:.8g}" for share in vote))))
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written: {error.strerror or error}; name a file in a folder that exists"
        ) from None
    finally:
        beside.unlink(missing_ok=True)
    return len(rows)
