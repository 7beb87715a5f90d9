"""Audio decoded once: features or waveforms of all clips in one memory-mapped file, so that epochs read numbers.

    <cache_dir>/<key>/clips.npy     (n,F,T) features or (n,S) waveforms, float32; rows of rejected clips are left empty
    <cache_dir>/<key>/index.json    clip ids and checksums by row, bad files, SHA-256 of clips.npy

The key covers the clips, size and time stamp of their files, the front-end, and the source of the code that computes
features. An entry is built beside its place under a lock and renamed into it; one that was altered is built again.
Torch-free.
"""

import errno
import hashlib
import inspect
import json
import logging
import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from filelock import FileLock
from threadpoolctl import threadpool_limits

from aum_compress.audio import front_ends, kaldi, mel, reading, resample
from aum_compress.audio.config import FrontEnd
from aum_compress.data.clips import Clip, DataIndex
from aum_compress.data.config import cache_root
from aum_compress.data.examine import BadFile, Progress, examine_files, stop_or_skip
from aum_compress.errors import DataError

What = Literal["logmel", "waveform"]

_STATISTICS_CLIPS = 500
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class CachedClips:
    """Clips whose audio is at hand: `cached[i:j]` and `cached[indices]` are copies of it, `len(cached)` counts them."""

    clips: tuple[Clip, ...]
    """The clips kept: those of bad files, and windows without sound, are not among them."""
    checksums: tuple[str, ...]
    """SHA-256 of the audio of each clip, at its file's own rate."""
    rows: np.ndarray
    """(n,) int64: the row of each clip in the file."""
    path: Path
    """clips.npy."""
    front_end: FrontEnd
    what: What

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, indices: slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """(B,F,T) features, not normalised, or (B,S) waveforms; float32."""
        # Opened at each use, so that a copy sent to another process carries a path, not gigabytes
        return np.load(self.path, mmap_mode="r")[self.rows[indices]]

    def only(self, clips: Sequence[Clip]) -> "CachedClips":
        """These clips alone, in their order; those that were not kept are passed over."""
        position = {clip.clip_id: k for k, clip in enumerate(self.clips)}
        kept = [clip for clip in clips if clip.clip_id in position]
        positions = [position[clip.clip_id] for clip in kept]
        checksums = tuple(self.checksums[k] for k in positions)
        rows = self.rows[np.array(positions, dtype=np.int64)]
        return replace(self, clips=tuple(kept), checksums=checksums, rows=rows)


@dataclass(frozen=True, eq=False)
class CachedParts:
    """A whole data set at hand."""

    index: DataIndex
    """Of the clips kept."""
    train: CachedClips
    validation: CachedClips
    test: CachedClips


