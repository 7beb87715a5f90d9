"""What teachers say of the training clips, in files: kept by clip, checksum and view, never by row number.

The format (`.npz`, no pickle), which anybody may write (docs/distillation.md):

    clip_ids     (n,)               text
    checksums    (n,)               text: SHA-256 of each clip's samples, as in the feature cache
    labels       (C,)               text, in the order of the logits
    logits       (n,C) or (K,n,C)   numbers; (n,C) is of the clean clips, and stands for every view
    views        (K,)               text: names of the views, only with (K,n,C)
    embeddings   (n,E) or (K,n,E)   numbers, optional: for the feature term, of as many axes as logits
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aum_compress.array_files import read_arrays
from aum_compress.data.views import CLEAN
from aum_compress.errors import DataError, join_problems

REQUIRED = ("clip_ids", "checksums", "labels", "logits")


@dataclass(frozen=True)
class TeacherFile:
    """A file of logits that somebody brings as a teacher."""

    path: Path
    sha256: str


@dataclass(frozen=True, eq=False)
class TeacherOutputs:
    """One teacher's answers for n clips in K views."""

    logits: np.ndarray
    """(K,n,C) float32"""
    embeddings: np.ndarray | None
    """(K,n,E) float32, of length 1"""


def save_outputs(
    path: Path,
    clip_ids: Sequence[str],
    checksums: Sequence[str],
    labels: Sequence[str],
    logits: np.ndarray,
    *,
    views: Sequence[str] = (CLEAN,),
    embeddings: np.ndarray | None = None,
) -> None:
    """Writes beside `path` and renames, so that a killed run leaves no half file.

    Args: logits (K,n,C), kept as float32; embeddings (K,n,E), kept at length 1 as float16.
    """
    arrays = {"logits": logits.astype(np.float32)}
    if embeddings is not None:
        arrays["embeddings"] = unit_length(embeddings).astype(np.float16)
    texts = {"clip_ids": clip_ids, "checksums": checksums, "labels": labels, "views": views}
    arrays |= {key: np.array(list(values), dtype=np.str_) for key, values in texts.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    try:
        np.savez(beside, **arrays)
        os.replace(beside, path)
    except OSError as error:
        raise DataError(f"{path}: teacher logits cannot be written: {error.strerror or error}. Free space") from None
    finally:
        beside.unlink(missing_ok=True)


def load_outputs(
    path: Path,
    clip_ids: Sequence[str],
    checksums: Sequence[str],
    labels: Sequence[str],
    views: Sequence[str] = (CLEAN,),
) -> TeacherOutputs:
    """The answers for the given clips and views, in their order.

    Raises:
        DataError: not such a file; arrays of shapes that do not belong together; other labels; a clip or a view that
            has no logits; a clip whose audio is not what the teacher heard; values that are not finite.
    """
    known = _read(path)
    _require_shapes(path, known)
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
    order = np.array([rows[clip_id] for clip_id in clip_ids], dtype=np.int64)
    by_view = _view_numbers(path, known, views)
    logits = _chosen(path, "logits", known["logits"], by_view, order)
    embeddings = known.get("embeddings")
    if embeddings is not None:
        embeddings = unit_length(_chosen(path, "embeddings", embeddings, by_view, order))
    return TeacherOutputs(logits, embeddings)


def average_logits(logits: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over teachers of their logits, of equal shapes."""
    return np.mean(np.stack(logits), axis=0, dtype=np.float64).astype(np.float32)


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """(...,E) float32, each vector divided by its length; one without length stays zero."""
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        return read_arrays(path, REQUIRED, ("views", "embeddings"))
    except ValueError as error:
        raise DataError(
            f"{path}: not a teacher logits file ({error}); wanted an .npz with {', '.join(REQUIRED)}"
        ) from None


def _require_shapes(path: Path, known: dict[str, np.ndarray]) -> None:
    """DataError for arrays that do not belong together, or clips that are named twice."""
    problems = [f"{key}: {known[key].ndim} axes, wanted 1" for key in REQUIRED[:3] if known[key].ndim != 1]
    clips, classes, views = len(known["clip_ids"]), len(known["labels"]), known.get("views")
    for key in ("logits", "embeddings"):
        if (values := known.get(key)) is None:
            continue
        last = classes if key == "logits" else values.shape[-1] if values.ndim else 0
        wanted = (clips, last) if views is None else (len(views), clips, last)
        if values.shape != wanted or not np.issubdtype(values.dtype, np.number):
            problems.append(f"{key}: {values.dtype} {values.shape}, wanted numbers {wanted}")
    if len(known["checksums"]) != clips:
        problems.append(f"checksums: {len(known['checksums'])}, wanted one for each of {clips} clips")
    if len(set(known["clip_ids"].tolist())) < clips:
        problems.append("clip_ids: some clips are named more than once")
    if problems:
        raise DataError(join_problems(f"{path}: arrays do not belong together:", problems))


def _view_numbers(path: Path, known: dict[str, np.ndarray], views: Sequence[str]) -> list[int]:
    """Of each wanted view the place in the file; in one of clean clips, these stand for every view."""
    if known["logits"].ndim == 2:
        return [0] * len(views)
    place = {str(name): number for number, name in enumerate(known["views"])}
    if missing := [f"view {number} ({name})" for number, name in enumerate(views) if name not in place]:
        raise DataError(
            join_problems(
                f"{path}: has no logits for these views; made with another seed, roll or responses? Give logits "
                "(n,C) of the clean clips, or those of the views that this recipe makes:",
                missing,
            )
        )
    return [place[name] for name in views]


def _chosen(path: Path, key: str, values: np.ndarray, by_view: list[int], order: np.ndarray) -> np.ndarray:
    """(K,n,...) float32 of the wanted views and clips."""
    whole = values[None] if values.ndim == 2 else values
    with np.errstate(over="ignore"):  # infinite then, and refused as such
        chosen = np.stack([whole[number][order] for number in by_view]).astype(np.float32)
    if bad := int((~np.isfinite(chosen)).any(axis=(0, 2)).sum()):
        raise DataError(f"{path}: {key} of {bad} clips are NaN or infinite (as float32); wanted finite numbers")
    return chosen
