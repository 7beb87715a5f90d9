"""Several processes at one recipe: equal to one process, nothing twice, clear words when one of them dies."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from audio_trees import write_tau_tree
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SPEC, features, student_config, trained_like
from tiny_recipe import TRAIN, raw_recipe, recipe, with_kernel

import aum_compress
from aum_compress import console, workspace
from aum_compress.bundle import read_bundle
from aum_compress.data.datamodule import EpochShuffle
from aum_compress.errors import AumError, BundleError, DataError, RecipeError
from aum_compress.pipeline import run
from aum_compress.recipe import validate_recipe
from aum_compress.recipe_schema import TrainConfig
from aum_compress.train.distributed import ALONE, FirstProcessFailed, Ranks, join, lost_process
from aum_compress.train.fit import fit
from aum_compress.train.predict import predict_logits, predict_with_embeddings
from aum_compress.train.teachers import unit_length
from aum_compress.workspace import Workspace

# no batch normalisation in a patch model, no augmentation but views: two processes must do just what one does
EPOCHS, AUGMENT = 4, {"time_roll_seconds": 0.02}
TWO = {"epochs": EPOCHS, "batch_size": 8, "accelerator": "cpu", "strategy": "ddp", "devices": 2, "augment": AUGMENT}
TWO |= {"views": 2, "weight_average": 0.9}
ONE = TWO | {"batch_size": 16, "devices": 1, "strategy": "auto"}
STAGES = ("teacher", "distill", "prune", "quantize")
KILLS_THE_FIRST = """
import os, signal
from aum_compress.train.module import TrainingModule
step = TrainingModule.training_step
def killed(self, batch, batch_idx):
    if (self.global_rank, self.current_epoch, batch_idx) == (0, 2, 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_idx)
TrainingModule.training_step = killed
"""


def raw(tree: Path, train: dict) -> dict:
    base = raw_recipe(tree)
    changes = {
        "teacher": base["teacher"] | {"train": train},
        "distill": {"teachers": ["teacher"], "feature_weight": 0.5, "train": train | {"epochs": 1}},
        "prune": {"ratio": 0.4, "round_to": 2, "finetune": train | {"epochs": 1}},
    }
    return {key: value for key, value in (base | changes).items() if key != "reference"}


@dataclass(frozen=True)
class TwoProcesses:
    """A run of two processes: the first one killed in the middle of the teacher's third epoch, then both run again."""

    tree: Path
    out: Path
    killed: subprocess.CompletedProcess[str]
    resumed: subprocess.CompletedProcess[str]

    def bundle(self, name: str):
        return read_bundle(self.out / "runs" / "tiny" / name)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return with_kernel(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def two(tmp_path_factory, cache) -> TwoProcesses:
    folder = tmp_path_factory.mktemp("two")
    tree = write_tau_tree(folder / "tree")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(raw(tree, TWO)))

    def command(name: str, first_lines: str) -> subprocess.CompletedProcess[str]:
        # a file: Lightning starts the second process with the first one's own command line
        script = folder / name
        script.write_text(f"{first_lines}\nfrom aum_compress.cli import main\nmain()\n")
        words = [sys.executable, script, "run", folder / "tiny.yaml", "--out", folder / "out"]
        words += ["--until", STAGES[-1]]
        paths = {"PYTHONPATH": str(Path(aum_compress.__file__).parent.parent), "AUM_CACHE": str(cache)}
        environment = os.environ | paths | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)

    killed = command("killed.py", KILLS_THE_FIRST)
    return TwoProcesses(tree, folder / "out", killed, command("whole.py", ""))


@pytest.fixture(scope="module")
def one(two, cache, tmp_path_factory):
    """The teacher of one process with the doubled batch, never killed."""
    out = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUM_CACHE", str(cache))
        run(validate_recipe(raw(two.tree, ONE), "test"), out, until="teacher")
    return read_bundle(out / "runs" / "tiny" / "02-teacher")


needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")


@needs_signals
def test_two_processes_train_as_one_with_the_doubled_batch(two, one):
    found, wanted = (bundle.card.notes["history"] for bundle in (two.bundle("02-teacher"), one))
    assert [row["epoch"] for row in found] == [1, 2, 3, 4]
    for key in ("train_loss", "val_loss", "val_accuracy"):
        np.testing.assert_allclose([r[key] for r in found], [r[key] for r in wanted], rtol=0, atol=1e-4, err_msg=key)
    assert two.bundle("02-teacher").card.notes["kept_epoch"] == one.card.notes["kept_epoch"]
    theirs, ours = two.bundle("02-teacher").tensors(), one.tensors()
    assert max(float((theirs[name] - ours[name]).abs().max()) for name in ours) < 1e-4


