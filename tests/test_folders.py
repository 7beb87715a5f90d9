"""Class folders: formats, windows, groups and folds."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from audio_trees import noise, write_class_folders, write_table

from aum_compress.audio.config import LogMelConfig
from aum_compress.data.cache import cache_index
from aum_compress.data.clips import DataIndex
from aum_compress.data.config import FolderData
from aum_compress.data.folders import audio_files, load_folders
from aum_compress.errors import DataError


def config(root: Path, **settings: object) -> FolderData:
    return FolderData(kind="folders", root=root, **{"clip_seconds": 0.1, **settings})


def everything(index: DataIndex) -> tuple:
    return index.train + index.validation + index.test


def test_windows_stay_together(tmp_path: Path) -> None:
    index = load_folders(config(write_class_folders(tmp_path)), seed=0)
    assert index.labels == ("bark", "rain")
    # 0.35 s are three windows; 20 % and 15 % of ten files are two and one (of the eight left)
    assert [len(part) for part in (index.train, index.validation, index.test)] == [42, 6, 12]
    files = [{clip.path for clip in part} for part in (index.train, index.validation, index.test)]
    assert sum(map(len, files)) == len(set.union(*files)) == 20
    windows = sorted(clip.clip_id for clip in everything(index) if clip.filename == "bark/3.wav")
    assert windows == ["bark/3.wav#0", "bark/3.wav#1", "bark/3.wav#2"]
    assert [clip.start_seconds for clip in everything(index) if clip.clip_id == "bark/3.wav#2"] == [pytest.approx(0.2)]


def test_seed_decides_the_parts(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    assert load_folders(config(tmp_path), 1) == load_folders(config(tmp_path), 1)
    assert len({load_folders(config(tmp_path), seed).test for seed in range(4)}) > 1


def test_formats_rates_channels_and_lengths(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "data", files=3)
    soundfile.write(root / "bark" / "STEREO.WAV", noise(50, 0.25, 48_000, channels=2), 48_000, subtype="PCM_24")
    soundfile.write(root / "bark" / "a.flac", noise(51, 0.2, 16_000), 16_000)
    soundfile.write(root / "rain" / "b.Ogg", noise(52, 0.2, 22_050), 22_050, format="OGG")
    (root / "rain" / "deep").mkdir()
    soundfile.write(root / "rain" / "deep" / "c.mp3", noise(53, 0.3, 44_100), 44_100)
    soundfile.write(root / "rain" / "short.wav", noise(54, 0.04, 11_025), 11_025)
    (root / "rain" / "notes.txt").write_text("no audio")
    (root / ".git").mkdir()
    index = load_folders(config(root), 0)
    windows = Counter(clip.filename for clip in everything(index))
    assert (windows["bark/STEREO.WAV"], windows["bark/a.flac"], windows["rain/b.Ogg"]) == (2, 2, 2)
    assert (windows["rain/deep/c.mp3"], windows["rain/short.wav"], windows["rain/notes.txt"]) == (3, 1, 0)

    parts = cache_index(index, LogMelConfig(sample_rate_hz=8000), what="waveform", cache_dir=tmp_path / "cache")
    cached = {
        clip.clip_id: part[[k]][0]
        for part in (parts.train, parts.validation, parts.test)
        for k, clip in enumerate(part.clips)
    }
    assert len(cached) == len(everything(index))
    assert all(wave.shape == (800,) and np.isfinite(wave).all() for wave in cached.values())
    # a file shorter than its only window is followed by silence
    assert np.ptp(cached["rain/short.wav#0"][:320]) > 0.01
    assert not cached["rain/short.wav#0"][325:].any()
    # the mean of both channels, from the second window's place
    whole, _ = soundfile.read(root / "bark" / "a.flac", dtype="float32")
    assert not np.allclose(cached["bark/a.flac#1"], cached["bark/a.flac#0"])
    assert np.abs(cached["bark/a.flac#1"][50:-50]).max() <= np.abs(whole[1600:]).max()


def test_groups_are_not_split(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    rows = [(f"{name}/{k}.wav", f"source{k // 2}") for name in ("bark", "rain") for k in range(10)]
    write_table(tmp_path / "groups.csv", ("file", "group"), rows, delimiter=",")
    for seed in range(5):
        index = load_folders(config(tmp_path, groups_csv=tmp_path / "groups.csv"), seed)
        groups = [{clip.group for clip in part} for part in (index.train, index.validation, index.test)]
        assert [len(found) for found in groups] == [3, 1, 1]
        assert len(set.union(*groups)) == 5


def test_folds_choose_the_test_part(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    rows = [(f"{name}/{k}.wav", str(1 + k % 5)) for name in ("bark", "rain") for k in range(10)]
    write_table(tmp_path / "folds.csv", ("file", "fold"), rows, delimiter=";")
    index = load_folders(config(tmp_path, groups_csv="folds.csv", test_folds=[2, 5]), 0)
    assert {clip.filename for clip in index.test} == {
        f"{name}/{k}.wav" for name in ("bark", "rain") for k in (1, 4, 6, 9)
    }
    with pytest.raises(DataError, match=r"no file in fold 9 \(data.test_folds\); folds found: 1, 2, 3, 4, 5"):
        load_folders(config(tmp_path, groups_csv="folds.csv", test_folds=["9"]), 0)


def test_group_over_two_folds(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    rows = [(f"{name}/{k}.wav", str(k % 5), f"source{k // 2}") for name in ("bark", "rain") for k in range(10)]
    write_table(tmp_path / "g.csv", ("file", "fold", "group"), rows)
    with pytest.raises(DataError, match="2 groups lie in a test fold and in another"):
        load_folders(config(tmp_path, groups_csv="g.csv", test_folds=[0]), 0)


def test_csv_that_does_not_fit(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    names = [f"{name}/{k}.wav" for name in ("bark", "rain") for k in range(10)]
    for columns, rows, said in (
        (("file", "group"), [(name, name) for name in names[:-1]], r"lacks 1 of the files(.|\n)*rain/9\.wav"),
        (("file", "group"), [(name, name) for name in [*names, names[0]]], r"more than once:(.|\n)*bark/0\.wav"),
        (("file", "size"), [(name, "1") for name in names], "wanted `file` with `group`, `fold` or both"),
        (("name", "group"), [(name, "1") for name in names], "no column file"),
    ):
        write_table(tmp_path / "g.csv", columns, rows)
        with pytest.raises(DataError, match=said):
            load_folders(config(tmp_path, groups_csv="g.csv"), 0)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_folders(config(tmp_path / "absent"), 0)
    with pytest.raises(DataError, match="one folder a class"):
        load_folders(config(tmp_path), 0)
    write_class_folders(tmp_path, classes=("bark",))
    with pytest.raises(DataError, match=r"1 class found \(bark\), wanted at least two"):
        load_folders(config(tmp_path), 0)
    (tmp_path / "hollow").mkdir()
    with pytest.raises(DataError, match=r"class folders without a(.|\n)*hollow"):
        load_folders(config(tmp_path), 0)


def test_hidden_folders_are_not_looked_at(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    wanted = audio_files(tmp_path)
    write_class_folders(tmp_path / "bark", classes=(".Trash",))
    assert audio_files(tmp_path) == wanted


def test_class_with_too_few_files(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    write_class_folders(tmp_path, classes=("siren",), files=1)
    with pytest.raises(DataError, match="cannot cut a test part: all clips of siren are of one group"):
        load_folders(config(tmp_path), 0)


def test_esc10(real_audio: Path) -> None:
    """400 real ogg files of 5 s."""
    index = load_folders(config(real_audio / "esc10", clip_seconds=1.0), 0)
    assert len(index.labels) == 10
    assert len({clip.path for clip in everything(index)}) == 400
    assert len({clip.path for clip in index.test}) == 80
