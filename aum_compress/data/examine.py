"""Reading every file of a data set once, and saying what is wrong with which: one pass for `data check` and the cache.

Torch-free. Decoding runs in a few threads (libsndfile and numpy let go of the interpreter lock).
"""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from threadpoolctl import threadpool_limits

from aum_compress.audio.reading import audio_checksum, audio_info, read_audio
from aum_compress.data.clips import Clip
from aum_compress.errors import DataError, join_problems

Reason = Literal[
    "missing",
    "unreadable",
    "empty",
    "not_finite",
    "too_short",
    "silent",
    "duplicate",
    "wrong_rate",
    "absent_in_meta",
    "unknown_name",
]
Progress = Callable[[int, int], None]
"""Called with (files done, files in all)."""

# Peak to peak; three steps of 16-bit audio. The quietest real recordings seen (-52 dBFS) have a hundred times as much.
SILENCE_RANGE = 1e-4
# Decoded in one go; bounds memory for files of any length
_READ_SECONDS = 120
_MOST_NAMED = 1000
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BadFile:
    """A file that cannot be used."""

    filename: str
    reason: Reason
    detail: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True, slots=True)
class GoodFile:
    """A file that can be used."""

    filename: str
    sample_rate_hz: int
    seconds: float
    checksums: dict[str, str]
    """SHA-256 of the audio of each clip, by clip_id. Windows without sound are not in it."""


def examine_files(
    clips: Sequence[Clip],
    clip_seconds: float,
    shortest_seconds: float,
    *,
    take: Callable[[Clip, np.ndarray, int], None] | None = None,
    progress: Progress | None = None,
) -> tuple[list[GoodFile], list[BadFile]]:
    """Read the files of the clips, each once, and tell good from bad, both in the order of the clips.

    `take` gets each clip that has sound: (clip, mono samples (S,) float32 at the file's own rate, that rate in Hz). It
    is called from several threads, possibly for some clips of a file that then turns out bad. Of files with the same
    audio the first one is good.
    """
    by_file: dict[str, list[Clip]] = {}
    for clip in clips:
        by_file.setdefault(clip.filename, []).append(clip)
    good: list[GoodFile] = []
    bad: list[BadFile] = []
    first_with: dict[str, str] = {}
    # One thread a file: threads that BLAS starts within them wait for each other, 24 times slower on a busy machine
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        futures = [
            pool.submit(_examine_file, name, windows, clip_seconds, shortest_seconds, take)
            for name, windows in by_file.items()
        ]
        try:
            for done, future in enumerate(futures, start=1):
                result = future.result()
                if isinstance(result, GoodFile):
                    # windows that differ make files that differ
                    same = first_with.setdefault("".join(result.checksums.values()), result.filename)
                    if same != result.filename:
                        result = BadFile(result.filename, "duplicate", f"same audio as {same}")
                (good if isinstance(result, GoodFile) else bad).append(result)
                if progress is not None:
                    progress(done, len(futures))
        except BaseException:
            # Ctrl-C must not wait for thousands of files
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return good, bad


def _examine_file(
    filename: str,
    clips: list[Clip],
    clip_seconds: float,
    shortest_seconds: float,
    take: Callable[[Clip, np.ndarray, int], None] | None,
) -> GoodFile | BadFile:
    path = clips[0].path
    try:
        if not path.is_file():
            return BadFile(filename, "missing", f"{path} is listed but not on disk")
        info = audio_info(path)
    except (DataError, OSError) as error:  # OSError: a folder that may not be entered
        return BadFile(filename, "unreadable", str(error))
    if info.n_samples == 0:
        return BadFile(filename, "empty", f"{path} holds no samples")
    if info.seconds < shortest_seconds:
        detail = f"{path} lasts {info.seconds:.3f} s, wanted at least {shortest_seconds:.3f} s"
        return BadFile(filename, "too_short", detail)

    checksums = {}
    size = max(1, int(_READ_SECONDS / clip_seconds))
    for first in range(0, len(clips), size):
        block = clips[first : first + size]
        try:
            windows = _read_windows(path, block, info.sample_rate_hz, clip_seconds)
        except DataError as error:
            return BadFile(filename, "not_finite" if "NaN" in str(error) else "unreadable", str(error))
        for clip, samples in zip(block, windows):
            if samples.size and np.ptp(samples) >= SILENCE_RANGE:
                checksums[clip.clip_id] = audio_checksum(samples)
                if take is not None:
                    take(clip, samples, info.sample_rate_hz)
    if not checksums:
        detail = f"{path} never moves by more than {SILENCE_RANGE} of full scale"
        return BadFile(filename, "silent", detail)
    return GoodFile(filename, info.sample_rate_hz, info.seconds, checksums)


def _read_windows(path: Path, clips: Sequence[Clip], rate: int, clip_seconds: float) -> list[np.ndarray]:
    """Audio of neighbouring clips of a file, decoded in one go; a last window may be short."""
    start = clips[0].start_seconds
    seconds = clips[-1].start_seconds - start + clip_seconds
    samples = read_audio(path, rate, start_seconds=start, duration_seconds=seconds)
    length = round(clip_seconds * rate)
    firsts = [round((clip.start_seconds - start) * rate) for clip in clips]
    return [samples[first : first + length] for first in firsts]


def stop_or_skip(bad: Sequence[BadFile], n_files: int, on_bad_files: Literal["stop", "skip"]) -> None:
    """DataError that names all bad files, or one warning that says how many are left out; nothing when none is bad."""
    if not bad:
        return
    heading = f"{len(bad)} of {n_files} files cannot be used"
    if on_bad_files == "stop":
        problems = join_problems(f"{heading}:", [str(file) for file in bad], most=_MOST_NAMED)
        raise DataError(
            f"{problems}\nMend or remove them (`aum-compress data check` writes the list as csv), "
            f"or set data.on_bad_files: skip to go on without them."
        )
    _logger.warning(join_problems(f"{heading} and are left out:", [str(file) for file in bad]))
