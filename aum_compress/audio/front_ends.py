"""Which code a front-end's record stands for. A record is what `FrontEnd.model_dump()` gives, and recipes, bundles
and ONNX metadata carry; one without `kind` was written when log-mel was the only front-end. Neither torch nor pydantic.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from aum_compress.audio.kaldi import fft_size, kaldi_fbank, kaldi_filterbank, kaldi_frames
from aum_compress.audio.mel import log_mel, mel_filterbank

LOG_MEL, KALDI = "log_mel", "kaldi"


def kind_of(record: Mapping[str, Any]) -> str:
    """`log_mel` or `kaldi`, or whatever else stands there."""
    return record.get("kind", LOG_MEL)


def features(samples: np.ndarray, record: Mapping[str, Any]) -> np.ndarray:
    """(..., S) to (..., F, T) float32, not normalised.

    Raises DataError for clips too short for one frame.
    """
    transform = {LOG_MEL: log_mel, KALDI: kaldi_fbank}[kind_of(record)]
    return transform(samples, **{key: value for key, value in record.items() if key != "kind"})


def count_frames(n_samples: int, record: Mapping[str, Any]) -> int:
    """T of a clip of `n_samples`."""
    hop = record["hop_samples"]
    if kind_of(record) == KALDI:
        return kaldi_frames(n_samples, record["window_samples"], hop, record["fixed_frames"])
    return 1 + n_samples // hop


def frame_macs(record: Mapping[str, Any]) -> int:
    """Multiplications of one frame, estimated.

    The window, a radix-2 FFT of real input (n_fft * log2(n_fft); libraries differ), squares of both parts of each bin,
    and the mel weights that are not zero; kaldi's pre-emphasis on top.
    """
    kaldi, window = kind_of(record) == KALDI, record["window_samples"]
    n_fft = fft_size(window) if kaldi else record["n_fft"]
    filterbank = kaldi_filterbank if kaldi else mel_filterbank
    mel = filterbank(n_fft, record["n_mels"], record["sample_rate_hz"], record["f_min_hz"], record["f_max_hz"])
    fft = round(n_fft * math.log2(n_fft))
    return (2 * window if kaldi else window) + fft + 2 * (n_fft // 2 + 1) + int((mel != 0).sum())
