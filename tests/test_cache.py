"""The feature cache: computed once, told from a damaged one, never half-written."""

import logging
import pickle
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from audio_trees import SECONDS, TAU_RATE_HZ, noise, tau_names, write_tau_tree

from aum_compress.audio import front_ends
from aum_compress.audio.config import LogMelConfig
from aum_compress.audio.reading import audio_checksum, read_audio
from aum_compress.data import cache
from aum_compress.data.cache import CachedClips, CachedParts, cache_clips, cache_index, feature_statistics
from aum_compress.data.clips import Clip, DataIndex
from aum_compress.data.config import TauData, cache_root
from aum_compress.data.tau import load_tau
from aum_compress.errors import DataError

FRONT_END = LogMelConfig(sample_rate_hz=8000, n_fft=256, window_samples=200, hop_samples=80, n_mels=20)


@pytest.fixture(scope="module")
def shared_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tau_tree(tmp_path_factory.mktemp("shared") / "tau")


def index_of(tree: Path) -> DataIndex:
    return load_tau(TauData(kind="tau", root=tree, clip_seconds=SECONDS), seed=0)


def cached_parts(tree: Path, folder: Path, **settings: object) -> CachedParts:
    return cache_index(index_of(tree), FRONT_END, cache_dir=folder, **settings)


@pytest.fixture
def few(shared_tree: Path) -> tuple[Clip, ...]:
    return index_of(shared_tree).test[:5]


def features(clips: tuple[Clip, ...], folder: Path, **settings: object) -> CachedClips:
    return cache_clips(clips, FRONT_END, SECONDS, cache_dir=folder, **settings)


def test_features_are_those_of_the_files(shared_tree: Path, tmp_path: Path) -> None:
    parts = cached_parts(shared_tree, tmp_path)
    index = index_of(shared_tree)
    assert parts.index == index
    for cached, clips in ((parts.train, index.train), (parts.validation, index.validation), (parts.test, index.test)):
        assert cached.clips == clips
        assert cached[:].shape == (len(clips), 20, 11)
        assert cached[:].dtype == np.float32
        for k in (0, len(clips) - 1):
            wanted = front_ends.features(read_audio(clips[k].path, 8000)[:800], FRONT_END.model_dump())
            np.testing.assert_allclose(cached[[k]][0], wanted, atol=1e-5)
            assert cached.checksums[k] == audio_checksum(read_audio(clips[k].path, TAU_RATE_HZ))


def test_waveforms(few: tuple[Clip, ...], tmp_path: Path) -> None:
    cached = features(few, tmp_path, what="waveform")
    assert cached[1:3].shape == (2, 800)
    np.testing.assert_array_equal(cached[[4]][0], read_audio(few[4].path, 8000)[:800])


