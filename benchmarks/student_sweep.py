"""Shapes of students on ESC10-mobile: accuracy on validation clips against bytes and MACs.

    python benchmarks/student_sweep.py --data DIR [--trials 60] [--epochs 30] [--study DIR] [--teachers BUNDLE...]

DIR is what make_esc10_mobile.py writes; --responses names the folder of impulse responses (MicIRP). Varied are the
depth, widths and strides of the stem, what makes a token, along what the blocks run, mixer and directions, widths,
number of blocks, positions, pooling and head. A student over budget is counted and not trained; every other one is
trained alike, quantised, and measured on validation clips of fold 1. The test part chooses nothing.

The same command on other machines, with --study on a folder that all of them see, joins in; a killed one goes on. The
list of all, losers included, is sweep.json in the study's folder (and sweep.md for people).
"""

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esc10_mobile import Benchmark

from aum_compress.console import say
from aum_compress.recipe import dump_recipe
from aum_compress.report.sweep_table import sweep_lines
from aum_compress.sweep.space import Space, choices
from aum_compress.sweep.study import study_places
from aum_compress.sweep.trial import Sweep
from aum_compress.sweep.worker import work

VALIDATION = 0.2
"""Of the training recordings."""
SPACE: Space = {
    "stem_stages": choices([4, 5, 6]),
    "stem_channels": choices([12, 16, 20, 24]),
    "stem_expansion": choices([2, 3]),
    "mel_halvings": choices([3, 4, 5, 6]),
    "frame_halvings": choices([0, 1, 2, 3]),
    "token": choices(["frame", "cell"]),
    "along": choices(["tokens", "time", "mel", "time and mel"]),
    "mixer": choices(["mamba none", "mamba v1", "mamba v2", "mamba2 one way", "mamba2 two way", "conv"]),
    "d_model": choices([32, 48, 64, 80, 96]),
    "expand": choices([1, 1.5, 2]),
    "d_state": choices([4, 8, 16]),
    "depth": choices([1, 2, 3, 4, 6]),
    "position": choices(["none", "absolute", "factorised", "rope"]),
    "pool": choices(["mean", "class_token"]),
    "head": choices(["linear", "batch_norm"]),
}


def student(values: Mapping[str, Any]) -> list[str]:
    """The settings of a recipe for one shape; what does not fit together, the recipe refuses."""
    stages = [_stage(number, values) for number in range(values["stem_stages"])]
    along = ["time", "mel"] if values["along"] == "time and mel" else [values["along"]]
    section = {
        "d_model": values["d_model"],
        "depth": values["depth"],
        "stem": {"kind": "conv", "token": values["token"], "stages": stages},
        "blocks": [_block(values) | {"along": direction} for direction in along],
        "position": values["position"],
        "pool": values["pool"],
        "head": values["head"],
    }
    return [f"student.{key}={json.dumps(value)}" for key, value in section.items()]


def _stage(number: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Time is halved first: the large maps are smaller then. Each stage adds half of the first one's channels."""
    return {
        "channels": values["stem_channels"] * (2 + number) // 2,
        "stride_mels": 2 if number < values["mel_halvings"] else 1,
        "stride_frames": 2 if number < values["frame_halvings"] else 1,
        "expansion": values["stem_expansion"] if number else 0,
    }


def _block(values: Mapping[str, Any]) -> dict[str, Any]:
    mixer, _, way = values["mixer"].partition(" ")
    d_inner = round(values["expand"] * values["d_model"])
    if mixer == "mamba":
        rank = -(-values["d_model"] // 16)
        return {"d_inner": d_inner, "d_state": values["d_state"], "dt_rank": rank, "block_type": way}
    if mixer == "mamba2":  # heads of 16; all of them share one state, which may be four times as large
        heads, d_state = -(-d_inner // 16), 4 * values["d_state"]
        return {"mixer": mixer, "d_inner": 16 * heads, "d_state": d_state, "two_way": way == "two way"}
    return {"mixer": mixer, "d_inner": d_inner, "d_conv": 15}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--responses", type=Path)
    parser.add_argument("--study", type=Path, default=Path("sweeps/esc10-students"), help="a folder, or an SQLite file")
    parser.add_argument("--trials", type=int, default=60, help="students to train")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teachers", nargs="*", default=[], help="bundles or files of logits to distil from")
    arguments = parser.parse_args()
    fold = Benchmark(arguments, fold=1)
    training = fold.training()
    if not arguments.responses:
        training["augment"] = {
            key: value for key, value in training["augment"].items() if not key.startswith("device_response")
        }
    section: dict[str, Any] = {"preset": "student"}  # each trial says all else
    if arguments.teachers:
        learnt = {"distill": {"teachers": arguments.teachers, "train": training}, "student": section}
    else:
        learnt = {"student": section | {"train": training}}
    data = fold.recipe("shapes").data.model_copy(update={"root": arguments.data.resolve()})
    data = data.model_copy(update={"validation_fraction": VALIDATION})
    recipe = fold.recipe("shapes", data=data.model_dump(), quantize={}, budget={}, **learnt)
    folder, storage = study_places(arguments.study)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    beside = path.with_name(f".recipe.{os.getpid()}")
    beside.write_text(dump_recipe(recipe), encoding="utf-8")
    os.replace(beside, path)  # another worker may be reading it
    varied = frozenset({"student"})
    sweep = Sweep(path, (), SPACE, folder, storage, arguments.trials, compose=student, sections=varied)
    for line in sweep_lines(work(sweep)):
        say(line)


if __name__ == "__main__":
    main()
