"""The front-ends and the resampler in ONNX hear what those of training hear."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from aum_compress.audio.config import KaldiConfig, LogMelConfig
from aum_compress.audio.frontend import front_end_module
from aum_compress.audio.resample import resample
from aum_compress.errors import ModelFileError
from aum_compress.export.front_end_function import FrontEndPlan, front_end_function
from aum_compress.export.resample_function import resample_function

MEAN, STD = -4.0, 3.0
SMALL = LogMelConfig(sample_rate_hz=8000, n_fft=512, window_samples=400, hop_samples=250, n_mels=32)
EDGE = LogMelConfig(n_fft=1024, window_samples=1024, hop_samples=500, n_mels=64)


def session_of(
    function: onnx.FunctionProto, samples: int, tensors: dict[str, np.ndarray]
) -> onnxruntime.InferenceSession:
    taken = helper.make_tensor_value_info("samples", onnx.TensorProto.FLOAT, ["batch", samples])
    rank = 2 if function.name == "Resample" else 4
    made = helper.make_tensor_value_info("made", onnx.TensorProto.FLOAT, [None] * rank)
    call = helper.make_node(function.name, ["samples", *tensors], ["made"], domain="aum_compress")
    stored = [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()]
    proto = helper.make_model(
        helper.make_graph([call], "one_call", [taken], [made], stored),
        functions=[function],
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("aum_compress", 1)],
        ir_version=10,
    )
    onnx.checker.check_model(proto, full_check=True)
    return onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def in_onnx(config: LogMelConfig | KaldiConfig, waveforms: np.ndarray) -> np.ndarray:
    """(B,S) to (B,1,F,T), as logarithms."""
    plan = FrontEndPlan(config.model_dump(), waveforms.shape[1])
    session = session_of(front_end_function(plan, MEAN, STD, 20), waveforms.shape[1], plan.tensors)
    return session.run(None, {"samples": waveforms})[0] * STD + MEAN


def in_torch(config: LogMelConfig | KaldiConfig, waveforms: np.ndarray) -> np.ndarray:
    return front_end_module(config)(torch.from_numpy(waveforms)).numpy()


@pytest.mark.parametrize(
    ("config", "seconds"),
    [
        (LogMelConfig(), 1.0),
        (EDGE, 1.0),
        (KaldiConfig(), 1.0),
        (KaldiConfig(fixed_frames=120, window_samples=401), 1.0),  # zeros behind the window, frames added
        (KaldiConfig(fixed_frames=90), 1.0),  # frames cut
    ],
)
def test_equal_to_the_front_end_of_training(config, seconds):
    """Silence, steps of 24 bits, quiet and loud noise, full scale: to 1e-3 of a natural logarithm."""
    rng = np.random.default_rng(0)
    length = round(seconds * config.sample_rate_hz)
    clipped = np.clip(3 * rng.standard_normal(length), -1, 1)
    steps = rng.integers(-2, 3, length) / 2**23
    loud, quiet = 0.3 * rng.standard_normal(length), 1e-4 * rng.standard_normal(length)
    full = rng.uniform(-1, 1, length)
    waveforms = np.stack([np.zeros(length), steps, quiet, loud, full, clipped]).astype(np.float32)
    found, wanted = in_onnx(config, waveforms), in_torch(config, waveforms)
    assert found.shape == (6, 1, config.n_mels, config.n_frames(seconds))
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    np.testing.assert_allclose(found[:2], wanted[:2], atol=1e-5)
    assert np.abs(np.diff(wanted, axis=0)).max() > 1  # they are not all alike


def test_a_pure_tone_beside_whose_power_most_cells_are_noise():
    """100 dB below a tone of full scale any float32 transform has its own rounding: torch's too, to 1e-2."""
    config, time = LogMelConfig(), np.arange(32_000) / 32_000
    waveforms = np.stack([np.sin(2 * np.pi * 997 * time), np.ones(32_000)]).astype(np.float32)
    np.testing.assert_allclose(in_onnx(config, waveforms), in_torch(config, waveforms), atol=0.03)


@settings(max_examples=12, deadline=None)
@given(
    n_fft=st.sampled_from([64, 96, 250, 254, 256]),
    window_share=st.floats(0.3, 1),
    hop=st.integers(20, 400),
    n_mels=st.integers(4, 24),
    length=st.integers(300, 900),
    f_min_hz=st.sampled_from([0.0, 60.0]),
    f_max_hz=st.sampled_from([None, 3000.0]),
)
def test_any_sizes(n_fft, window_share, hop, n_mels, length, f_min_hz, f_max_hz):
    """Windows that no factor divides, transforms of 2 times a prime, hops longer than the window, clips of any rest."""
    config = LogMelConfig(
        sample_rate_hz=8000,
        n_fft=n_fft,
        window_samples=max(2, int(window_share * n_fft)),
        hop_samples=hop,
        n_mels=n_mels,
        f_min_hz=f_min_hz,
        f_max_hz=f_max_hz,
    )
    waveforms = np.random.default_rng(length).uniform(-1, 1, (2, length)).astype(np.float32)
    np.testing.assert_allclose(in_onnx(config, waveforms), in_torch(config, waveforms), atol=1e-3)


def test_bands_and_bins_cover_every_filter_once():
    plan = FrontEndPlan(LogMelConfig().model_dump(), 32_000)
    assert plan.factors == (128, 32)
    begins, ends, lows, highs = zip(*plan.bands)
    assert (begins[0], *ends) == (*begins, 256)
    outside = plan.mel.copy()
    for begin, end, low, high in zip(begins, ends, lows, highs):
        outside[begin:end, low:high] = 0
    assert not outside.any()
    in_bands = sum((end - begin) * (high - low) for begin, end, low, high in plan.bands)
    assert in_bands < 0.1 * plan.mel.size
    assert sum(tensor.nbytes for tensor in plan.tensors.values()) == 20_800


@pytest.mark.parametrize(("from_hz", "to_hz"), [(48_000, 32_000), (44_100, 32_000), (8000, 32_000), (44_100, 16_000)])
def test_resampling_equals_that_of_training(from_hz, to_hz):
    samples = np.random.default_rng(0).uniform(-1, 1, (2, from_hz // 2)).astype(np.float32)
    function = resample_function(from_hz, to_hz, from_hz // 2, to_hz // 2, 20)
    (found,) = session_of(function, from_hz // 2, {}).run(None, {"samples": samples})
    np.testing.assert_allclose(found, resample(samples, from_hz, to_hz), atol=2e-6)


@pytest.mark.parametrize(
    ("from_hz", "to_hz", "n_in", "n_out"),
    [(11_025, 8000, 1001, 800), (16_000, 32_000, 5333, 10_667), (44_100, 16_000, 44_100, 16_000)],
)
def test_clip_of_an_odd_length_is_filled_with_silence(from_hz, to_hz, n_in, n_out):
    """Training resamples a clip, then pads it: no filter runs on beyond the last sample that comes out."""
    samples = np.random.default_rng(0).uniform(-1, 1, (1, n_in)).astype(np.float32)
    function = resample_function(from_hz, to_hz, n_in, n_out, 20)
    (found,) = session_of(function, n_in, {}).run(None, {"samples": samples})
    wanted = np.zeros((1, n_out), dtype=np.float32)
    resampled = resample(samples, from_hz, to_hz)[:, :n_out]
    wanted[:, : resampled.shape[1]] = resampled
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_rates_without_a_common_step_are_refused():
    with pytest.raises(ModelFileError, match=r"44101 Hz cannot be resampled to the model's 32000 Hz in the graph"):
        resample_function(44_101, 32_000, 44_101, 32_000, 20)
