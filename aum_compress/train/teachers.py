"""Teacher logits: computed once on clips without augmentation, kept by clip and checksum, never by row number.

File format (`.npz`): `clip_ids` (n,) and `checksums` (n,) text, `logits` (n,C) float32, `labels` (C,) text.
"""

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aum_compress.errors import DataError, join_problems


def save_logits(
    path: Path, clip_ids: Sequence[str], checksums: Sequence[str], logits: np.ndarray, labels: Sequence[str]
) -> None:
    """Writes beside `path` and renames, so that a killed run leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    try:
        np.savez(
            beside,
            clip_ids=np.array(clip_ids, dtype=np.str_),
            checksums=np.array(checksums, dtype=np.str_),
            logits=logits.astype(np.float32),
            labels=np.array(labels, dtype=np.str_),
        )
        os.replace(beside, path)
    except OSError as error:
        raise DataError(f"{path}: teacher logits cannot be written: {error.strerror or error}. Free space") from None
    finally:
        beside.unlink(missing_ok=True)


def load_logits(path: Path, clip_ids: Sequence[str], checksums: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """(n,C) logits for the given clips, in their order.

    Raises:
        DataError: not a logits file; other labels; a clip that has none, or whose audio is not what the teacher heard.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            known = {key: stored[key] for key in ("clip_ids", "checksums", "logits", "labels")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: not a teacher logits file ({error}); wanted an .npz with clip_ids, checksums, logits, labels"
        ) from None
    if list(known["labels"]) != list(labels):
        raise DataError(f"{path}: logits are for labels {known['labels'].tolist()}, wanted {list(labels)}")
    rows = {str(clip_id): row for row, clip_id in enumerate(known["clip_ids"])}
    problems = []
    for clip_id, checksum in zip(clip_ids, checksums, strict=True):
        row = rows.get(clip_id)
        if row is None:
            problems.append(f"{clip_id}: has no logits")
        elif str(known["checksums"][row]) != checksum:
            problems.append(f"{clip_id}: the teacher heard other audio")
    if problems:
        raise DataError(join_problems(f"{path}: does not match the training clips:", problems))
    return known["logits"][[rows[clip_id] for clip_id in clip_ids]]


def average_logits(logits: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over teachers of their (n,C) logits."""
    return np.mean(np.stack(logits), axis=0, dtype=np.float64).astype(np.float32)
