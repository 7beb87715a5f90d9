"""`data check`: every way in which a file can be bad, found in one pass."""

import csv
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from audio_trees import (
    META_COLUMNS,
    SECONDS,
    TAU_RATE_HZ,
    meta_row,
    noise,
    tau_names,
    write_class_folders,
    write_tau_tree,
)

from aum_compress.data import examine
from aum_compress.data.check import check_data, write_reports
from aum_compress.data.config import TauData
from aum_compress.data.examine import BadFile, examine_files, stop_or_skip
from aum_compress.data.folders import windows
from aum_compress.data.tau import load_tau
from aum_compress.errors import DataError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tau_tree(tmp_path / "tau")


def spoil(tree: Path) -> dict[str, str]:
    """Make one training file bad in every way; the reasons by name."""
    names = tau_names()[0]
    good = noise(1)
    (tree / names[0]).unlink()
    (tree / names[1]).write_bytes(b"RIFF but not a wav file")
    soundfile.write(tree / names[2], np.zeros(0), TAU_RATE_HZ)
    soundfile.write(tree / names[3], np.where(np.arange(len(good)) == 7, np.nan, good), TAU_RATE_HZ, subtype="FLOAT")
    soundfile.write(tree / names[4], noise(2, rate=22_050), 22_050)
    soundfile.write(tree / names[5], good[: len(good) // 2], TAU_RATE_HZ)
    # a microphone that is stuck off zero is as silent as one that is switched off
    soundfile.write(tree / names[6], np.full(len(good), 0.25), TAU_RATE_HZ)
    shutil.copy(tree / names[8], tree / names[9])
    cut = (tree / names[10]).read_bytes()
    (tree / names[10]).write_bytes(cut[: len(cut) // 2])
    soundfile.write(tree / names[11], np.where(np.arange(len(good)) == 7, np.inf, good), TAU_RATE_HZ, subtype="FLOAT")
    reasons = "missing unreadable empty not_finite wrong_rate too_short silent duplicate unreadable not_finite"
    return dict(zip([*names[:7], *names[9:12]], reasons.split(), strict=True))


def test_whole_tree(tree: Path) -> None:
    seen = []
    report = check_data(tree, clip_seconds=SECONDS, progress=lambda done, total: seen.append((done, total)))
    assert report.bad == ()
    assert seen == [(done, 90) for done in range(1, 91)]
    summary = report.summary()
    assert summary["usable"] == summary["files"] == 90
    assert summary["by_class"] == {"airport": 30, "metro_station": 30, "street_traffic": 30}
    assert summary["by_device"] == {"a": 42, "b": 18, "s1": 24, "s4": 6}
    assert summary["by_sample_rate_hz"] == {"44100": 90}


def test_every_reason(tree: Path, tmp_path: Path) -> None:
    reasons = spoil(tree)
    unlisted, nameless = "audio/airport-oslo-1-1-1-a.wav", "audio/take 2.wav"
    soundfile.write(tree / unlisted, noise(3), TAU_RATE_HZ)
    soundfile.write(tree / nameless, noise(4), TAU_RATE_HZ)
    reasons |= {unlisted: "absent_in_meta", nameless: "unknown_name"}
    report = check_data(tree, clip_seconds=SECONDS)
    assert {file.filename: file.reason for file in report.bad} == reasons
    assert report.summary()["by_reason"] == {
        "absent_in_meta": 1, "duplicate": 1, "empty": 1, "missing": 1, "not_finite": 2, "silent": 1, "too_short": 1,
        "unknown_name": 1, "unreadable": 2, "wrong_rate": 1,
    }  # fmt: skip
    details = {file.filename: file.detail for file in report.bad}
    assert tau_names()[0][8] in details[tau_names()[0][9]]
    assert "22050 Hz, wanted 44100 Hz" in details[tau_names()[0][4]]

    clean, rejected = write_reports(report, tmp_path / "lists")
    with rejected.open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert rows[0] == ["filename", "reason", "detail"]
    assert {row[0]: row[1] for row in rows[1:]} == reasons
    with clean.open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert rows[0] == list(META_COLUMNS)
    assert len(rows) == 1 + 90 - 10
    assert all(tuple(row) == meta_row(row[0]) for row in rows[1:])
    # meta_clean.csv is a meta.csv
    shutil.copy(clean, tree / "meta.csv")
    assert len(load_tau(TauData(kind="tau", root=tree, clip_seconds=SECONDS), 0).test) == 18


def test_without_meta_the_lists_say_what_is_missing(tmp_path: Path) -> None:
    tree = write_tau_tree(tmp_path / "tau", meta=False)
    gone = tau_names()[1][0]
    (tree / gone).unlink()
    assert [(file.filename, file.reason) for file in check_data(tree, clip_seconds=SECONDS).bad] == [(gone, "missing")]


def test_class_folders(tmp_path: Path) -> None:
    root = write_class_folders(tmp_path / "data", files=3)
    soundfile.write(root / "rain" / "fast.wav", noise(9, 0.2, 16_000), 16_000)
    soundfile.write(root / "rain" / "blip.wav", noise(9, 0.005, 8000), 8000)
    shutil.copy(root / "bark" / "0.wav", root / "rain" / "again.wav")
    bad = [(file.filename, file.reason) for file in check_data(root, clip_seconds=0.1).bad]
    assert bad == [("rain/again.wav", "duplicate"), ("rain/blip.wav", "too_short")]
    held_to_rate = check_data(root, clip_seconds=0.1, sample_rate_hz=8000)
    assert ("rain/fast.wav", "wrong_rate") in [(file.filename, file.reason) for file in held_to_rate.bad]
    assert [clip.label for clip, _ in held_to_rate.good] == ["bark"] * 3 + ["rain"] * 3


def test_lists_that_cannot_be_written(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write the lists"):
        write_reports(check_data(tree, clip_seconds=SECONDS), tmp_path / "file")


def test_root_that_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        check_data(tmp_path / "absent")


def test_long_file_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each window is the audio of its own place, and one without sound is passed over."""
    monkeypatch.setattr(examine, "_READ_SECONDS", 3)
    samples = noise(5, 7.5, 8000)
    samples[800:1600] = 0
    (tmp_path / "x").mkdir()
    soundfile.write(tmp_path / "x" / "long.wav", samples, 8000, subtype="FLOAT")
    report = check_data(tmp_path, clip_seconds=0.1)
    clip, file = report.good[0]
    assert (clip.filename, file.seconds) == ("x/long.wav", 7.5)
    assert list(file.checksums) == [f"x/long.wav#{k}" for k in range(75) if k != 1]

    heard = {}
    whole = examine.read_audio(tmp_path / "x" / "long.wav", 8000)
    examine_files(windows(clip, 0.1), 0.1, 0.0, take=lambda clip, samples, rate: heard.update({clip.clip_id: samples}))
    for k in (0, 29, 30, 74):
        np.testing.assert_array_equal(heard[f"x/long.wav#{k}"], whole[800 * k : 800 * (k + 1)])


def test_each_file_is_decoded_once(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(examine, "read_audio", lambda path, *a, **k: read.append(path) or noise(len(read)).astype("f4"))
    check_data(tree, clip_seconds=SECONDS)
    assert len(read) == len(set(read)) == 90


def test_stop_names_all_and_skip_says_how_many(caplog: pytest.LogCaptureFixture) -> None:
    bad = [BadFile(f"{k}.wav", "missing", f"root/{k}.wav is listed but not on disk") for k in range(50)]
    with pytest.raises(DataError) as caught:
        stop_or_skip(bad, 60, "stop")
    assert "50 of 60 files" in str(caught.value)
    assert all(f"root/{k}.wav" in str(caught.value) for k in range(50))
    assert "data.on_bad_files: skip" in str(caught.value)
    stop_or_skip(bad, 60, "skip")
    assert "50 of 60 files cannot be used and are left out" in caplog.text
    stop_or_skip([], 60, "stop")


def test_interrupt_ends_at_once(tree: Path) -> None:
    """Ctrl-C on the third file: the other eighty-seven are not read."""
    clips = load_tau(TauData(kind="tau", root=tree, clip_seconds=SECONDS), 0).train
    taken = []

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    def take(*_: object) -> None:
        time.sleep(0.005)
        taken.append(1)

    with pytest.raises(KeyboardInterrupt):
        examine_files(clips, SECONDS, 0.0, take=take, progress=interrupt)
    assert len(taken) < len(clips)


def test_torch_free() -> None:
    """`data check` and the index answer without torch."""
    code = (
        "import sys; import aum_compress.data.check, aum_compress.data.index, aum_compress.data.cache; "
        "sys.exit(bool({'torch', 'lightning'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
