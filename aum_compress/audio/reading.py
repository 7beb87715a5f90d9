"""Audio files to mono float32 samples at the wanted rate. Torch-free: the on-device runtime reads with it too."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from aum_compress.audio.resample import MOST_HZ, resample
from aum_compress.errors import DataError

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3"})
"""Lower-case suffixes of the files that data folders are searched for."""

_LEAST_HZ = 100
"""Of a file's rate. At one hertz, a second of audio would become half a day and not fit into memory."""

_TOLERATED_LOSS = 0.01
"""Share of the promised samples that may be missing: mp3 headers count a little more than their frames hold."""

_STREAMED_BYTES = 0xFFFFFF00
"""A wav data size from here up is what a recorder wrote that could not seek back: it promises nothing."""


@dataclass(frozen=True, slots=True)
class AudioInfo:
    """What the header of an audio file says."""

    sample_rate_hz: int
    n_channels: int
    n_samples: int
    """Samples of each channel."""

    @property
    def seconds(self) -> float:
        """Length of the recording."""
        return self.n_samples / self.sample_rate_hz


def audio_info(path: Path | str) -> AudioInfo:
    """Header of an audio file, without decoding it.

    Raises DataError, naming the file, when it is missing, not audio, of a rate that no audio has, or a wav file with
    fewer bytes than it promises.
    """
    with _open(Path(path)) as file:
        return AudioInfo(file.samplerate, file.channels, file.frames)


def read_audio(
    path: Path | str, sample_rate_hz: int, *, start_seconds: float = 0.0, duration_seconds: float | None = None
) -> np.ndarray:
    """Decode wav, flac, ogg, mp3 (or whatever else libsndfile reads) of any rate, width and channel count.

    Returns (S,) float32, full scale = 1, the mean of all channels, resampled to `sample_rate_hz`. Given
    `duration_seconds`, only that window from `start_seconds` is decoded, and resampled as if silence lay around it; a
    window that reaches past the end of the file comes back shorter. In an mp3 file all that lies before is decoded too.

    Raises DataError, naming the file, when it is missing, not audio, of a rate that no audio has, corrupt, cut short by
    more than 1 %, without samples, holds NaN or infinity in the window, or ends before `start_seconds`.
    """
    path = Path(path)
    if start_seconds < 0 or (duration_seconds is not None and duration_seconds <= 0):
        raise DataError(
            f"{path}: cannot read a window of {duration_seconds} s from {start_seconds} s: "
            "the start must not be negative and the length must be above zero"
        )
    with _open(path) as file:
        rate, start = file.samplerate, round(start_seconds * file.samplerate)
        if file.frames == 0:
            raise DataError(f"{path}: holds no samples: record it again or leave it out")
        if start >= file.frames:
            raise DataError(
                f"{path}: a window from {start_seconds} s was wanted, the file ends at {file.frames / rate} s"
            )
        wanted = file.frames - start
        if duration_seconds is not None:
            wanted = min(wanted, max(1, round(duration_seconds * rate)))
        try:
            channels = _read_from(file, start, wanted)
        except soundfile.SoundFileError as error:
            raise DataError(
                f"{path}: decoding failed ({_reason(error)}): the file is corrupt, copy it again"
            ) from error
    _refuse_if_cut(path, found=len(channels), promised=wanted, unit="samples")
    bad = np.flatnonzero(~np.isfinite(channels).all(axis=1))
    if bad.size:
        raise DataError(
            f"{path}: {bad.size} of {len(channels)} samples are NaN or infinite, the first at "
            f"{(start + int(bad[0])) / rate:.3f} s: all must be finite, export the recording again"
        )
    return resample(channels.mean(axis=1), rate, sample_rate_hz)


def audio_checksum(samples: np.ndarray) -> str:
    """SHA-256 (64 hex digits) of the samples as little-endian float32: the key of cached features and teacher logits.

    It names what was heard, not the file: a renamed, re-tagged or losslessly repacked copy keeps its key.
    """
    return hashlib.sha256(np.ascontiguousarray(samples, dtype="<f4")).hexdigest()


@contextmanager
def _open(path: Path) -> Iterator[soundfile.SoundFile]:
    if not path.is_file():
        found = "it is a folder" if path.is_dir() else "there is no such file"
        raise DataError(f"{path}: an audio file was wanted, {found}")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: may not be read by this user: give yourself the right to, or leave it out")
    try:
        file = soundfile.SoundFile(path)
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: soundfile's answer to a headerless .raw file
        raise DataError(
            f"{path}: cannot be read as audio ({_reason(error)}): wav, flac, ogg or mp3 was wanted, "
            f"{path.stat().st_size} bytes of something else were found"
        ) from error
    with file:
        # libsndfile quietly shortens a wav file that was cut; only its log tells.
        cut = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
        if cut and int(cut[1]) < _STREAMED_BYTES:
            _refuse_if_cut(path, found=int(cut[2]), promised=int(cut[1]), unit="bytes of audio")
        if not _LEAST_HZ <= file.samplerate <= MOST_HZ:
            raise DataError(
                f"{path}: its header says {file.samplerate:,} samples a second, wanted {_LEAST_HZ} to {MOST_HZ:,}: the "
                "file is damaged, copy or record it again"
            )
        yield file


def _read_from(file: soundfile.SoundFile, start: int, wanted: int) -> np.ndarray:
    """(wanted, channels) float32, less at the end of the file."""
    if file.format == "MP3":
        # libsndfile seeks in mp3 by a coarse table and lands elsewhere when the bit rate varies; soundfile seeks after
        # every read. So decode from the beginning, in one go.
        return file.read(start + wanted, dtype="float32", always_2d=True)[start:]
    file.seek(start)
    return file.read(wanted, dtype="float32", always_2d=True)


def _refuse_if_cut(path: Path, *, found: int, promised: int, unit: str) -> None:
    if found < promised * (1 - _TOLERATED_LOSS):
        raise DataError(
            f"{path}: is cut short: its header promises {promised} {unit}, {found} are there: copy or record it again"
        )


def _reason(error: Exception) -> str:
    """libsndfile's words without the path that soundfile puts before them."""
    return str(getattr(error, "error_string", error)).removeprefix("Error : ").rstrip(".")
