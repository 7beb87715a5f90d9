"""What quantisation costs a student on ESC10-mobile, fold by fold: float32, float16, int8 after training, int8 with
training, and a mixture of precisions in three quarters of int8's bytes (96 kB of 128).

    python benchmarks/quantize_bar.py --data DIR --responses DIR [--folds 1 2 3] [--variants post-training trained]
    python benchmarks/quantize_bar.py --summary           Markdown of benchmarks/results/quantize_bar.jsonl

The student is a configuration of benchmarks/esc10_mobile.py, trained once a fold (and not at all where that benchmark
has left its bundles in --work); every variant quantises this very model, exports it and measures the file in
onnxruntime on the fold's test segments. They are recipes that the package itself runs: a killed benchmark goes on at
the epoch where it was, and a line of the results is written once. The test part chooses nothing: the search judges on
training clips that calibrate nothing.
"""

import argparse
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
from esc10_mobile import (
    CONFIGS,
    Benchmark,
    add_training_arguments,
    append,
    learning_int8,
    measure,
    parsed,
    read,
    require_teachers,
)

from aum_compress import __version__
from aum_compress.data.cache import cache_index
from aum_compress.data.index import load_index
from aum_compress.export.runtime import Classifier
from aum_compress.pipeline import run

RESULTS = Path(__file__).parent / "results" / "quantize_bar.jsonl"
CALIBRATION = {"calibration_clips": 512}
BARS = {
    "fp16": ("float16", 0.1, "fp32"),
    "post-training": ("int8, post-training", 1.0, "fp32"),
    "trained": ("int8, quantisation-aware training", 0.5, "fp32"),
    "mixed": ("mixed, three quarters of the bytes", 1.0, "trained"),
}
"""File -> its title, how many points it may lose, and against which file."""
INT8 = ("post-training", "trained")
VARIANTS = ("post-training", "trained", "mixed")
"""Recipes; the first one also writes fp32 and fp16."""


def sections(fold: Benchmark, variant: str, mixed_bytes: int) -> dict[str, Any]:
    """`quantize` and `export` of a variant."""
    quantize: dict[str, Any] = dict(CALIBRATION)
    precisions = ["fp32", "fp16", "int8"] if variant == "post-training" else ["int8"]
    if variant != "post-training":
        quantize["train"] = learning_int8(fold, fold.arguments.quantize_epochs)
    if variant == "mixed":
        quantize["search"] = {"max_param_bytes": mixed_bytes}
        precisions = ["mixed"]
    name = f"{fold.name(fold.arguments.config)}-{variant}"
    return {
        "quantize": quantize,
        "export": {"precisions": precisions, "waveform": False, "name": name},
        "verify": {"clips": 32},
    }


def run_variant(fold: Benchmark, variant: str, mixed_bytes: int) -> dict[str, Any]:
    """One line of the results."""
    arguments = fold.arguments
    float_stages = CONFIGS[arguments.config][1](fold)
    recipe = fold.recipe(arguments.config, **float_stages, **sections(fold, variant, mixed_bytes))
    require_teachers(fold, recipe)
    start = time.monotonic()
    outcome = run(recipe, arguments.work)
    parts = cache_index(load_index(recipe.data, recipe.seed), recipe.features)
    files = {}
    for row in outcome.report["road"]:
        if row["file"] and not row["file"].endswith("-waveform.onnx"):
            classifier = Classifier(outcome.folder / row["file"], intra_op_num_threads=1)
            name = row["precision"] if row["precision"] in ("fp32", "fp16") else variant
            figures = measure(classifier, parts.test, parts.index.seen_devices)
            files[name] = {"param_bytes": row["param_bytes"], "macs": row["macs"], **figures}
    notes = outcome.bundles["quantize"].card.notes
    return {
        "config": arguments.config,
        "variant": variant,
        "fold": fold.fold,
        "seed": recipe.seed,
        "epochs": arguments.epochs,
        "quantize_epochs": arguments.quantize_epochs if variant != "post-training" else 0,
        "minutes": round((time.monotonic() - start) / 60, 1),
        "files": files,
        "search": {key: notes["search"][key] for key in ("layers", "param_bytes", "accuracy_drop", "rolled_back")}
        if variant == "mixed"
        else None,
        "sqnr_db": outcome.bundles["quantize"].card.metrics["train_sqnr_db"],
        "version": __version__,
        "machine": f"{os.cpu_count()} x {platform.machine()}, one thread",
        "date": time.strftime("%Y-%m-%d"),
    }


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line[name] for name in ("config", "variant", "fold", "seed", "epochs", "quantize_epochs"))


def by_file(lines: list[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """File -> fold -> its figures."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for line in lines:
        for name, figures in line["files"].items():
            found.setdefault(name, {})[line["fold"]] = figures
    return found


def summary(lines: list[dict[str, Any]]) -> str:
    """Markdown: means over the folds that a file and the one it is held against have in common."""
    files = by_file(lines)
    header = ("file", "folds", "bytes", "accuracy", "unseen", "against", "points lost", "bar", "met")
    rows = []
    for name in ("fp32", *BARS):
        if name not in files:
            continue
        title, limit, against = BARS.get(name, ("float32", None, None))
        folds = sorted(files[name].keys() & files.get(against, files[name]).keys())
        if not folds:
            continue
        mean = {k: np.mean([files[name][fold][k] for fold in folds]) for k in ("all", "unseen")}
        row = [title, ", ".join(map(str, folds)), f"{files[name][folds[0]]['param_bytes']:,}"]
        row += [f"{mean['all']:.2f}", f"{mean['unseen']:.2f}"]
        if limit is not None and against in files:
            lost = np.mean([files[against][fold]["all"] for fold in folds]) - mean["all"]
            row += [BARS.get(against, ("float32",))[0], f"{lost:+.2f}", f"{limit:g}", "yes" if lost <= limit else "no"]
        else:
            row += ["", "", "", ""]
        rows.append(row)
    table = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(parser, RESULTS, epochs=40)  # of the student and its teachers
    parser.add_argument("--folds", type=int, nargs="+", default=[1, 2, 3], choices=range(1, 6))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument(
        "--config", default="student-distilled", choices=[name for name in CONFIGS if "mob" not in name]
    )
    parser.add_argument("--quantize-epochs", type=int, default=20)
    parser.add_argument("--mixed-bytes", type=int, help="in place of three quarters of int8's")
    arguments = parsed(parser)
    if not arguments.summary:
        for number in arguments.folds:
            fold = Benchmark(arguments, number)
            for variant in (name for name in VARIANTS if name in arguments.variants):
                epochs = 0 if variant == "post-training" else arguments.quantize_epochs
                wanted = (arguments.config, variant, number, arguments.seed, arguments.epochs, epochs)
                lines = read(arguments.results)
                if wanted in {key(line) for line in lines}:
                    continue
                int8 = [
                    files[number]["param_bytes"]
                    for name, files in by_file(lines).items()
                    if "tr" in name and number in files
                ]
                if variant == "mixed" and not (arguments.mixed_bytes or int8):
                    parser.error(
                        "--variants mixed: run post-training or trained of this fold first, or name --mixed-bytes"
                    )
                limit = arguments.mixed_bytes or (3 * int8[0] // 4 if int8 else 0)
                append(arguments.results, run_variant(fold, variant, limit))
    print(summary(read(arguments.results)))


if __name__ == "__main__":
    main()
