"""Band-limited resampling in numpy, so that the torch-free runtime hears exactly what training heard."""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from aum_compress.errors import DataError

MOST_HZ = 1_536_000
"""Of a rate: twice the fastest audio converters. Filters grow with it, to gigabytes where a header is damaged."""
ZERO_CROSSINGS = 6
ROLLOFF = 0.99
_PHASES_PER_BAND = 32
_WINDOW_VALUES = 2**20


class _Band(NamedTuple):
    """Filters of neighbouring output phases, cut down to the input samples that they reach."""

    first_phase: int
    first_tap: int
    taps: np.ndarray
    """(taps, phases) float32."""


def resample(samples: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Resample the last axis: (..., S) to (..., ceil(to_hz * S / from_hz)) float32.

    Hann-windowed sinc, six zero crossings, roll-off 0.99, silence beyond both ends: the maths and the defaults of
    `torchaudio.functional.resample` (after julius and Smith, "Digital audio resampling"), whose float64 result this
    equals to 1e-6 for samples within +-1. Working memory beside input and output is a few megabytes at any length.

    Raises DataError when a rate is not a positive whole number of hertz, or above `MOST_HZ`.
    """
    for rate in (from_hz, to_hz):
        if rate != int(rate) or rate <= 0:
            raise DataError(f"cannot resample from {from_hz} Hz to {to_hz} Hz: rates must be whole and above zero")
        if rate > MOST_HZ:
            raise DataError(f"cannot resample from {from_hz} Hz to {to_hz} Hz: no audio has a rate above {MOST_HZ} Hz")
    samples = np.asarray(samples, dtype=np.float32)
    if from_hz == to_hz or samples.shape[-1] == 0:
        return samples
    step, phases = rate_steps(int(from_hz), int(to_hz))
    reach, bands = _filters(step, phases)

    # Block b holds the output samples b * phases ... and is centred on the input samples b * step ...
    n_out = -(-phases * samples.shape[-1] // step)
    n_blocks = -(-n_out // phases)
    padded = np.zeros((*samples.shape[:-1], (n_blocks + 1) * step + 2 * reach), dtype=np.float32)
    padded[..., reach : reach + samples.shape[-1]] = samples
    out = np.empty((*samples.shape[:-1], n_blocks, phases), dtype=np.float32)
    for first_phase, first_tap, taps in bands:
        windows = sliding_window_view(padded[..., first_tap:], len(taps), axis=-1)[..., ::step, :]
        last_phase = first_phase + taps.shape[1]
        # Overlapping windows are no matrix that BLAS takes: copy them, a bounded number at a time.
        chunk = max(1, _WINDOW_VALUES // len(taps))
        for begin in range(0, n_blocks, chunk):
            end = min(begin + chunk, n_blocks)
            out[..., begin:end, first_phase:last_phase] = np.ascontiguousarray(windows[..., begin:end, :]) @ taps
    return out.reshape(*samples.shape[:-1], n_blocks * phases)[..., :n_out]


def rate_steps(from_hz: int, to_hz: int) -> tuple[int, int]:
    """(step, phases): the fewest samples that come in, and those that go out for them."""
    divisor = math.gcd(from_hz, to_hz)
    return from_hz // divisor, to_hz // divisor


def crossings_a_block(step: int, phases: int) -> float:
    """Zero crossings of the sinc in `step` input samples."""
    return min(step, phases) * ROLLOFF


def reached_samples(step: int, phases: int) -> int:
    """Input samples on either side of an output sample that have a part in it."""
    return math.ceil(ZERO_CROSSINGS * step / crossings_a_block(step, phases))


@lru_cache(maxsize=16)
def _filters(step: int, phases: int) -> tuple[int, tuple[_Band, ...]]:
    """Input samples reached on either side of an output sample, and the filters of all `phases` output phases.

    One dense kernel has phases * (step + 2 * reach) values, almost all of them zero: 5 GB for 44,101 to 32,000 Hz.
    Bands keep that at some megabytes and do a seventh of the multiplications for 44,100 to 32,000 Hz.
    """
    cutoff = crossings_a_block(step, phases)
    reach = reached_samples(step, phases)
    bands = []
    for first_phase in range(0, phases, _PHASES_PER_BAND):
        phase = np.arange(first_phase, min(first_phase + _PHASES_PER_BAND, phases))
        tap = np.arange(phase[0] * step // phases, phase[-1] * step // phases + 2 * reach + 2)
        crossings = ((tap[:, None] - reach) / step - phase / phases) * cutoff
        crossings = np.clip(crossings, -ZERO_CROSSINGS, ZERO_CROSSINGS)
        hann = np.cos(crossings * np.pi / (2 * ZERO_CROSSINGS)) ** 2
        taps = (np.sinc(crossings) * hann * (cutoff / step)).astype(np.float32)
        bands.append(_Band(first_phase, int(tap[0]), taps))
    return reach, tuple(bands)
