"""aum_compress.audio.mel: the filterbank against torchaudio, the edges of the log-mel, and what it may import."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aum_compress.audio.config import LogMelConfig
from aum_compress.audio.front_ends import features
from aum_compress.audio.mel import frame_padding, hann_window, mel_filterbank
from aum_compress.audio.torchaudio_compat import functional
from aum_compress.errors import DataError

SMALL = LogMelConfig(sample_rate_hz=16_000, n_fft=512, window_samples=400, hop_samples=160, n_mels=40)


@pytest.mark.parametrize(
    ("n_fft", "n_mels", "sample_rate_hz", "f_min_hz", "f_max_hz"),
    [(4096, 256, 32_000, 0.0, None), (512, 40, 16_000, 20.0, 7600.0), (8192, 256, 44_100, 0.0, None)],
)
def test_filterbank_equals_torchaudio(n_fft, n_mels, sample_rate_hz, f_min_hz, f_max_hz):
    top_hz = f_max_hz or sample_rate_hz / 2
    wanted = functional.melscale_fbanks(n_fft // 2 + 1, f_min_hz, top_hz, n_mels, sample_rate_hz).numpy()
    got = mel_filterbank(n_fft, n_mels, sample_rate_hz, f_min_hz, f_max_hz)
    assert got.dtype == np.float32
    # torchaudio places its filters in float32: 3e-5 of a weight is its rounding
    np.testing.assert_allclose(got, wanted, atol=4e-5)


def test_cached_tables_cannot_be_written_to():
    for table in (mel_filterbank(512, 40, 16_000), hann_window(400)):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 1.0


def test_silence_is_the_log_of_the_offset():
    image = features(np.zeros(16_000, np.float32), SMALL.model_dump())
    assert image.shape == (40, 101)
    assert image.dtype == np.float32
    np.testing.assert_allclose(image, np.log(1e-5), rtol=1e-6)


def test_a_tone_stands_in_its_mel_bin():
    tone = np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000).astype(np.float32)
    loudest = features(tone, SMALL.model_dump()).mean(axis=1).argmax()
    edges_hz = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 42) / 2595) - 1)
    assert edges_hz[loudest] < 1000 < edges_hz[loudest + 2]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 256).map(lambda half: 2 * half), st.data())
def test_frames_number_as_the_config_says(n_fft, data):
    window = data.draw(st.integers(1, n_fft))
    hop = data.draw(st.integers(1, 200))
    n_samples = data.draw(st.integers(n_fft, 2000))
    config = LogMelConfig(sample_rate_hz=8000, n_fft=n_fft, window_samples=window, hop_samples=hop, n_mels=4)
    image = features(np.ones(n_samples, np.float32), config.model_dump())
    assert image.shape == (4, config.n_frames(n_samples / 8000))
    assert np.isfinite(image).all()


def test_leading_axes_are_kept():
    clips = np.random.default_rng(0).normal(size=(3, 2000)).astype(np.float32)
    together = features(clips, SMALL.model_dump())
    assert together.shape == (3, 40, 13)
    np.testing.assert_allclose(together[2], features(clips[2], SMALL.model_dump()), atol=1e-5)


def test_shortest_clip_works_and_a_shorter_one_is_refused():
    before, _ = frame_padding(10_000, SMALL.n_fft, SMALL.window_samples)
    assert features(np.ones(before + 1, np.float32), SMALL.model_dump()).shape == (40, 1 + (before + 1) // 160)
    with pytest.raises(DataError, match=rf"clip of {before} samples is too short .* at least {before + 1} samples"):
        features(np.ones(before, np.float32), SMALL.model_dump())


def test_odd_n_fft_is_refused():
    with pytest.raises(ValueError, match="n_fft 511 must be even"):
        LogMelConfig(n_fft=511, window_samples=400)


def test_runtime_modules_need_neither_torch_nor_pydantic():
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['torch', 'torchaudio', 'pydantic', 'lightning']))\n"
        "import aum_compress.audio.mel, aum_compress.audio.reading, aum_compress.audio.resample\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
