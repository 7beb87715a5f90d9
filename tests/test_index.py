"""From the recipe's data section to an index; soundscapes are generated once and whole."""

import json
from pathlib import Path

import pytest
from audio_trees import SECONDS, write_class_folders, write_tau_tree

from aum_compress.data import index, synth
from aum_compress.data.config import FolderData, SynthData, TauData
from aum_compress.data.index import load_index
from aum_compress.errors import DataError

SMALL = {"kind": "synth", "train_clips_per_class": 8, "test_clips_per_class": 4, "clip_seconds": 0.1}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUM_CACHE", str(tmp_path / "cache"))


def test_each_kind(tmp_path: Path) -> None:
    tau = load_index(TauData(kind="tau", root=write_tau_tree(tmp_path / "tau"), clip_seconds=SECONDS), 0)
    assert len(tau.test) == 18
    folders = load_index(FolderData(kind="folders", root=write_class_folders(tmp_path / "f"), clip_seconds=0.1), 0)
    assert folders.labels == ("bark", "rain")


def test_soundscapes_are_generated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    first = load_index(SynthData(**SMALL), 0, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (120, 120)
    assert len(first.labels) == 10
    assert (len(first.train) + len(first.validation), len(first.test)) == (80, 40)
    assert all(clip.path.is_file() for clip in first.train + first.validation + first.test)
    assert not {clip.group for clip in first.train + first.validation} & {clip.group for clip in first.test}
    monkeypatch.setattr(synth, "write_soundscapes", None)
    assert load_index(SynthData(**SMALL), 0) == first


def test_other_settings_are_other_soundscapes(tmp_path: Path) -> None:
    one, other = load_index(SynthData(**SMALL), 0), load_index(SynthData(**SMALL, seed=1), 0)
    assert one.root != other.root
    assert one.test[0].path.read_bytes() != other.test[0].path.read_bytes()
    root = tmp_path / "here"
    assert load_index(SynthData(**SMALL, root=root), 0).root == root
    with pytest.raises(DataError, match=r"here: wanted soundscapes of .*'seed': 1.*, found .*'seed': 0"):
        load_index(SynthData(**SMALL, root=root, seed=1), 0)


def test_interrupted_generation_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_index(SynthData(**SMALL), 0, progress=interrupt)
    assert not [path for path in (tmp_path / "cache" / "soundscapes").iterdir() if path.is_dir()]
    whole = load_index(SynthData(**SMALL), 0)
    assert len(whole.test) == 40
    # a kill without mercy leaves a partial tree; the next run clears it away
    partial = whole.root.rename(whole.root.with_name(f"{whole.root.name}.partial"))
    (partial / "meta.csv").unlink()
    assert load_index(SynthData(**SMALL), 0) == whole
    assert not partial.exists()


def test_folder_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("private")
    with pytest.raises(DataError, match=r"mine: wanted soundscapes of .*, found other files"):
        load_index(SynthData(**SMALL, root=tmp_path / "mine"), 0)
    assert (tmp_path / "mine" / "diary.txt").read_text() == "private"


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="soundscapes cannot be written there"):
        load_index(SynthData(**SMALL, root=tmp_path / "file" / "below"), 0)


def test_settings_stand_beside_the_audio() -> None:
    root = load_index(SynthData(**SMALL), 0).root
    settings = json.loads((root / index._SETTINGS_FILE).read_text())
    assert settings["train_clips_per_class"] == 8
