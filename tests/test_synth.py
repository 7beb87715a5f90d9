"""The synthetic soundscapes: reproducible, in TAU's layout, sound, and not to be told by their average spectrum."""

import errno
import hashlib
import math
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from aum_compress.audio.mel import log_mel
from aum_compress.data import synth
from aum_compress.data.clips import Clip, DataIndex
from aum_compress.data.config import TauData
from aum_compress.data.synth import write_soundscapes
from aum_compress.data.synth_devices import DEVICES, record, response
from aum_compress.data.synth_scenes import (
    EVENT_RATE_HZ,
    SAMPLE_RATE_HZ,
    SCENES,
    Train,
    make_place,
    onsets,
    play,
    smooth_response,
    soundscape,
    voice,
)
from aum_compress.data.tau import UNSEEN_DEVICES, load_tau
from aum_compress.errors import DataError

TRAIN_CLIPS, TEST_CLIPS = 32, 12


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("soundscapes")
    write_soundscapes(root, seed=0, train_clips_per_class=TRAIN_CLIPS, test_clips_per_class=TEST_CLIPS)
    return root


@pytest.fixture(scope="module")
def index(tree: Path) -> DataIndex:
    return load_tau(TauData(kind="tau", root=tree, train_split="100"), seed=0)


def small(root: Path, seed: int = 0, **changes) -> dict[str, str]:
    """A tiny tree; SHA-256 of its files by name."""
    counts = {"train_clips_per_class": 2, "test_clips_per_class": 1, "clip_seconds": 0.2} | changes
    write_soundscapes(root, seed=seed, **counts)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- the same, and others


def test_same_seed_same_bytes(tmp_path):
    assert small(tmp_path / "first") == small(tmp_path / "second")


def test_other_seed_other_sounds(tmp_path):
    first, second = small(tmp_path / "first"), small(tmp_path / "second", seed=1)
    assert first.keys() == second.keys()
    assert not {first[name] for name in first if name.endswith(".wav")} & set(second.values())


def test_larger_set_holds_the_smaller(tmp_path):
    first, larger = small(tmp_path / "first"), small(tmp_path / "larger", train_clips_per_class=9)
    clips = {name: digest for name, digest in first.items() if name.endswith(".wav")}
    assert clips.items() <= larger.items()
    assert len(larger) == len(first) + 7 * len(SCENES)


# --- layout


def test_loads_as_tau(index):
    assert index.labels == tuple(sorted(SCENES))
    assert len(index.train) + len(index.validation) == TRAIN_CLIPS * len(SCENES)
    assert len(index.test) == TEST_CLIPS * len(SCENES)
    for label in index.labels:
        assert sum(clip.label == label for clip in index.test) == TEST_CLIPS


def test_devices_as_in_tau(index):
    heard = {clip.device for clip in index.test}
    assert heard == set(DEVICES)
    assert index.seen_devices == {"a", "b", "c", "s1", "s2", "s3"}
    assert heard - index.seen_devices == UNSEEN_DEVICES


def test_places_stay_apart(index):
    trained = {clip.group for clip in index.train + index.validation}
    assert not trained & {clip.group for clip in index.test}
    scenes = defaultdict(set)
    for clip in index.train + index.validation + index.test:
        scenes[clip.group].add(clip.label)
    assert all(len(labels) == 1 for labels in scenes.values())
    assert len(scenes) == 12 * len(SCENES)


@pytest.mark.parametrize("part", [synth._TRAIN, synth._TEST])
def test_every_place_meets_every_device(part):
    rounds = range(len(part.devices))
    for place in range(len(part.places)):
        devices = [part.devices[(turn * (len(part.places) + 1) + place) % len(part.devices)] for turn in rounds]
        assert sorted(devices) == sorted(part.devices)


def test_tables(tree):
    def rows(name: str) -> list[list[str]]:
        return [line.split("\t") for line in (tree / name).read_text(encoding="utf-8").splitlines()]

    meta = rows("meta.csv")
    assert meta[0] == ["filename", "scene_label", "identifier", "source_label"]
    for filename, scene, identifier, device in meta[1:]:
        stem = Path(filename).stem.split("-")
        assert len(stem) == 6
        assert (stem[0], "-".join(stem[1:3]), stem[5]) == (scene, identifier, device)
    train, evaluate, test = (rows(f"evaluation_setup/fold1_{name}.csv") for name in ("train", "evaluate", "test"))
    assert train[0] == evaluate[0] == ["filename", "scene_label"]
    assert train[1:] + evaluate[1:] == [row[:2] for row in meta[1:]]
    assert test == [[row[0]] for row in evaluate]
    on_disk = {f"audio/{path.name}" for path in (tree / "audio").iterdir()}
    assert on_disk == {row[0] for row in meta[1:]}


