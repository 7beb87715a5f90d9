"""aum_compress.audio.resample against torchaudio."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aum_compress.audio.resample import resample
from aum_compress.audio.torchaudio_compat import functional
from aum_compress.errors import DataError

RATES = [8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 96_000]


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).uniform(-1, 1, shape).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(RATES), st.sampled_from(RATES), st.integers(1, 3000))
def test_equals_torchaudio_in_float64(from_hz, to_hz, n_samples):
    samples = noise(n_samples)
    wanted = functional.resample(torch.from_numpy(samples).double(), from_hz, to_hz).numpy()
    got = resample(samples, from_hz, to_hz)
    assert got.dtype == np.float32
    assert got.shape == wanted.shape == (-(-to_hz * n_samples // from_hz),)
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_torchaudio_in_float32_differs_by_its_own_kernel_rounding_only():
    samples = noise(44_100)
    got = resample(samples, 44_100, 32_000)
    wanted = functional.resample(torch.from_numpy(samples), 44_100, 32_000).numpy()
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_leading_axes_are_resampled_one_by_one():
    samples = noise(2, 3, 1234)
    together = resample(samples, 44_100, 32_000)
    assert together.shape == (2, 3, -(-32_000 * 1234 // 44_100))
    np.testing.assert_allclose(together[1, 2], resample(samples[1, 2], 44_100, 32_000), atol=1e-6)


def test_chunks_join_without_a_seam():
    # 30 s at a ratio of 3 to 2 is more windows than one chunk holds
    samples = noise(48_000 * 30)
    wanted = functional.resample(torch.from_numpy(samples).double(), 48_000, 32_000).numpy()
    np.testing.assert_allclose(resample(samples, 48_000, 32_000), wanted, atol=1e-6)


def test_rates_without_a_common_divisor_need_no_huge_kernel():
    # The dense kernel of this ratio has 32,000 x 44,119 values
    seconds = np.arange(44_101) / 44_101
    got = resample(np.sin(2 * np.pi * 440 * seconds).astype(np.float32), 44_101, 32_000)
    wanted = np.sin(2 * np.pi * 440 * np.arange(32_000) / 32_000)
    inner = slice(100, -100)
    np.testing.assert_allclose(got[inner], wanted[inner], atol=5e-3)


def test_same_rate_and_no_samples_pass_through():
    samples = noise(100)
    np.testing.assert_array_equal(resample(samples, 16_000, 16_000), samples)
    assert resample(samples[:0], 16_000, 8_000).shape == (0,)


@pytest.mark.parametrize(("from_hz", "to_hz"), [(0, 16_000), (16_000, -1), (16_000.5, 8_000)])
def test_impossible_rates_are_refused(from_hz, to_hz):
    with pytest.raises(DataError, match="rates must be whole and above zero"):
        resample(noise(10), from_hz, to_hz)


def test_a_rate_beyond_all_audio_is_refused():
    with pytest.raises(DataError, match="no audio has a rate above 1536000 Hz"):
        resample(np.zeros(100, dtype=np.float32), 8000, 10**9)
