"""aum_compress.audio.frontend against torchaudio and against the numpy twin."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from aum_compress.audio.config import LogMelConfig
from aum_compress.audio.front_ends import features
from aum_compress.audio.frontend import LogMel
from aum_compress.audio.reading import read_audio
from aum_compress.audio.torchaudio_compat import transforms
from aum_compress.errors import DataError

DEFAULT = LogMelConfig()
SMALL = LogMelConfig(
    sample_rate_hz=16_000, n_fft=512, window_samples=400, hop_samples=160, n_mels=40, f_min_hz=20.0, f_max_hz=7600.0
)
both = pytest.mark.parametrize("config", [DEFAULT, SMALL], ids=["default", "small"])


def noise(config: LogMelConfig, n_clips: int = 4, level: float = 0.1) -> torch.Tensor:
    return torch.randn(n_clips, config.sample_rate_hz, generator=torch.Generator().manual_seed(3)) * level


def torchaudio_log_mel(config: LogMelConfig, waveforms: torch.Tensor) -> torch.Tensor:
    mel_spectrogram = transforms.MelSpectrogram(
        sample_rate=config.sample_rate_hz,
        n_fft=config.n_fft,
        win_length=config.window_samples,
        hop_length=config.hop_samples,
        f_min=config.f_min_hz,
        f_max=config.f_max_hz,
        n_mels=config.n_mels,
    )
    return torch.log(mel_spectrogram(waveforms) + config.log_offset).unsqueeze(1)


@both
@pytest.mark.parametrize("level", [0.3, 0.003])
def test_equals_torchaudio(config, level):
    waveforms = noise(config, level=level)
    got = LogMel(config)(waveforms)
    assert got.shape == (4, 1, config.n_mels, config.n_frames(1.0))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torchaudio_log_mel(config, waveforms), atol=1e-4, rtol=1e-4)


@both
def test_equals_the_numpy_twin(config):
    waveforms = noise(config)
    twin = features(waveforms.numpy(), config.model_dump())
    np.testing.assert_allclose(LogMel(config)(waveforms)[:, 0].numpy(), twin, atol=1e-4)


def test_equals_torchaudio_and_the_twin_on_real_recordings(real_audio):
    front_end = LogMel(DEFAULT)
    files = sorted((real_audio / "clips").glob("*.wav"))
    assert files
    for path in files:
        samples = read_audio(path, DEFAULT.sample_rate_hz)
        got = front_end(torch.from_numpy(samples)[None])
        away = (got - torchaudio_log_mel(DEFAULT, torch.from_numpy(samples)[None])).abs()
        # Single cells far below a hum in the same frame are float32 rounding noise
        assert away.max() < 5e-3
        assert away.flatten().quantile(0.99) < 1e-4
        assert np.quantile(np.abs(got[0, 0].numpy() - features(samples, DEFAULT.model_dump())), 0.99) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    waveforms = noise(SMALL)
    front_end = LogMel(SMALL)
    with torch.autocast("cpu", dtype=dtype):
        under_autocast = front_end(waveforms)
    assert under_autocast.dtype == torch.float32
    torch.testing.assert_close(under_autocast, front_end(waveforms), rtol=0, atol=0)


def test_bands_apply_the_whole_filterbank():
    # 23 filters: the last band is not full
    config = SMALL.model_copy(update={"n_mels": 23})
    front_end = LogMel(config)
    covered = torch.zeros_like(front_end.mel)
    for bins, filters in front_end._bands:
        covered[bins, filters] = front_end.mel[bins, filters]
    torch.testing.assert_close(covered, front_end.mel, rtol=0, atol=0)
    # 400 filters: the lowest lie between two bins and touch none
    assert LogMel(SMALL.model_copy(update={"n_mels": 400}))(noise(SMALL, 1)).shape == (1, 1, 400, 101)


def test_holds_nothing_that_is_saved_or_counted():
    front_end = LogMel(SMALL)
    assert front_end.state_dict() == {}
    assert list(front_end.parameters()) == []


def test_short_clip_is_refused():
    with pytest.raises(DataError, match="clip of 100 samples is too short"):
        LogMel(SMALL)(torch.zeros(1, 100))


def test_exports_to_one_graph():
    program = torch.export.export(LogMel(SMALL), (noise(SMALL, 1),))
    torch.testing.assert_close(program.module()(noise(SMALL, 1) * 2), LogMel(SMALL)(noise(SMALL, 1) * 2))


def test_torchaudio_imports_in_a_fresh_process_without_a_word():
    code = "from aum_compress.audio.torchaudio_compat import functional, transforms; print(functional.lfilter.__name__)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "lfilter\n", "")