@pytest.mark.parametrize("clip_seconds", [0.1, 0.33337, 1.0])
def test_clip_length(tmp_path, clip_seconds):
    small(tmp_path, clip_seconds=clip_seconds)
    for path in (tmp_path / "audio").iterdir():
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype) == (SAMPLE_RATE_HZ, 1, "PCM_16")
        assert abs(info.frames - clip_seconds * SAMPLE_RATE_HZ) <= 1


# --- sound


def test_neither_clipped_nor_silent(tree):
    for path in (tree / "audio").iterdir():
        samples, _ = soundfile.read(path, dtype="int16")
        assert 50 < np.abs(samples.astype(int)).max() < 32767, path.name
        assert 10 < np.sqrt(np.mean(samples.astype(float) ** 2)) < 10_000, path.name
        assert abs(samples.mean()) < 20, path.name


def test_soundscape_is_finite_and_at_its_level():
    place = make_place(generator(), "bus", "arden", 0, SAMPLE_RATE_HZ)
    samples = np.fft.irfft(soundscape(generator(1), place, SAMPLE_RATE_HZ), SAMPLE_RATE_HZ)
    assert np.isfinite(samples).all()
    level_db = 20 * np.log10(np.sqrt(np.mean(samples**2)))
    assert level_db == pytest.approx(place.level_db, abs=12)  # 3 dB standard deviation


@settings(max_examples=30, deadline=None)
@given(
    rhythm=st.sampled_from(["regular", "paired", "irregular"]),
    rate=st.floats(1.0, 15.0),
    seconds=st.floats(0.1, 5.0),
    seed=st.integers(0, 1000),
)
def test_onsets_cover_the_clip(rhythm, rate, seconds, seed):
    times = onsets(generator(seed), Train(rhythm, (rate, rate), (0.1, 0.2), "strike"), seconds)
    assert (np.diff(times) >= 0).all()
    assert abs(len(times) - seconds * rate) <= 2
    assert times[0] * rate < 0.5
    assert (seconds - times[-1]) * rate < 1.8
    gaps = np.diff(times) * rate
    if rhythm == "regular":
        np.testing.assert_allclose(gaps, 1, atol=0.2)
    if rhythm == "irregular" and len(gaps) > 10:
        assert gaps.std() > 0.08  # 0.03 when regular
    if rhythm == "paired":
        assert (gaps[::2] < 0.6).all()
        assert (gaps[1::2] > 1.4).all()


@settings(max_examples=15, deadline=None)
@given(pitch_hz=st.floats(200.0, 4000.0), seed=st.integers(0, 1000))
def test_voice_sings_its_pitch(pitch_hz, seed):
    tone, breath = (voice(generator(seed), np.full(EVENT_RATE_HZ, pitch_hz), breath) for breath in (0.002, 0.5))
    spectra = [np.abs(np.fft.rfft(wave)) ** 2 for wave in (tone, breath)]
    assert np.argmax(spectra[0][1:]) + 1 == pytest.approx(pitch_hz, rel=0.02)
    near = slice(round(pitch_hz * 0.95), round(pitch_hz * 1.05))
    shares = [spectrum[near].sum() / spectrum[1:].sum() for spectrum in spectra]
    assert shares[0] > 0.5 > shares[1]


