"""aum_compress.audio.reading: real files in every format, and every way in which a file can be bad."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from aum_compress.audio.reading import AudioInfo, audio_checksum, audio_info, read_audio
from aum_compress.audio.resample import resample
from aum_compress.errors import DataError

RATE = 44_100


def stereo(seconds: float = 0.5) -> np.ndarray:
    """(S, 2): a tone on the left, half of it on the right; their mean has an amplitude of 0.3."""
    left = 0.4 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * RATE)) / RATE)
    return np.stack([left, left / 2], axis=1).astype(np.float32)


def write(path: Path, samples: np.ndarray, subtype: str | None = None, rate: int = RATE) -> Path:
    soundfile.write(path, samples, rate, subtype=subtype)
    return path


@pytest.mark.parametrize(
    ("suffix", "subtype", "tolerance"),
    [
        ("wav", "PCM_16", 2**-15),
        ("wav", "PCM_24", 2**-23),
        ("wav", "FLOAT", 0),
        ("flac", "PCM_16", 2**-15),
        ("ogg", "VORBIS", 0.02),
        ("mp3", "MPEG_LAYER_III", 0.02),
    ],
)
def test_reads_the_mean_of_the_channels(tmp_path, suffix, subtype, tolerance):
    path = write(tmp_path / f"tone.{suffix}", stereo(), subtype)
    samples = read_audio(path, RATE)
    assert samples.dtype == np.float32
    assert samples.shape == (22_050,)
    np.testing.assert_allclose(samples, stereo().mean(axis=1), atol=tolerance)
    assert audio_info(path) == AudioInfo(sample_rate_hz=RATE, n_channels=2, n_samples=22_050)
    assert audio_info(path).seconds == 0.5


def test_resamples_to_the_wanted_rate(tmp_path):
    path = write(tmp_path / "tone.wav", stereo(), "FLOAT")
    np.testing.assert_array_equal(read_audio(path, 32_000), resample(stereo().mean(axis=1), RATE, 32_000))
    assert read_audio(str(path), 32_000).shape == (16_000,)


@pytest.mark.parametrize("rate", [1, 99, 1_536_001, 134_225_728])
def test_a_rate_that_no_audio_has_is_refused_before_it_takes_all_memory(tmp_path, rate):
    """One flipped bit of a header; at 134 MHz the filters of resampling took 24 GB."""
    path = write(tmp_path / "tone.wav", stereo(0.1), "FLOAT", rate=rate)
    for read in (audio_info, lambda path: read_audio(path, 8000)):
        with pytest.raises(
            DataError, match=rf"tone.wav: its header says {rate:,} samples a second, wanted 100 to 1,536,"
        ):
            read(path)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_a_window_is_that_part_of_the_whole(tmp_path, suffix):
    path = tmp_path / f"tone.{suffix}"
    # Seeking in an mp3 file of variable bit rate is where libsndfile goes astray
    varying = {"bitrate_mode": "VARIABLE", "compression_level": 0.5} if suffix == "mp3" else {}
    soundfile.write(path, stereo(1.0), RATE, **varying)
    window = read_audio(path, RATE, start_seconds=0.5, duration_seconds=0.25)
    np.testing.assert_allclose(window, read_audio(path, RATE)[22_050:33_075], atol=1e-6)


def test_a_window_past_the_end_comes_back_shorter(tmp_path):
    path = write(tmp_path / "tone.wav", stereo())
    assert read_audio(path, RATE, start_seconds=0.4, duration_seconds=1.0).shape == (4410,)
    assert read_audio(path, RATE, start_seconds=0.4).shape == (4410,)
    with pytest.raises(DataError, match=r"tone.wav: a window from 0.5 s was wanted, the file ends at 0.5 s"):
        read_audio(path, RATE, start_seconds=0.5, duration_seconds=1.0)


@pytest.mark.parametrize(("start", "duration"), [(-0.1, 1.0), (0.0, 0.0)])
def test_an_impossible_window_is_refused(tmp_path, start, duration):
    path = write(tmp_path / "tone.wav", stereo())
    with pytest.raises(DataError, match=r"tone.wav: cannot read a window"):
        read_audio(path, RATE, start_seconds=start, duration_seconds=duration)


def test_missing_file_and_folder_are_named(tmp_path):
    for reader in (audio_info, lambda path: read_audio(path, RATE)):
        with pytest.raises(DataError, match=r"gone.wav: an audio file was wanted, there is no such file"):
            reader(tmp_path / "gone.wav")
        with pytest.raises(DataError, match="an audio file was wanted, it is a folder"):
            reader(tmp_path)


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "locked.wav", stereo())
    monkeypatch.setattr(os, "access", lambda *_: False)  # root, whom containers run as, may read everything
    with pytest.raises(DataError, match=r"locked.wav: may not be read by this user"):
        read_audio(path, RATE)


@pytest.mark.parametrize("name", ["text.wav", "text.mp3", "text.flac", "text.raw"])
@pytest.mark.parametrize("content", [b"", b"this is no audio at all\n" * 20])
def test_what_is_not_audio_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: cannot be read as audio \(.+\): .*{len(content)} bytes"):
        read_audio(tmp_path / name, RATE)


def test_a_file_without_samples_is_refused(tmp_path):
    path = write(tmp_path / "empty.wav", stereo()[:0])
    with pytest.raises(DataError, match=r"empty.wav: holds no samples"):
        read_audio(path, RATE)


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3"])
def test_a_file_cut_in_half_is_refused(tmp_path, suffix):
    path = write(tmp_path / f"cut.{suffix}", stereo(1.0))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"cut.{suffix}: (is cut short|decoding failed).*copy"):
        read_audio(path, RATE)


def test_a_wav_written_to_a_pipe_is_read(tmp_path):
    # ffmpeg and sox write this data size when they cannot go back to fill in the real one
    path = write(tmp_path / "piped.wav", stereo())
    content = bytearray(path.read_bytes())
    size_at = content.index(b"data") + 4
    content[size_at : size_at + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert read_audio(path, RATE).shape == (22_050,)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_counted_and_placed(tmp_path, bad):
    samples = stereo()
    samples[[4410, 4411], 1] = bad
    path = write(tmp_path / "bad.wav", samples, "FLOAT")
    with pytest.raises(DataError, match=r"bad.wav: 2 of 22050 samples are NaN or infinite, the first at 0.100 s"):
        read_audio(path, RATE)
    assert np.isfinite(read_audio(path, RATE, start_seconds=0.2)).all()


def test_checksum_names_the_samples(tmp_path):
    samples = np.int16(stereo() * 20_000)
    as_wav, as_flac = write(tmp_path / "a.wav", samples), write(tmp_path / "b.flac", samples)
    checksum = audio_checksum(read_audio(as_wav, RATE))
    assert checksum == audio_checksum(read_audio(as_flac, RATE))
    assert checksum != audio_checksum(read_audio(as_wav, RATE)[1:])
    assert audio_checksum(np.array([1.0, -2.0], ">f4")) == hashlib.sha256(b"\0\0\x80\x3f\0\0\0\xc0").hexdigest()
    assert audio_checksum(np.arange(6.0, dtype=np.float32)[::2]) == audio_checksum(np.float32([0, 2, 4]))


def test_real_recordings_are_read(real_audio):
    clip = real_audio / "clips" / "dcase2025-dummy-1s.wav"
    assert audio_info(clip) == AudioInfo(44_100, 1, 44_100)
    assert read_audio(clip, 32_000).shape == (32_000,)
    for path in sorted((real_audio / "tut2018-10").glob("*.wav")):
        assert audio_info(path).n_channels == 2
        samples = read_audio(path, 32_000)
        assert samples.shape == (320_000,)
        assert 1e-3 < np.sqrt(np.mean(samples**2)) < 0.02