def test_second_time_nothing_is_decoded(few: tuple[Clip, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = features(few, tmp_path)
    monkeypatch.setattr(cache, "examine_files", None)
    again = features(few[::-1], tmp_path)
    np.testing.assert_array_equal(again[:], first[:][::-1])
    assert again.checksums == first.checksums[::-1]


def test_other_cut_into_parts_is_the_same_entry(shared_tree: Path, tmp_path: Path) -> None:
    config = TauData(kind="tau", root=shared_tree, clip_seconds=SECONDS, validation_fraction=0.4)
    one, other = cached_parts(shared_tree, tmp_path), cache_index(load_tau(config, 5), FRONT_END, cache_dir=tmp_path)
    assert len(other.validation) > len(one.validation)
    assert one.train.path == other.train.path


def test_key_follows_files_and_front_end(few: tuple[Clip, ...], tmp_path: Path) -> None:
    def entry(front_end: LogMelConfig = FRONT_END, what: str = "logmel", clip_seconds: float = SECONDS) -> Path:
        return cache_clips(few, front_end, clip_seconds, what=what, cache_dir=tmp_path).path

    more_mels = FRONT_END.model_copy(update={"n_mels": 24})
    assert entry() == entry()
    assert len({entry(), entry(more_mels), entry(clip_seconds=0.05), entry(what="waveform")}) == 4
    # waveforms know nothing of mel bins
    assert entry(what="waveform") == entry(more_mels, what="waveform")
    copy = tmp_path / "copy.wav"
    copy.write_bytes(few[0].path.read_bytes())
    clip = Clip("copy.wav", copy, "airport", "a", "g")
    before = features((clip,), tmp_path)
    soundfile.write(copy, noise(999), TAU_RATE_HZ)
    after = features((clip,), tmp_path)
    assert before.path != after.path
    assert before.checksums != after.checksums


def test_a_file_that_may_be_read_again_is_read(few: tuple[Clip, ...], tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "access", lambda path, mode: Path(path) != few[0].path)
        with pytest.raises(DataError, match="1 of 5 files cannot be used"):
            features(few, tmp_path)
    assert len(features(few, tmp_path)) == 5


def test_bad_files_stop_or_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree = write_tau_tree(tmp_path / "tau")
    names = tau_names()
    (tree / names[0][0]).unlink()
    (tree / names[1][2]).write_bytes(b"nothing")
    folder = tmp_path / "cache"
    with pytest.raises(DataError) as caught:
        cached_parts(tree, folder)
    assert "2 of 90 files cannot be used" in str(caught.value)
    assert names[0][0] in str(caught.value)
    assert names[1][2] in str(caught.value)
    parts = cached_parts(tree, folder, on_bad_files="skip")
    assert "2 of 90 files cannot be used and are left out" in caplog.text
    assert len(parts.train) + len(parts.validation) + len(parts.test) == 88
    assert len(parts.test) == len(parts.index.test) == 17
    for k, clip in enumerate(parts.test.clips):
        assert parts.test.checksums[k] == audio_checksum(read_audio(clip.path, TAU_RATE_HZ))


def test_other_policy_decodes_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = write_tau_tree(tmp_path / "tau")
    (tree / tau_names()[0][0]).unlink()
    with pytest.raises(DataError, match="1 of 90"):
        cached_parts(tree, tmp_path / "cache")
    monkeypatch.setattr(cache, "examine_files", None)
    assert len(cached_parts(tree, tmp_path / "cache", on_bad_files="skip").train.clips) > 0


def test_class_that_only_has_bad_files(tmp_path: Path) -> None:
    tree = write_tau_tree(tmp_path / "tau")
    for name in tau_names()[0]:
        if name.startswith("audio/airport"):
            (tree / name).write_bytes(b"")
    with pytest.raises(DataError, match="no training clips of airport"):
        cached_parts(tree, tmp_path / "cache", on_bad_files="skip")


def test_file_shorter_than_the_front_end_needs(few: tuple[Clip, ...], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too short for frames"):
        cache_clips(few, FRONT_END, 0.005, cache_dir=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def cut(entry: Path) -> None:
    data = (entry / "clips.npy").read_bytes()
    (entry / "clips.npy").write_bytes(data[:-4])


def flip(entry: Path) -> None:
    data = bytearray((entry / "clips.npy").read_bytes())
    data[-9] ^= 1
    (entry / "clips.npy").write_bytes(data)


def edit_index(entry: Path) -> None:
    text = (entry / "index.json").read_text()
    (entry / "index.json").write_text(text.replace('"silent_windows": 0', '"silent_windows": 1'))


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        flip,
        edit_index,
        lambda entry: (entry / "index.json").write_text("{"),
        lambda entry: (entry / "index.json").write_text("[1]"),
        lambda entry: (entry / "index.json").unlink(),
        lambda entry: (entry / "clips.npy").unlink(),
    ],
    ids=["cut", "one bit", "index edited", "index cut", "index of another kind", "no index", "no clips"],
)
def test_damaged_entry_is_built_again(few: tuple[Clip, ...], tmp_path: Path, damage, caplog) -> None:
    cached = features(few, tmp_path)
    wanted = cached[:]
    damage(cached.path.parent)
    again = features(few, tmp_path)
    assert "cut short or altered" in caplog.text
    np.testing.assert_array_equal(again[:], wanted)


def test_killed_build_leaves_nothing_that_counts(few: tuple[Clip, ...], tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        features(few, tmp_path, progress=interrupt)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    # a kill without mercy leaves the partial entry; the next build clears it away
    wanted = features(few, tmp_path / "elsewhere")
    partial = tmp_path / f"{wanted.path.parent.name}.partial"
    partial.mkdir()
    (partial / "clips.npy").write_bytes(b"\x93NUMPY half of it")
    np.testing.assert_array_equal(features(few, tmp_path)[:], wanted[:])
    assert not partial.exists()


def test_progress_counts_files(few: tuple[Clip, ...], tmp_path: Path) -> None:
    seen = []
    features(few, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(k, 5) for k in range(1, 6)]


def test_two_at_once_build_once(few: tuple[Clip, ...], tmp_path: Path) -> None:
    seen = []
    with ThreadPoolExecutor(2) as pool:
        run = lambda _: features(few, tmp_path, progress=lambda done, total: seen.append(done))[:]  # noqa: E731
        one, other = pool.map(run, range(2))
    np.testing.assert_array_equal(one, other)
    assert seen == [1, 2, 3, 4, 5]


def test_no_room(few: tuple[Clip, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = cache.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DataError) as caught:
        features(few, tmp_path)
    for said in (str(tmp_path), "4,400 bytes", "No space left", "AUM_CACHE"):
        assert said in str(caught.value)


def test_disk_that_fills_up_on_the_way(few: tuple[Clip, ...], tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(DataError, match="cannot keep 16,000 bytes"):
            features(few, tmp_path, what="waveform")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_folder_that_is_a_file(few: tuple[Clip, ...], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot keep"):
        features(few, tmp_path / "file")


def test_windows_without_sound_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = noise(1, 3 * SECONDS, 8000)
    samples[800:1600] = 0
    soundfile.write(tmp_path / "x.wav", samples, 8000)
    clips = [Clip(f"x.wav#{k}", tmp_path / "x.wav", "a", "", "g", k * SECONDS) for k in range(3)]
    with caplog.at_level(logging.INFO):
        cached = features(tuple(clips), tmp_path / "cache", what="waveform")
    assert [clip.clip_id for clip in cached.clips] == ["x.wav#0", "x.wav#2"]
    np.testing.assert_allclose(cached[[1]][0], samples[1600:], atol=1e-4)
    assert "1 windows without sound" in caplog.text


def test_statistics(shared_tree: Path, tmp_path: Path) -> None:
    parts = cached_parts(shared_tree, tmp_path)
    values = parts.train[:]
    assert feature_statistics(parts.train) == pytest.approx((values.mean(), values.std()), rel=1e-5)
    waveforms = cached_parts(shared_tree, tmp_path, what="waveform")
    assert feature_statistics(waveforms.train) == pytest.approx(feature_statistics(parts.train), rel=1e-5)


def test_copy_for_a_worker_carries_no_audio(shared_tree: Path, tmp_path: Path) -> None:
    cached = cached_parts(shared_tree, tmp_path).train
    sent = pickle.dumps(cached)
    assert len(sent) < cached[:].nbytes / 2
    np.testing.assert_array_equal(pickle.loads(sent)[[3]], cached[[3]])


def test_cache_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, few: tuple[Clip, ...]) -> None:
    monkeypatch.setenv("AUM_CACHE", str(tmp_path / "mine"))
    assert cache_root() == tmp_path / "mine"
    cached = cache_clips(few, FRONT_END, SECONDS)
    assert cached.path.is_relative_to(tmp_path / "mine" / "features")
    monkeypatch.delenv("AUM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache_root.__globals__["sys"], "platform", "linux")
    assert cache_root() == tmp_path / "aum-compress"
