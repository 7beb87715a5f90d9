"""Log-mel spectrogram in numpy alone: the twin of `frontend.LogMel` for processes without torch or pydantic."""

from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from aum_compress.errors import DataError


def log_mel(
    samples: np.ndarray,
    *,
    sample_rate_hz: int,
    n_fft: int,
    window_samples: int,
    hop_samples: int,
    n_mels: int,
    f_min_hz: float,
    f_max_hz: float | None,
    log_offset: float,
) -> np.ndarray:
    """Natural logarithm of mel power plus `log_offset`: (..., S) to (..., F, T) float32, T = 1 + S // hop_samples.

    The keywords are the fields of `LogMelConfig`. The maths is that of `torchaudio.transforms.MelSpectrogram`: power 2,
    HTK scale, no norm, centred frames, reflected ends.

    Raises DataError when the clip is too short to be reflected at its ends.
    """
    padding = frame_padding(samples.shape[-1], n_fft, window_samples)
    samples = np.pad(np.asarray(samples, dtype=np.float32), [(0, 0)] * (samples.ndim - 1) + [padding], mode="reflect")
    frames = sliding_window_view(samples, window_samples, axis=-1)[..., ::hop_samples, :] * hann_window(window_samples)
    spectrum = np.fft.rfft(frames, n=n_fft)
    power = (spectrum.real**2 + spectrum.imag**2).astype(np.float32)
    mel = power @ mel_filterbank(n_fft, n_mels, sample_rate_hz, f_min_hz, f_max_hz)
    return np.log(mel + np.float32(log_offset)).swapaxes(-1, -2)


def frame_padding(n_samples: int, n_fft: int, window_samples: int) -> tuple[int, int]:
    """Samples to reflect before and after a clip of `n_samples`, for frames of `window_samples`.

    STFTs centre the window in n_fft zeros. Where those zeros stand changes the phase alone, so frames are cut to the
    window, and this is n_fft // 2 less the zeros on that side.

    Raises DataError when the clip does not have that many samples to reflect.
    """
    before = n_fft // 2 - (n_fft - window_samples) // 2
    after = n_fft // 2 - (n_fft - window_samples + 1) // 2
    if n_samples <= before:
        raise DataError(
            f"a clip of {n_samples} samples is too short for frames of {window_samples}: at least {before + 1} "
            "samples are wanted; pad the clip, lengthen clip_seconds or shorten window_samples"
        )
    return before, after


@lru_cache(maxsize=8)
def hann_window(window_samples: int) -> np.ndarray:
    """Periodic Hann window, (window_samples,) float32, read-only."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window_samples) / window_samples)
    return read_only(window)


@lru_cache(maxsize=8)
def mel_filterbank(
    n_fft: int, n_mels: int, sample_rate_hz: int, f_min_hz: float = 0.0, f_max_hz: float | None = None
) -> np.ndarray:
    """Triangular mel filters of peak 1 on the HTK scale: (n_fft // 2 + 1, F) float32, read-only.

    The maths of `torchaudio.functional.melscale_fbanks` with norm None, in float64: torchaudio places its filters in
    float32, which moves weights by up to 3e-5. `f_max_hz` None is half the sample rate.
    """
    top_hz = sample_rate_hz / 2 if f_max_hz is None else f_max_hz
    bins_hz = np.linspace(0, sample_rate_hz / 2, n_fft // 2 + 1)
    edges_mel = np.linspace(_hz_to_mel(f_min_hz), _hz_to_mel(top_hz), n_mels + 2)
    edges_hz = 700 * (10 ** (edges_mel / 2595) - 1)
    widths_hz = np.diff(edges_hz)
    rising = (bins_hz[:, None] - edges_hz[:-2]) / widths_hz[:-1]
    falling = (edges_hz[2:] - bins_hz[:, None]) / widths_hz[1:]
    return read_only(np.maximum(0, np.minimum(rising, falling)))


def _hz_to_mel(hz: float) -> float:
    return 2595 * np.log10(1 + hz / 700)


def read_only(values: np.ndarray) -> np.ndarray:
    """As float32 that nobody can write to: cached arrays are shared."""
    values = values.astype(np.float32)
    values.flags.writeable = False
    return values
