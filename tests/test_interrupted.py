"""Ctrl-C and kill: nothing is left half-written, and the next run ends where an unbroken one would have ended."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_recipe import TRAIN, assert_nothing_half_written, command, raw_recipe, tiny_process, write_recipe

from aum_compress.bundle import read_bundle

MODEL_STAGES = ("01-reference", "02-teacher", "04-distill", "05-prune", "06-quantize")

pytestmark = pytest.mark.usefixtures("cache_of_finished")


@pytest.mark.parametrize(
    ("stage", "place", "kept"),
    [
        ("data", "aum_compress.data.cache.examine_files", ()),
        ("prune", "aum_compress.pruning.apply_choice", MODEL_STAGES[:3]),
        ("quantize", "aum_compress.stages.prepare", MODEL_STAGES[:4]),
        ("export", "aum_compress.publish.export_onnx", MODEL_STAGES),
        ("write", "aum_compress.bundle.replace_folder", MODEL_STAGES[:4]),
        ("verify", "aum_compress.publish.verify_onnx", (*MODEL_STAGES, "07-export")),
    ],
)
def test_ctrl_c_in_every_stage(copied, recipe, monkeypatch, tmp_path, stage, place, kept):
    runs = copied / "runs" / "tiny"
    for path in runs.glob("[0-9]*"):
        if path.name not in kept:
            shutil.rmtree(path)
    shutil.rmtree(copied / "exports")
    if stage == "data":
        monkeypatch.setenv("AUM_CACHE", str(tmp_path / "cache"))

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupt)
    result = command("run", recipe, "--out", copied)
    assert result.exit_code == 130, result.stderr
    assert result.stderr.endswith("interrupted. Finished stages are kept; the same command goes on from there\n")
    assert {path.name for path in runs.glob("[0-9]*")} == set(kept)
    assert not (copied / "exports").exists()
    assert_nothing_half_written(copied, tmp_path)


INTERRUPT = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, as this may be, ignores it
from aum_compress.train.module import TrainingModule
step = TrainingModule.training_step
def interrupted(self, batch, batch_idx):
    if (self.current_epoch, batch_idx) == (2, 1):
        os.kill(os.getpid(), signal.{})
    return step(self, batch, batch_idx)
TrainingModule.training_step = interrupted
"""
"""In the third epoch, its second batch: only the teacher's training comes that far."""


@pytest.fixture(scope="module")
def long_recipe(finished, tmp_path_factory) -> Path:
    teacher = raw_recipe(finished.tree)["teacher"] | {"train": TRAIN | {"epochs": 4}}
    return write_recipe(tmp_path_factory.mktemp("long"), finished.tree, teacher=teacher, threads=1)


@pytest.fixture(scope="module")
def unbroken(finished, long_recipe, tmp_path_factory) -> Path:
    """A run up to the teacher that nothing has stopped."""
    out = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUM_CACHE", str(finished.cache))
        assert command("run", long_recipe, "--out", out, "--until", "teacher").exit_code == 0
    return out


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL, and sends Ctrl-C to whole consoles")
@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_stopped_in_the_middle_of_an_epoch_then_run_again(long_recipe, unbroken, tmp_path, name):
    words = ("run", long_recipe, "--out", tmp_path, "--until", "teacher")
    process = tiny_process(INTERRUPT.format(name), *words)
    try:
        _, stderr = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    if name == "SIGINT":
        assert process.returncode == 130, stderr
        assert stderr.endswith("interrupted. Finished stages are kept; the same command goes on from there\n")
        assert "Traceback" not in stderr
    else:
        assert process.returncode == -signal.SIGKILL, stderr
    runs = tmp_path / "runs" / "tiny"
    assert [path.name for path in runs.glob("[0-9]*")] == ["01-reference"]
    assert_nothing_half_written(tmp_path)

    result = command(*words)
    assert result.exit_code == 0, result.stderr
    assert "reference: nothing has changed, kept" in result.stderr
    assert "teacher: goes on after epoch 2" in result.stderr
    wanted, found = (read_bundle(out / "runs" / "tiny" / "02-teacher") for out in (unbroken, tmp_path))
    assert found.card.metrics == wanted.card.metrics
    assert found.card.notes == wanted.card.notes, "the whole training curve"
    assert found.card.files["model.safetensors"] == wanted.card.files["model.safetensors"]
    assert list((runs / ".work").iterdir()) == []
    assert_nothing_half_written(tmp_path)


def test_what_a_killed_writer_left_is_cleared_away(recipe, copied):
    """Killed while a bundle was written, and while the one before it stood aside."""
    runs = copied / "runs" / "tiny"
    (runs / ".06-quantize.writing-4194305").mkdir()
    (runs / ".06-quantize.writing-4194305" / "model.safetensors").write_bytes(b"half")
    (runs / "06-quantize").rename(runs / ".06-quantize.replaced-4194305")
    result = command("run", recipe, "--out", copied, "--until", "quantize")
    assert result.exit_code == 0, result.stderr
    assert "prune: nothing has changed, kept" in result.stderr
    assert_nothing_half_written(copied)
