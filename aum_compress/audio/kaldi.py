"""Kaldi's log-mel filterbank in numpy alone: the twin of `frontend.KaldiFbank`, without torch or pydantic.

What AuM, AST and their checkpoints read: `torchaudio.compliance.kaldi.fbank(waveform, htk_compat=True,
use_energy=False, window_type="hanning", dither=0.0, num_mel_bins=128, frame_shift=10)`. AuM takes the mean of the
recording away first; each frame loses its own mean here anyway, so that step changes nothing and is left out.
"""

import math
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from aum_compress.audio.mel import read_only
from aum_compress.errors import DataError

POWER_FLOOR = float(np.finfo(np.float32).eps)
"""Mel power below it is taken for it, before the natural logarithm."""


def kaldi_fbank(
    samples: np.ndarray,
    *,
    sample_rate_hz: int,
    window_samples: int,
    hop_samples: int,
    n_mels: int,
    f_min_hz: float,
    f_max_hz: float | None,
    pre_emphasis: float,
    fixed_frames: int | None,
) -> np.ndarray:
    """Natural logarithm of mel power: (..., S) to (..., F, T) float32; T as `kaldi_frames` says.

    The keywords are the fields of `KaldiConfig`. Frames lie wholly inside the clip; each loses its mean, is
    pre-emphasised (x[j] - pre_emphasis * x[j-1]), weighted by a symmetric Hann window and padded to a power of two.
    Frames that `fixed_frames` adds are zeros, as in AuM's loader.

    Raises DataError for a clip shorter than one window.
    """
    check_length(samples.shape[-1], window_samples)
    frames = sliding_window_view(np.asarray(samples, dtype=np.float32), window_samples, axis=-1)
    frames = frames[..., ::hop_samples, :]
    frames = frames - frames.mean(axis=-1, keepdims=True)
    before = np.concatenate([frames[..., :1], frames[..., :-1]], axis=-1)
    frames = (frames - np.float32(pre_emphasis) * before) * symmetric_hann(window_samples)
    n_fft = fft_size(window_samples)
    spectrum = np.fft.rfft(frames, n=n_fft)
    power = (spectrum.real**2 + spectrum.imag**2).astype(np.float32)
    mel = power @ kaldi_filterbank(n_fft, n_mels, sample_rate_hz, f_min_hz, f_max_hz)
    image = np.log(np.maximum(mel, np.float32(POWER_FLOOR))).swapaxes(-1, -2)[..., :fixed_frames]
    missing = (fixed_frames or 0) - image.shape[-1]
    return np.pad(image, [(0, 0)] * (image.ndim - 1) + [(0, missing)]) if missing > 0 else image


def kaldi_frames(n_samples: int, window_samples: int, hop_samples: int, fixed_frames: int | None) -> int:
    """T: `fixed_frames`, or where it is None the frames that lie wholly inside `n_samples` (0 for a shorter clip)."""
    return fixed_frames or max(0, 1 + (n_samples - window_samples) // hop_samples)


def fft_size(window_samples: int) -> int:
    """The power of two that a window is padded to."""
    return 1 << (window_samples - 1).bit_length()


def check_length(n_samples: int, window_samples: int) -> None:
    """Raises DataError when a clip does not hold one window."""
    if n_samples < window_samples:
        raise DataError(
            f"a clip of {n_samples} samples is too short for frames of {window_samples}: at least {window_samples} "
            "samples are wanted; pad the clip, lengthen clip_seconds or shorten window_samples"
        )


@lru_cache(maxsize=8)
def symmetric_hann(window_samples: int) -> np.ndarray:
    """Hann window that ends at zero on both sides (Kaldi's "hanning"), (window_samples,) float32, read-only."""
    return read_only(np.hanning(window_samples))


@lru_cache(maxsize=8)
def kaldi_filterbank(
    n_fft: int, n_mels: int, sample_rate_hz: int, f_min_hz: float, f_max_hz: float | None
) -> np.ndarray:
    """Filters of peak 1 that are triangles over mel, not over Hz: (n_fft // 2 + 1, F) float32, read-only.

    The maths of `torchaudio.compliance.kaldi.get_mel_banks` without warping, its last row (half the sample rate) zero.
    In float32 as there: the low filters of 128 hold a single bin, at whose weight float64 would move the logarithm by
    up to 1.4e-4. `f_max_hz` None is half the sample rate.
    """
    low, high = (_mel(hz) for hz in (f_min_hz, sample_rate_hz / 2 if f_max_hz is None else f_max_hz))
    left, centre, right = (
        np.float32(low)
        + (np.arange(n_mels, dtype=np.float32) + np.float32(k)) * np.float32((high - low) / (n_mels + 1))
        for k in range(3)
    )
    bins_hz = np.arange(n_fft // 2, dtype=np.float32) * np.float32(sample_rate_hz / n_fft)
    bins = np.float32(1127) * np.log(np.float32(1) + bins_hz / np.float32(700))[:, None]
    filters = np.maximum(0, np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)))
    return read_only(np.pad(filters, [(0, 1), (0, 0)]))


def _mel(hz: float) -> float:
    return 1127 * math.log(1 + hz / 700)