@needs_signals
def test_dead_first_process_ends_the_other_with_a_clear_word(two):
    assert two.killed.returncode == -signal.SIGKILL
    message = two.killed.stderr.splitlines()[-1]
    assert message.startswith("process 1: error: ")
    assert "another process of this run has ended" in message
    assert "Connection" in message
    assert "Traceback" not in two.killed.stderr


@needs_signals
def test_run_goes_on_and_only_the_first_process_writes_and_speaks(two):
    assert two.resumed.returncode == 0, two.resumed.stderr
    assert "process 1" not in two.resumed.stderr
    for line in ("data: 3 classes", "teacher: goes on after epoch 2", *(f"{name}: wrote" for name in STAGES)):
        assert two.resumed.stderr.count(line) == 1, line
    assert two.resumed.stderr.startswith("processes: 2\n")
    assert len(two.resumed.stdout.splitlines()) == len(set(two.resumed.stdout.splitlines())) > len(STAGES)
    assert list((two.out / "runs" / "tiny" / ".work").iterdir()) == []
    report = json.loads((two.out / "runs" / "tiny" / "report.json").read_text())
    assert [row["stage"] for row in report["road"]] == list(STAGES)


@needs_signals
def test_shared_logits_are_those_of_one_process(two, cache, monkeypatch):
    monkeypatch.setenv("AUM_CACHE", str(cache))
    space = Workspace(recipe(two.tree), two.out)
    teacher = two.bundle("02-teacher")
    model = teacher.load_model()
    metrics = space.measure(predict_logits(model, space.parts.test, teacher.card.input))
    assert teacher.card.metrics["test"]["clips"] == len(space.parts.test)
    assert teacher.card.metrics["test"]["log_loss"] == pytest.approx(metrics["log_loss"], abs=1e-6)
    viewed = space.training_clips(TrainConfig(**TWO), space.recipe.features)
    wanted, embeddings = predict_with_embeddings(model, viewed, teacher.card.input)
    kept = list((two.out / "runs" / "tiny" / "teacher-logits").iterdir())
    assert len(kept) == 2, "with embeddings for distillation, without for pruning"
    for path in kept:
        with np.load(path) as stored:
            assert stored["clip_ids"].tolist() == [clip.clip_id for clip in space.parts.train.clips]
            assert stored["views"].tolist() == list(viewed.names)
            np.testing.assert_allclose(stored["logits"].reshape(wanted.shape), wanted, rtol=0, atol=1e-5)
            if "embeddings" in stored:
                found = stored["embeddings"].reshape(embeddings.shape)
                np.testing.assert_allclose(found, unit_length(embeddings), atol=1e-3)


class Recorded(Ranks):
    """Keeps where its rows belong instead of exchanging them."""

    def gather(self, rows, places):
        return places[self.rank], rows


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 40), size=st.integers(1, 5))
def test_each_clip_is_predicted_once_in_the_batch_of_one_process(count, size):
    model, clips = trained_like(student_config()), features(count)[:, 0].numpy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aum_compress.train.predict.BATCH", 7)
        whole = predict_logits(model, clips, SPEC)
        found = np.full_like(whole, np.nan)
        for rank in range(size):
            place, rows = predict_logits(model, clips, SPEC, ranks=Recorded(rank, size))
            assert np.isnan(found[place]).all()
            found[place] = rows
    np.testing.assert_array_equal(found, whole)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 60), size=st.integers(1, 8), epoch=st.integers(0, 3))
def test_epochs_are_shared_without_loss(n, size, epoch):
    def order(rank: int, world_size: int) -> list[int]:
        sampler = EpochShuffle(n, 5, rank, world_size)
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler)
        return list(sampler)

    shares, whole = [order(rank, size) for rank in range(size)], order(0, 1)
    assert len({len(share) for share in shares}) == 1
    together = [clip for step in zip(*shares) for clip in step]
    assert together[:n] == whole, "step by step the clips of one process"
    assert len(together) - n < size


def config(**changes) -> TrainConfig:
    return TrainConfig(**({"epochs": 1, "accelerator": "cpu"} | changes))


