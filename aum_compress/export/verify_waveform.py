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

BROADBAND, TONAL = 1e-3, 0.05
"""Largest error of a feature, as a natural logarithm of mel power. Beside a pure tone of full scale there are cells 100
dB below it, where every float32 transform, torch's too, has but rounding noise."""
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
        limit = TONAL if name in _TONES else broadband
        for optimised, session in sessions.items():
            found = run_session(session, samples)
            yield _compare(name, found, wanted[name], limit, metadata.std, optimised)


def _compare(name: str, found: np.ndarray, wanted: np.ndarray, limit: float, std: float, optimised: bool) -> Check:
    title = f"front-end, {name}"
    if found.shape != wanted.shape:
        reason = f"features of shape {found.shape}, wanted {wanted.shape}"
        return Check(title, False, reason, optimised, len(wanted))
    if bad := int((~np.isfinite(found)).sum()):
        return Check(title, False, f"{bad} of {found.size} features are NaN or infinite", optimised, len(wanted))
    error = float(np.abs(found - wanted).max()) * std
    reason = "" if error <= limit else f"an error of {error:.3g} in the logarithm, at most {limit:g} wanted"
    return Check(title, not reason, reason, optimised, len(wanted), error)