def cache_index(
    index: DataIndex,
    front_end: FrontEnd,
    *,
    what: What = "logmel",
    on_bad_files: Literal["stop", "skip"] = "stop",
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> CachedParts:
    """All parts of a data set from one cache entry, whatever way it is cut into parts; see `cache_clips`.

    Raises DataError also when skipping bad files leaves a class or a part without clips.
    """
    cached = cache_clips(
        index.train + index.validation + index.test,
        front_end,
        index.clip_seconds,
        shortest_seconds=index.shortest_seconds,
        what=what,
        on_bad_files=on_bad_files,
        cache_dir=cache_dir,
        progress=progress,
    )
    train, validation, test = (cached.only(part) for part in (index.train, index.validation, index.test))
    kept = replace(index, train=train.clips, validation=validation.clips, test=test.clips)
    return CachedParts(kept.validate(), train, validation, test)


def cache_clips(
    clips: Sequence[Clip],
    front_end: FrontEnd,
    clip_seconds: float,
    *,
    shortest_seconds: float = 0.0,
    what: What = "logmel",
    on_bad_files: Literal["stop", "skip"] = "stop",
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> CachedClips:
    """The clips' features (F,T) or resampled waveforms (S,), read from the cache or computed once.

    `progress` is called while an entry is built. A file shorter than `shortest_seconds` is a bad file.

    Raises DataError that names every bad file when `on_bad_files` is `stop`, or when the cache cannot be written.
    """
    ordered = sorted(clips, key=lambda clip: clip.clip_id)
    folder = cache_dir if cache_dir is not None else cache_root() / "features"
    key = _key(ordered, front_end, clip_seconds, shortest_seconds, what)
    entry = folder / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{key}.lock"):
            record = read_entry(entry)
            if record is None:
                _build(entry, ordered, front_end, clip_seconds, shortest_seconds, what, progress)
                record = json.loads((entry / "index.json").read_bytes())["record"]
    except OSError as error:
        raise cannot_write(folder, error, _bytes_wanted(len(ordered), front_end, clip_seconds, what)) from error

    bad = [BadFile(**file) for file in record["bad_files"]]
    stop_or_skip(bad, len({clip.filename for clip in ordered}), on_bad_files)
    if silent := record["silent_windows"]:
        _logger.info("%d windows without sound are left out", silent)
    checksums = record["checksums"]
    rows = {clip.clip_id: row for row, clip in enumerate(ordered)}
    kept = [clip for clip in clips if clip.clip_id in checksums]
    return CachedClips(
        clips=tuple(kept),
        checksums=tuple(checksums[clip.clip_id] for clip in kept),
        rows=np.array([rows[clip.clip_id] for clip in kept], dtype=np.int64),
        path=entry / "clips.npy",
        front_end=front_end,
        what=what,
    )


def feature_statistics(cached: CachedClips) -> tuple[float, float]:
    """What the features are normalised with, (x - mean) / std; give it the training part.

    `std` is the standard deviation of all values, twice that for kaldi's features, as AuM has it. Of cached waveforms,
    at most 500 evenly spaced ones are transformed.
    """
    n = len(cached)
    if cached.what == "waveform":
        picked = np.unique(np.linspace(0, n - 1, min(n, _STATISTICS_CLIPS)).astype(np.int64))
    else:
        picked = np.arange(n)
    count, total, squares = 0, 0.0, 0.0
    for block in np.array_split(picked, -(-len(picked) // 128)):
        values = cached[block]
        if cached.what == "waveform":
            with threadpool_limits(1, "blas"):  # as in data/examine.py
                values = front_ends.features(values, cached.front_end.model_dump())
        count += values.size
        total += values.sum(dtype=np.float64)
        squares += np.square(values, dtype=np.float64).sum()
    mean = total / count
    deviation = max(squares / count - mean**2, 0.0) ** 0.5
    return float(mean), float(cached.front_end.deviations * deviation)


def _shape(n: int, front_end: FrontEnd, clip_seconds: float, what: What) -> tuple[int, ...]:
    if what == "waveform":
        return (n, front_end.clip_samples(clip_seconds))
    return (n, front_end.n_mels, front_end.n_frames(clip_seconds))


def _bytes_wanted(n: int, front_end: FrontEnd, clip_seconds: float, what: What) -> int:
    return 4 * int(np.prod(_shape(n, front_end, clip_seconds, what)))


def _key(clips: Sequence[Clip], front_end: FrontEnd, clip_seconds: float, shortest_seconds: float, what: What) -> str:
    files = {}
    for path in {clip.path for clip in clips}:
        try:
            status = path.stat()
            # whether it may be read, since size and time stay when that changes
            files[path] = (status.st_size, status.st_mtime_ns, os.access(path, os.R_OK))
        except OSError:
            files[path] = (-1, -1, False)
    made_by = "".join(inspect.getsource(module) for module in (front_ends, mel, kaldi, resample, reading))
    settings = front_end.model_dump() if what == "logmel" else front_end.sample_rate_hz
    described = [
        *(hashlib.sha256(made_by.encode()).hexdigest(), what, settings, clip_seconds, shortest_seconds),
        [(clip.clip_id, clip.start_seconds, *files[clip.path]) for clip in clips],
    ]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]


def read_entry(entry: Path) -> dict | None:
    """The record of a whole entry; None when there is none, or when one of its files was cut or altered."""
    if not entry.exists():
        return None
    try:
        stored = json.loads((entry / "index.json").read_bytes())
        with (entry / "clips.npy").open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if stored["sha256"] == _digest(stored["record"]) and stored["record"]["clips_sha256"] == found:
            return stored["record"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    _logger.warning("%s: cached features were cut short or altered; they are computed again", entry)
    return None


def _digest(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _build(
    entry: Path,
    clips: Sequence[Clip],
    front_end: FrontEnd,
    clip_seconds: float,
    shortest_seconds: float,
    what: What,
    progress: Progress | None,
) -> None:
    """Write the entry; the caller holds its lock, so a partial one is what a killed process left behind."""
    partial = entry.with_name(f"{entry.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    wanted = _bytes_wanted(len(clips), front_end, clip_seconds, what)
    if shutil.disk_usage(entry.parent).free < wanted:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    rows = {clip.clip_id: row for row, clip in enumerate(clips)}
    length = front_end.clip_samples(clip_seconds)
    settings = front_end.model_dump()
    one_writes = threading.Lock()
    partial.mkdir()
    try:
        # Written as a file, not through the map: a full disk is then an error and not a killed process
        with (partial / "clips.npy").open("wb") as file:
            shape = _shape(len(clips), front_end, clip_seconds, what)
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            start = file.tell()

            def take(clip: Clip, samples: np.ndarray, rate: int) -> None:
                resampled = resample.resample(samples, rate, front_end.sample_rate_hz)[:length]
                resampled = np.pad(resampled, (0, length - len(resampled)))
                values = resampled if what == "waveform" else front_ends.features(resampled, settings)
                data = np.ascontiguousarray(values, dtype="<f4")
                with one_writes:
                    file.seek(start + rows[clip.clip_id] * data.nbytes)
                    file.write(data)

            good, bad = examine_files(clips, clip_seconds, shortest_seconds, take=take, progress=progress)
            file.truncate(start + wanted)
        checksums = {clip_id: checksum for file in good for clip_id, checksum in file.checksums.items()}
        names = {file.filename for file in good}
        record = {
            "checksums": checksums,
            "bad_files": [asdict(file) for file in bad],
            "silent_windows": sum(clip.filename in names for clip in clips) - len(checksums),
        }
        seal_entry(partial, entry, record)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def seal_entry(partial: Path, entry: Path, record: dict) -> None:
    """Writes `record` beside `partial`'s clips.npy, with what tells a change of either, and moves all to `entry`."""
    with (partial / "clips.npy").open("rb") as file:
        record = record | {"clips_sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    text = json.dumps({"sha256": _digest(record), "record": record})
    (partial / "index.json").write_text(text, encoding="utf-8")
    if entry.exists():
        shutil.rmtree(entry)
    partial.rename(entry)


def cannot_write(folder: Path, error: OSError, wanted: int) -> DataError:
    """What to say when the cache has no room for `wanted` bytes, or may not be written."""
    return DataError(
        f"{folder}: cannot keep {wanted:,} bytes of features there: {error.strerror or error}. Make room, "
        f"or name another folder with the environment variable AUM_CACHE"
    )
