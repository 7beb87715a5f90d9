"""A recipe whose stages are all real and small, its data, one finished run a test session, and the command line."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml
from audio_trees import SECONDS, write_tau_tree
from filelock import FileLock
from typer.testing import CliRunner, Result

import aum_compress
from aum_compress.bundle import read_bundle
from aum_compress.cli import app
from aum_compress.kernels import build
from aum_compress.pipeline import Outcome, run
from aum_compress.recipe import validate_recipe
from aum_compress.recipe_schema import Recipe

STEM = {
    "kind": "conv",
    "stages": [{"channels": 8, "expansion": 0, "stride_frames": 2}, {"channels": 8}],
}
TRAIN = {"epochs": 1, "batch_size": 16, "accelerator": "cpu"}
ONE_FILE = {"export": {"precisions": ["int8"], "waveform": False}}
"""Changes for runs that are not made for their files: writing and verifying all six takes longer than all training."""


def raw_recipe(root: Path, **changes) -> dict:
    """The recipe as YAML would give it, on the TAU tree at `root`."""
    raw = {
        "name": "tiny",
        "data": {"kind": "tau", "root": str(root), "clip_seconds": SECONDS, "validation_fraction": 0.3},
        "features": {"sample_rate_hz": 16_000, "n_fft": 512, "window_samples": 400, "hop_samples": 160, "n_mels": 16},
        "reference": {"preset": "cp-mobile", "train": TRAIN},
        "teacher": {
            "preset": "aum-tiny",
            "d_model": 16,
            "depth": 1,
            "stem": {"kind": "patch", "patch_mels": 8, "patch_frames": 4, "stride_mels": 8, "stride_frames": 4},
            "train": TRAIN,
        },
        "student": {"d_model": 8, "depth": 2, "d_inner": 16, "d_state": 4, "stem": STEM},
        "distill": {"teachers": ["teacher", "reference"], "train": TRAIN},
        "prune": {"ratio": 0.4, "steps": 2, "round_to": 2, "finetune": TRAIN},
        "quantize": {"calibration_clips": 16},
        "budget": {},
        "export": {},
        "verify": {"clips": 4},
    }
    return raw | changes


def recipe(root: Path, **changes) -> Recipe:
    """The same, validated."""
    return validate_recipe(raw_recipe(root, **changes), "test")


def with_kernel(cache: Path) -> Path:
    """A folder for AUM_CACHE in which no process has to compile the scan again."""
    cache.mkdir(exist_ok=True)
    if (library := build.library()) is not None:
        shutil.copy(library._name, cache)
    return cache


@dataclass(frozen=True)
class Finished:
    """A finished run that no test may change; one that wants to takes a copy of `out`."""

    tree: Path
    cache: Path
    """What AUM_CACHE has to name for the features to be found again."""
    out: Path
    outcome: Outcome


def changed_copy(finished: Finished, out: Path, **changes) -> Outcome:
    """That run copied to `out` and gone on with, with these sections changed."""
    shutil.copytree(finished.out, out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUM_CACHE", str(finished.cache))
        return run(recipe(finished.tree, **changes), out)


@cache
def finished_run(base: Path) -> Finished:
    """The run, made at first use.

    Args:
        base: pytest's base folder, the same for a whole session; xdist gives each of its processes one inside it.
    """
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny-recipe"
    told = folder / "outcome.json"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / ".lock"):
        if not told.exists():
            write_tau_tree(folder / "tree")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("AUM_CACHE", str(with_kernel(folder / "cache")))
                made = run(recipe(folder / "tree"), folder / "out")
            bundles = {name: str(bundle.path) for name, bundle in made.bundles.items()}
            told.write_text(json.dumps({"report": made.report, "folder": str(made.folder), "bundles": bundles}))
    found = json.loads(told.read_text())
    bundles = {name: read_bundle(Path(path)) for name, path in found["bundles"].items()}
    outcome = Outcome(found["report"], Path(found["folder"]), bundles)
    return Finished(folder / "tree", folder / "cache", folder / "out", outcome)


def write_recipe(folder: Path, tree: Path, **changes) -> Path:
    """The recipe as a file."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw_recipe(tree, **changes)))
    return path


def assert_nothing_half_written(*folders: Path) -> None:
    """Every stage folder is a whole bundle, and nothing is left of what was being written."""
    for folder in folders:
        assert [path for path in folder.rglob(".*") if "writing" in path.name or "replaced" in path.name] == []
        assert [path for path in folder.rglob("*.partial")] == []
        for place in [*folder.glob("runs/*/[0-9]*"), *folder.glob("exports/*")]:
            read_bundle(place)


def command(*words: object) -> Result:
    """`aum-compress` with these words, in this process."""
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="aum-compress")


def tiny_process(code: str, *words: object) -> subprocess.Popen[str]:
    """`aum-compress` with these words in a process of its own, after `code` has been executed there."""
    environment = os.environ | {"PYTHONPATH": str(Path(aum_compress.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"{code}\nfrom aum_compress.cli import main\nmain()", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
