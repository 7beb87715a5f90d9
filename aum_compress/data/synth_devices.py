"""The recording devices of the synthetic soundscapes, named as in TAU mobile. numpy only.

A device is a frequency response, a compressor and noise. They are the same in every data set, whatever its seed.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from aum_compress.data.synth_scenes import SAMPLE_RATE_HZ, smooth_response


@dataclass(frozen=True, slots=True)
class Device:
    """One recorder."""

    response_seed: int
    ripple_db: float
    """How far its response wanders from octave to octave."""
    pass_band_hz: tuple[float, float]
    """Second-order edges."""
    ratio: float
    """The compressor's: levels that lie so many dB apart leave it 1 dB apart."""
    noise_db: float
    """RMS of its own noise in dBFS."""


DEVICES: dict[str, Device] = {
    "a": Device(0, 0.5, (20.0, 20_000.0), 1.0, -84.0),
    "b": Device(1, 3.0, (80.0, 16_000.0), 1.3, -72.0),
    "c": Device(2, 3.0, (60.0, 14_000.0), 1.5, -70.0),
    "s1": Device(3, 4.0, (120.0, 12_000.0), 1.2, -68.0),
    "s2": Device(4, 4.0, (100.0, 9_000.0), 1.6, -66.0),
    "s3": Device(5, 4.0, (150.0, 15_000.0), 1.4, -66.0),
    "s4": Device(6, 5.0, (180.0, 9_000.0), 1.7, -64.0),
    "s5": Device(7, 5.0, (140.0, 8_000.0), 1.9, -66.0),
    "s6": Device(8, 5.5, (220.0, 7_000.0), 1.8, -63.0),
}

_BLOCK_SAMPLES = 441
_COMPRESSOR_ANCHOR = 0.03
"""The RMS that a compressor leaves as it is."""


def record(rng: np.random.Generator, device: str, spectrum: np.ndarray, n_samples: int) -> np.ndarray:
    """What the device makes of a soundscape (S // 2 + 1,): (S,) float64, within +-1."""
    traits = DEVICES[device]
    heard = np.fft.irfft(spectrum * response(device, n_samples), n_samples)
    heard += 10 ** (traits.noise_db / 20) * rng.standard_normal(len(heard))
    # Level in blocks of 10 ms, gain drawn through their middles
    starts = np.arange(0, len(heard), _BLOCK_SAMPLES)
    sizes = np.diff(np.append(starts, len(heard)))
    level = np.sqrt(np.add.reduceat(heard**2, starts) / sizes) + 1e-6
    gain = (level / _COMPRESSOR_ANCHOR) ** (1 / traits.ratio - 1)
    heard *= np.interp(np.arange(len(heard)), starts + sizes / 2, gain)
    return np.tanh(heard)  # linear at ordinary levels; nothing ever clips


@lru_cache(maxsize=32)
def response(device: str, n_samples: int) -> np.ndarray:
    """(S // 2 + 1,) gains of the device, read-only."""
    traits = DEVICES[device]
    low_hz, high_hz = traits.pass_band_hz
    frequency_hz = np.fft.rfftfreq(n_samples, 1 / SAMPLE_RATE_HZ)
    rng = np.random.Generator(np.random.PCG64(traits.response_seed))
    gains = smooth_response(rng, n_samples, ripple_db=traits.ripple_db)
    gains /= np.sqrt(1 + (low_hz / np.maximum(frequency_hz, 1.0)) ** 4) * np.sqrt(1 + (frequency_hz / high_hz) ** 4)
    gains.flags.writeable = False
    return gains