@pytest.mark.parametrize(
    ("scene", "direction"), [("airport", 1), ("metro_station", -1), ("park", 1), ("public_square", -1)]
)
def test_glides_go_their_scenes_way(scene, direction):
    steps = []
    for seed in range(10):  # voices from tone to noise
        wave = play(generator(seed), SCENES[scene].train, 1000.0, EVENT_RATE_HZ)
        frames = wave[: len(wave) // 512 * 512].reshape(-1, 512)
        power = np.abs(np.fft.rfft(frames * np.hanning(512))) ** 2
        loud = power.sum(1) > 0.02 * power.sum(1).max()
        centroid = power @ np.arange(power.shape[1]) / power.sum(1).clip(1e-12)
        steps.append(np.diff(centroid)[loud[1:] & loud[:-1]])
    # within an event pitch moves one way in many small steps, between events it jumps back
    assert np.sign(np.median(np.concatenate(steps))) == direction


def test_strikes_are_swells_with_an_attack():
    def asymmetry(shape: str) -> float:
        """Energy in the first half of an event against the second's."""
        wave = play(generator(2), Train("regular", (1.0, 1.0), (1.0, 1.0), shape), 500.0, 4 * EVENT_RATE_HZ)
        energy = np.add.reduceat(wave**2, np.arange(0, len(wave), EVENT_RATE_HZ // 20))
        return float(np.diff(energy).max() / -np.diff(energy).min())

    assert asymmetry("strike") > 2 * asymmetry("swell")


# --- devices


def test_devices_differ_but_stay_the_same():
    bins = np.geomspace(50, 16_000, 100).astype(int)
    responses = {name: 20 * np.log10(response(name, SAMPLE_RATE_HZ)[bins]) for name in DEVICES}
    names = list(DEVICES)
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            assert np.std(responses[first] - responses[second]) > 1.0, (first, second)
    response.cache_clear()
    assert np.array_equal(20 * np.log10(response("s6", SAMPLE_RATE_HZ)[bins]), responses["s6"])


def test_response_is_of_the_device_not_of_the_length():
    """At equal frequencies."""
    np.testing.assert_allclose(response("b", SAMPLE_RATE_HZ)[::2], response("b", SAMPLE_RATE_HZ // 2), rtol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
def test_compressor_brings_levels_together(device):
    place = make_place(generator(), "park", "arden", 0, SAMPLE_RATE_HZ)
    spectrum = soundscape(generator(1), place, SAMPLE_RATE_HZ)
    quiet, loud = (record(generator(2), device, gain * spectrum, SAMPLE_RATE_HZ) for gain in (0.5, 2.0))
    apart_db = 20 * math.log10(np.linalg.norm(loud) / np.linalg.norm(quiet))
    assert apart_db == pytest.approx(12.04 / DEVICES[device].ratio, abs=1.5)


def test_overload_is_limited():
    heard = record(generator(), "s5", 1e6 * np.ones(SAMPLE_RATE_HZ // 2 + 1, dtype=complex), SAMPLE_RATE_HZ)
    assert np.isfinite(heard).all()
    assert np.abs(heard).max() <= 1.0


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), ripple_db=st.floats(0.0, 10.0))
def test_smooth_response_is_a_gain(seed, ripple_db):
    gains = smooth_response(generator(seed), 4410, ripple_db=ripple_db)
    assert gains.shape == (2206,)
    assert (gains > 0).all()
    assert np.abs(20 * np.log10(gains)).max() <= 6 * ripple_db + 1e-9


# --- hardness


def test_average_spectrum_says_little(index):
    """Above chance (10 %), for scenes have habits, but far below a student (benchmarks/synth_hardness.py)."""

    def features(clips: tuple[Clip, ...]) -> np.ndarray:
        samples = np.stack([soundfile.read(clip.path, dtype="float32")[0] for clip in clips])
        spectrum = log_mel(
            samples,
            sample_rate_hz=SAMPLE_RATE_HZ,
            n_fft=2048,
            window_samples=2048,
            hop_samples=2048,
            n_mels=64,
            f_min_hz=0.0,
            f_max_hz=8000.0,
            log_offset=1e-5,
        )
        return spectrum.mean(-1)

    train = index.train + index.validation
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.03, max_iter=500))
    model.fit(features(train), [clip.label for clip in train])
    accuracy = model.score(features(index.test), [clip.label for clip in index.test])
    assert 0.15 < accuracy < 0.45


# --- errors


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"seed": -1}, "data.seed is -1"),
        ({"train_clips_per_class": 0}, "data.train_clips_per_class is 0"),
        ({"test_clips_per_class": -3}, "data.test_clips_per_class is -3"),
        ({"clip_seconds": 0.05}, "data.clip_seconds is 0.05, wanted a number from 0.1 up"),
        ({"clip_seconds": math.nan}, "data.clip_seconds is nan"),
        ({"clip_seconds": math.inf}, "data.clip_seconds is inf"),
    ],
)
def test_refuses_arguments(tmp_path, changes, found):
    with pytest.raises(DataError, match=found):
        small(tmp_path / "root", **changes)
    assert not (tmp_path / "root").exists()


def test_refuses_a_folder_in_use(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(DataError, match=r"holds thesis\.txt already"):
        small(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_refuses_a_file_for_a_root(tmp_path):
    (tmp_path / "root").write_text("a file")
    with pytest.raises(DataError, match="cannot hold soundscapes"):
        small(tmp_path / "root")


def test_stopped_halfway_leaves_nothing(tmp_path):
    def stop(done: int, total: int) -> None:
        assert total == 30
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small(tmp_path / "root", progress=stop)
    assert list((tmp_path / "root").iterdir()) == []
    assert len(small(tmp_path / "root")) == 34  # and the next attempt goes through


def test_full_disk(tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(synth.soundfile, "write", full)
    with pytest.raises(DataError, match="No space left on device"):
        small(tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == []


def test_progress_counts_every_clip(tmp_path):
    seen = []
    small(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 30) for done in range(1, 31)]


def test_needs_no_torch():
    program = "import sys, aum_compress.data.synth; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
