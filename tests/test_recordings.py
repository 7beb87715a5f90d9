"""Windows between clips: equal to windows of the whole recording, and played faster equal to a faster recording."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aum_compress.audio.config import LogMelConfig
from aum_compress.data.cache import CachedClips
from aum_compress.data.clips import Clip
from aum_compress.data.recordings import Recordings
from aum_compress.data.tau import parse_name

RATE, SAMPLES, PARTS = 8000, 4000, 3
FRONT_END = LogMelConfig(sample_rate_hz=RATE, n_fft=512, window_samples=400, hop_samples=160, n_mels=16)


@pytest.fixture(scope="module")
def whole() -> np.ndarray:
    """A chirp, so that pitch and place can be told."""
    t = np.arange(PARTS * SAMPLES) / RATE
    return np.sin(2 * np.pi * (200 * t + 150 * t**2)).astype(np.float32)


@pytest.fixture(scope="module")
def recordings(whole, tmp_path_factory) -> Recordings:
    """Rows in another order than time's."""
    path = tmp_path_factory.mktemp("cache") / "clips.npy"
    order = [2, 0, 1]
    np.save(path, whole.reshape(PARTS, SAMPLES)[order])
    clips = tuple(clip(part) for part in order)
    return Recordings(CachedClips(clips, ("",) * PARTS, np.arange(PARTS), path, FRONT_END, "waveform"), RATE)


def clip(part: int) -> Clip:
    found = parse_name(Path("root"), f"audio/park-lisbon-7-1234-{part}-s1.wav")
    assert found is not None
    return found


def test_names_of_tau_say_what_follows_what():
    assert clip(1).follows == clip(0).clip_id
    assert clip(0).follows == ""
    assert parse_name(Path("root"), "audio/park-lisbon-7-1234-s1.wav").follows == "", "a ten-second recording, uncut"


@given(shift=st.integers(-SAMPLES, SAMPLES), part=st.integers(0, PARTS - 1))
def test_window_is_that_of_the_whole_recording(recordings, whole, shift, part):
    found = recordings.window(clip(part), shift / RATE, 1.0)
    begin = np.clip(part * SAMPLES + shift, 0, (PARTS - 1) * SAMPLES)
    np.testing.assert_array_equal(found, whole[begin : begin + SAMPLES])


@given(speed=st.integers(50, 200), shift=st.floats(-0.5, 0.5), part=st.integers(0, PARTS - 1))
def test_speed_changes_pitch_and_never_the_length(recordings, speed, shift, part):
    speed /= 100
    found = recordings.window(clip(part), shift, speed)
    assert found.shape == (SAMPLES,)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()


@pytest.mark.parametrize("speed", [0.8, 1.25])
def test_played_faster_the_middle_sounds_higher(recordings, whole, speed):
    """Instantaneous frequency at the middle of the middle clip is that of the recording there, times the speed."""
    found = recordings.window(clip(1), 0.0, speed)
    middle = found[SAMPLES // 2 - 400 : SAMPLES // 2 + 400] * np.hanning(800)
    frequency = np.fft.rfft(middle, 1 << 16)
    peak_hz = np.abs(frequency).argmax() * RATE / (1 << 16)
    assert peak_hz == pytest.approx(speed * (200 + 300 * 0.75), rel=0.01)


def test_lone_clip_is_held_to_itself_and_reflected(recordings):
    alone = Recordings(recordings.waveforms.only([clip(2)]), RATE)
    own = recordings.window(clip(2), 0.0, 1.0)
    np.testing.assert_array_equal(alone.window(clip(2), -0.3, 1.0), own)
    np.testing.assert_array_equal(alone.window(replace(clip(2), follows=""), 0.3, 1.0), own)
    assert np.abs(alone.window(clip(2), 0.0, 2.0)).min(initial=1) < 1, "twice as much sound as there is, reflected"
