"""Proof of a front-end inside a file: its features against those of training, then the file's logits from waveforms."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from onnxruntime import InferenceSession

from aum_compress.audio.config import InputSpec
from aum_compress.audio.front_ends import KALDI, kind_of
from aum_compress.audio.frontend import front_end_module
from aum_compress.audio.resample import resample
from aum_compress.export.metadata import OnnxMetadata
from aum_compress.export.runtime import run_session
from aum_compress.export.verification import Check

BROADBAND = 1e-3
"""Largest error of a feature, as a natural logarithm of mel power."""
ROUNDING = 2.0**-20
"""What float32 leaves in every cell, as a share of the amplitude of a tone as loud as the clip's peak; allowed besides
where a clip may hold such a tone: another 1e-3 in cells 60 dB below it, 0.01 in those 80 dB below."""
# Measured with DCASE's front-end, smaller ones and kaldi, from their own rate, 44.1 and 48 kHz: 72 real recordings err
# by up to 8e-3, 0.03 where they are driven into clipping, sines of full scale by 0.03; never by more than 0.6 of what
# is allowed there and, with DCASE's, beyond 1e-3 only in cells 60 dB and more below the loudest of their frame.
_KALDI_BROADBAND = 5e-3
"""Kaldi adds nothing to the power before its logarithm, so chance brings some cells close to nothing in noise too."""
NOISE_BESIDE_TONES = ("square wave", "constant")
"""Nearly all of their cells hold that noise, which a network's logits follow by more than arithmetic's error."""
_TONES = (*NOISE_BESIDE_TONES, "recordings")
_TONE_HZ = 440.3


def stress_waveforms(metadata: OnnxMetadata) -> dict[str, np.ndarray]:
    """Name -> waveforms (B,S) at `metadata.waveform_rate_hz`: what recordings can hold, and what they hold at worst."""
    rng = np.random.default_rng(0)
    length, rate = metadata.waveform_samples, metadata.waveform_rate_hz
    square = np.sign(np.sin(2 * np.pi * _TONE_HZ / rate * np.arange(length)))
    click = np.zeros(length)
    click[length // 2] = 1
    clipped = np.clip(3 * rng.standard_normal(length), -1, 1)
    found = {
        "silence": [np.zeros(length)],
        "noise": [10.0 ** (-level / 20) * rng.standard_normal(length) for level in (20, 50, 80)],
        "24-bit steps": [rng.integers(-2, 3, length) / 2**23],
        "full scale": [rng.uniform(-1, 1, length), clipped],
        "square wave": [square],
        "click": [click],
        "constant": [np.full(length, 0.5)],
    }
    return {name: np.stack(waveforms).astype(np.float32) for name, waveforms in found.items()}


def training_features(waveforms: np.ndarray, metadata: OnnxMetadata) -> np.ndarray:
    """(B,S) at `metadata.waveform_rate_hz` to (B,1,F,T), by the modules that training uses, normalised."""
    spec = InputSpec.model_validate(dict(metadata.input))
    samples = resample(waveforms, metadata.waveform_rate_hz, metadata.sample_rate_hz)
    fitted = np.zeros((len(samples), metadata.clip_samples), dtype=np.float32)
    kept = samples[:, : metadata.clip_samples]
    fitted[:, : kept.shape[1]] = kept
    with torch.inference_mode():
        return ((front_end_module(spec.front_end)(torch.from_numpy(fitted)) - spec.mean) / spec.std).numpy()


def front_end_checks(
    sessions: Mapping[bool, InferenceSession],
    waveforms: Mapping[str, np.ndarray],
    wanted: Mapping[str, np.ndarray],
    metadata: OnnxMetadata,
) -> Iterator[Check]:
    """Features (B,1,F,T) that the file's front-end makes of `waveforms` against `wanted`, as logarithms of mel power.

    Args:
        sessions: the front-end alone, by graph optimisation on.
    """
    for name, samples in waveforms.items():
        broadband = _KALDI_BROADBAND if kind_of(metadata.front_end) == KALDI else BROADBAND
        limit = _beside_tones(samples, wanted[name], metadata) if name in _TONES else np.asarray(broadband)
        for optimised, session in sessions.items():
            found = run_session(session, samples)
            yield _compare(name, found, wanted[name], limit, metadata.std, optimised)


def _beside_tones(samples: np.ndarray, wanted: np.ndarray, metadata: OnnxMetadata) -> np.ndarray:
    """Largest error of each cell (B,1,F,T) of clips that may hold tones."""
    loudest = np.abs(samples).max(1) * metadata.front_end["window_samples"] / 4  # of a tone in a Hann window's spectrum
    amplitude = np.exp((wanted * metadata.std + metadata.mean) / 2)
    return BROADBAND + ROUNDING * loudest[:, None, None, None] / amplitude


def _compare(name: str, found: np.ndarray, wanted: np.ndarray, limit: np.ndarray, std: float, optimised: bool) -> Check:
    """Features in units of `std` against `limit`, of each cell or of all."""
    title = f"front-end, {name}"
    if found.shape != wanted.shape:
        reason = f"features of shape {found.shape}, wanted {wanted.shape}"
        return Check(title, False, reason, optimised, len(wanted))
    if bad := int((~np.isfinite(found)).sum()):
        return Check(title, False, f"{bad} of {found.size} features are NaN or infinite", optimised, len(wanted))
    errors = np.abs(found - wanted) * std
    place = np.unravel_index((errors / limit).argmax(), errors.shape)
    error, most = float(errors[place]), float(np.broadcast_to(limit, errors.shape)[place])
    reason = "" if error <= most else f"an error of {error:.3g} in the logarithm, at most {most:.3g} wanted"
    return Check(title, not reason, reason, optimised, len(wanted), float(errors.max()))
