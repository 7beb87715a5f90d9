"""What verification feeds to a model: stored golden arrays, and inputs that break what ordinary clips do not."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from aum_compress.errors import ModelFileError
from aum_compress.export.metadata import OnnxMetadata, Precision
from aum_compress.export.onnx_writer import fold_if_needed
from aum_compress.export.runtime import clip_features
from aum_compress.models.factory import Model

_N_RANDOM = 4
_SQUARE_HZ = 440


class Golden(NamedTuple):
    """Inputs (B,1,F,T) and the logits (B,C) that they must give."""

    inputs: np.ndarray
    logits: np.ndarray


def golden_file(inputs: np.ndarray, models: Mapping[Precision, Model]) -> bytes:
    """`golden.npz` of an ONNX bundle: inputs (B,1,F,T), and the logits of the torch model behind each file."""
    arrays = {"inputs": inputs}
    for precision, model in models.items():
        with torch.inference_mode():
            arrays[f"logits_{precision}"] = fold_if_needed(model)(torch.from_numpy(inputs)).numpy()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def read_golden(path: Path, precision: Precision) -> Golden:
    """What `golden_file` wrote for one precision.

    Raises:
        ModelFileError: absent, cut short, or without logits for this precision.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            return Golden(stored["inputs"], stored[f"logits_{precision}"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ModelFileError(
            f"{path}: no golden inputs and {precision} logits can be read from it ({error}): export the model again"
        ) from None


def stress_inputs(metadata: OnnxMetadata) -> dict[str, np.ndarray]:
    """Name -> features (B,1,F,T), the same on every machine up to rounding.

    random: standard normal features, farther from audio than any clip. The others are recordings at their worst:
    silence: digital zeros, the log's floor. full scale: white noise and a square wave between -1 and 1, the largest
    energies that a recording can have. clipped: noise three times too loud. constant: an offset and nothing else.
    click: one sample of full scale in silence.
    """
    rng = np.random.default_rng(0)
    length = metadata.clip_samples
    square = np.sign(np.sin(2 * np.pi * _SQUARE_HZ / metadata.sample_rate_hz * np.arange(length) + 0.1))
    loud = [rng.uniform(-1, 1, length), square]
    click = np.zeros(length)
    click[length // 2] = 1
    return {
        "random": rng.standard_normal((_N_RANDOM, *metadata.feature_shape), dtype=np.float32),
        "silence": clip_features(np.zeros(length), metadata),
        "full scale": np.concatenate([clip_features(clip, metadata) for clip in loud]),
        "clipped": clip_features(np.clip(3 * rng.standard_normal(length), -1, 1), metadata),
        "constant": clip_features(np.full(length, 0.5), metadata),
        "click": clip_features(click, metadata),
    }
