"""Choices behind the presets of students on ESC10-mobile: front-end, share of each bin's mean, states, mixer, width.

    python benchmarks/student_choices.py --data DIR --responses DIR [--choices edge ...] [--seeds 0 1 2] [--epochs 30]
    python benchmarks/student_choices.py --summary        Markdown of benchmarks/results/student_choices.jsonl

Trained on folds 1 to 3 of fold 4's training list, from labels alone, with the augmentation of esc10_mobile.py; measured
in torch on the test segments of folds 4 and 5. So the folds on which students are held against CP-Mobile (1 to 3)
choose nothing. Seeds matter: two runs of one network differ by up to 2.6 points.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from esc10_mobile import (
    CONVOLUTION,
    EDGE,
    EDGE_FRONT_END,
    STUDENT,
    Benchmark,
    add_training_arguments,
    append,
    figures,
    parsed,
    read,
)
from student_latency import stem

from aum_compress.bundle import read_bundle
from aum_compress.data.cache import cache_index
from aum_compress.data.index import load_index
from aum_compress.data.splitting import read_table
from aum_compress.pipeline import run
from aum_compress.train.predict import predict_logits

RESULTS = Path(__file__).parent / "results" / "student_choices.jsonl"
TRAIN_FOLDS, TEST_FOLDS = (1, 2, 3), (4, 5)
FIGURES = ("all", "a", "unseen", "log_loss")
MELS_128 = {"n_fft": 2048, "window_samples": 2048, "n_mels": 128}


def scans(width: int = 64, states: int = 8) -> list[dict[str, Any]]:
    block = {"d_inner": width, "d_state": states, "dt_rank": width // 16, "block_type": "v1"}
    return [block | {"along": along} for along in ("time", "mel")]


CONVOLUTIONS = [
    {"mixer": "conv", "d_inner": 76, "d_conv": taps, "along": along} for along, taps in (("time", 17), ("mel", 15))
]
WIDE_STEM = stem((32, 2, 2, 0), (64, 2, 2, 2), (64, 1, 1, 2), (128, 2, 2, 2), (128, 1, 1, 2))
COLUMNS_17 = stem((16, 2, 2, 0), (32, 2, 2, 2), (32, 1, 1, 2), (64, 2, 1, 2), (64, 1, 1, 2))
STEM_128 = stem((8, 2, 2, 0), (32, 2, 2, 0), (32, 1, 1, 2), (56, 2, 2, 2), (56, 1, 1, 2), (64, 2, 1, 2))
SCANS = scans(states=4)
"""Blocks of `student-int8`."""
EIGHT = {"blocks": scans()}
"""8 states, as all but one choice."""
CHOICES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "edge-mean-0": ("64 mel bins, nothing taken off", EDGE_FRONT_END, EDGE | EIGHT | {"mean_subtraction": 0}),
    "edge-mean-0.5": ("half of each bin's mean taken off", EDGE_FRONT_END, EDGE | EIGHT),
    "edge-mean-0.8": ("0.8 of it", EDGE_FRONT_END, EDGE | EIGHT | {"mean_subtraction": 0.8}),
    "student-edge": ("half of it, 4 states in place of 8: student-edge", EDGE_FRONT_END, EDGE),
    "edge-conv-mean-0": (
        "convolutions in place of scans, nothing taken off",
        EDGE_FRONT_END,
        EDGE | {"mean_subtraction": 0, "blocks": CONVOLUTIONS},
    ),
    "edge-conv-mean-0.5": ("convolutions in place of scans, half", EDGE_FRONT_END, EDGE | {"blocks": CONVOLUTIONS}),
    "128-mels": ("128 mel bins, n_fft 2048, half", MELS_128, EDGE | EIGHT | {"stem": STEM_128}),
    "17-columns": (
        "17 columns in place of 9, nothing taken off",
        EDGE_FRONT_END,
        EDGE | EIGHT | {"mean_subtraction": 0, "stem": COLUMNS_17},
    ),
    "wide": (
        "twice every width, 16 states, nothing taken off",
        EDGE_FRONT_END,
        EDGE | {"mean_subtraction": 0, "d_model": 128, "stem": WIDE_STEM, "blocks": scans(128, 16)},
    ),
    "256-mean-0": ("256 mel bins, nothing taken off", {}, STUDENT | EIGHT | {"mean_subtraction": 0}),
    "256-mean-0.5": ("256 mel bins, half of each bin's mean taken off", {}, STUDENT | EIGHT),
    "student-int8": ("half of it, 4 states in place of 8: student-int8", {}, STUDENT),
    "256-conv-mean-0.5": (
        "256 mel bins, half, convolutions in place of scans",
        {},
        STUDENT | {"blocks": [block | {"d_inner": 76} for block in CONVOLUTION]},
    ),
    "256-scan-conv": (
        "256 mel bins, half, a scan along time and a convolution along mel",
        {},
        STUDENT | {"blocks": [SCANS[0], CONVOLUTION[1]]},
    ),
    "256-long": (
        "student-int8, convolutions inside its blocks from end to end (9 and 16 taps in place of 4)",
        {},
        STUDENT | {"blocks": [SCANS[0] | {"d_conv": 9}, SCANS[1] | {"d_conv": 16}]},
    ),
    "cp-mobile": ("CP-Mobile on 256 mel bins", {}, {"preset": "cp-mobile"}),
    "cp-mobile-64": ("CP-Mobile on 64 mel bins", EDGE_FRONT_END, {"preset": "cp-mobile"}),
}
"""Name -> title, front-end, network."""


def write_lists(data: Path, folder: Path) -> tuple[Path, Path]:
    """The training and the test list, made of those of the folds."""
    rows = {
        fold: read_table(data / "split" / f"fold{fold}_test.csv", ("filename", "scene_label")) for fold in range(1, 6)
    }
    of_train = {row["filename"] for fold in TRAIN_FOLDS for row in rows[fold]}
    listed = read_table(data / "split" / f"fold{TEST_FOLDS[0]}_train.csv", ("filename", "scene_label"))
    lists = {
        "train": [row for row in listed if row["filename"] in of_train],
        "test": [row for fold in TEST_FOLDS for row in rows[fold]],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, chosen in lists.items():
        lines = sorted(f"{row['filename']}\t{row['scene_label']}" for row in chosen)
        (folder / f"choices_{name}.csv").write_text("\n".join(["filename\tscene_label", *lines]) + "\n")
    return folder / "choices_train.csv", folder / "choices_test.csv"


def measured(arguments: argparse.Namespace, choice: str, seed: int) -> dict[str, Any]:
    """One line of the results."""
    _, features, student = CHOICES[choice]
    fold = Benchmark(argparse.Namespace(**vars(arguments) | {"seed": seed}), 0)
    train_list, test_list = write_lists(arguments.data, arguments.work)
    recipe = fold.recipe(f"choice-{choice}", features=features, student=student | {"train": fold.training()})
    lists = {"train_split": str(train_list), "test_split": str(test_list)}
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=lists)})
    run(recipe, arguments.work, "student")
    bundle = read_bundle(arguments.work / "runs" / recipe.name / "03-student")
    parts = cache_index(load_index(recipe.data, recipe.seed), recipe.features)
    logits = predict_logits(bundle.load_model(), parts.test, bundle.card.input)
    found = figures(logits, bundle.card.labels, parts.test, parts.index.seen_devices)
    return {
        "choice": choice,
        "seed": seed,
        "epochs": arguments.epochs,
        **{key: found[key] for key in FIGURES},
    }


def summary(lines: list[dict[str, Any]]) -> str:
    """Markdown: means over seeds, and the single figures for all devices."""
    by_choice = defaultdict(list)
    for line in lines:
        by_choice[line["choice"]].append(line)
    rows = [("network", "seeds", "all devices", "each", "a", "unseen", "log loss"), ("---",) * 2 + ("---:",) * 5]
    for choice, (title, _, _) in CHOICES.items():
        if own := by_choice[choice]:
            mean = {key: float(np.mean([line[key] for line in own])) for key in FIGURES}
            each = ", ".join(f"{line['all']:.1f}" for line in own)
            row = (title, str(len(own)), f"{mean['all']:.1f}", each, f"{mean['a']:.1f}", f"{mean['unseen']:.1f}")
            rows.append((*row, f"{mean['log_loss']:.3f}"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(parser, RESULTS, epochs=30)
    parser.add_argument("--choices", nargs="+", default=list(CHOICES), choices=list(CHOICES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parsed(parser)
    if not arguments.summary:
        torch.set_num_threads(1)
        for seed, choice in [(s, c) for s in arguments.seeds for c in arguments.choices]:
            done = {(line["choice"], line["seed"], line["epochs"]) for line in read(arguments.results)}
            if (choice, seed, arguments.epochs) not in done:
                append(arguments.results, measured(arguments, choice, seed))
    print(summary(read(arguments.results)))


if __name__ == "__main__":
    main()