@pytest.fixture
def torchrun(monkeypatch):
    """The environment of one of two processes that torchrun has started."""
    for key, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "GROUP_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setattr("torch.distributed.is_torchelastic_launched", lambda: True)


@pytest.fixture
def slurm(monkeypatch):
    """The environment of one of two tasks that srun has started."""
    for key, value in {"NTASKS": 2, "NTASKS_PER_NODE": 2, "NNODES": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{key}", str(value))
    monkeypatch.setenv("SLURM_JOB_NAME", "training")


@pytest.mark.parametrize("starter", ["torchrun", "slurm"])
def test_processes_and_recipe_have_to_agree(starter, request):
    request.getfixturevalue(starter)
    with pytest.raises(RecipeError, match="has started 2 processes, and no training of this recipe wants more"):
        join([config()])
    with pytest.raises(AumError, match=r"4.* (does not match the world size \(2\)|SLURM has started 2)"):
        join([config(devices=4), config()])


def test_trainings_have_to_agree_on_their_processes():
    with pytest.raises(RecipeError, match="share their processes, found .*devices 2, nodes 1; .*devices 4, nodes 1"):
        join([config(devices=4), config(), config(devices=2)])
    with pytest.raises(RecipeError, match="ddp_spawn starts processes that cannot run a recipe; wanted ddp"):
        join([config(devices=2, strategy="ddp_spawn")])


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="this machine has the GPUs")
def test_absent_devices_are_an_error():
    with pytest.raises(AumError, match=r"accelerator=gpu, devices=2.*not possible here"):
        join([config(devices=2, accelerator="gpu")])


def test_one_process_needs_no_other():
    assert join([config(), config(strategy="ddp")]) is ALONE
    assert join([config(devices="auto")]) is ALONE, "CPU processes are not started without being asked for"


class Follower(Ranks):
    """A process that hears from the first one that its work has failed, and that its data are others."""

    def from_first(self, tensors):
        for tensor in tensors:
            tensor.zero_()


def test_failure_of_the_first_process_is_told():
    done = []
    with pytest.raises(FirstProcessFailed):
        Follower(1, 2).first(lambda: done.append(1))
    assert done == []
    with pytest.raises(AumError, match="own error"):
        Ranks(0, 2).first(lambda: (_ for _ in ()).throw(AumError("own error")))


@needs_signals
def test_process_with_other_data_is_refused(two, cache, monkeypatch):
    monkeypatch.setenv("AUM_CACHE", str(cache))
    monkeypatch.setattr(Follower, "first", lambda self, work: None)
    with pytest.raises(DataError, match="hears other audio.*than the first process"):
        Workspace(recipe(two.tree), two.out, Follower(1, 2)).prepare()


def test_bundle_that_another_machine_does_not_see_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace, "LATEST_SIGHT_SECONDS", 1)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(BundleError, match="02-teacher.* does not see there .*shared file system with --out"):
        Workspace(recipe(tmp_path), tmp_path)._written_by_first(tmp_path / "02-teacher", "0")


@needs_signals
def test_more_processes_than_validation_clips_are_refused(two, cache, monkeypatch, tmp_path):
    monkeypatch.setenv("AUM_CACHE", str(cache))
    space = Workspace(recipe(two.tree), two.out)
    train = TrainConfig(**TRAIN)
    rest = {"n_classes": 3, "seed": 0, "work_dir": tmp_path, "log_dir": tmp_path, "description": "x"}
    with pytest.raises(AumError, match="1000 processes cannot share 24 validation clips"):
        fit(trained_like(student_config()), space.data_module(train), SPEC, train, **rest, ranks=Ranks(0, 1000))


def test_only_lost_connections_are_told_apart():
    lost = lost_process(RuntimeError("[pair.cc:538] Connection closed by peer [127.0.0.1]:2112\nmore"))
    assert "Connection closed by peer" in str(lost)
    assert "more" not in str(lost)
    assert lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


def test_other_processes_show_nothing_but_errors(capfd, monkeypatch):
    monkeypatch.setattr(console, "_process", "")
    console.only_errors_of("process 3")
    console.log("news")
    with console.progress("work") as reporter:
        reporter.advance(1, 2)
        reporter.note("half")
    console.log_error("no disk")
    assert capfd.readouterr().err == "process 3: error: no disk\n"
