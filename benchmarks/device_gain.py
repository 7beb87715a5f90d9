"""What a model for each device gains on ESC10-mobile over the general one, device by device.

    python benchmarks/device_gain.py --data DIR --responses DIR [--folds 1 ...] [--config student-distilled]
    python benchmarks/device_gain.py --summary            Markdown of benchmarks/results/device_gain.jsonl

The student is one of benchmarks/esc10_mobile.py, not trained again where that benchmark has left its bundles in --work.
It is fine-tuned on each device of training by the defaults of the stage `devices` (50 epochs at 5e-4, Freq-MixStyle
off, as in DCASE's baseline) in batches of 32, and quantised after training. Accuracy is that of the int8 files in
onnxruntime on the device's own test segments, which chose nothing.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from esc10_mobile import (
    CONFIGS,
    EXPORT,
    QUANTIZE,
    Benchmark,
    add_training_arguments,
    append,
    parsed,
    read,
    require_teachers,
)

from aum_compress.pipeline import run
from aum_compress.recipe_schema import Recipe

RESULTS = Path(__file__).parent / "results" / "device_gain.jsonl"
FINETUNE = {"batch_size": 32, "keep": "last"}


def with_devices(fold: Benchmark, config: str) -> Recipe:
    sections = {"quantize": QUANTIZE, "devices": {"finetune": FINETUNE}, "export": EXPORT}
    return fold.recipe(config, **sections | CONFIGS[config][1](fold))


def measured(fold: Benchmark, config: str) -> dict[str, Any]:
    """One line of the results: a fold's devices, and all test segments by the pack and by the general model."""
    recipe = with_devices(fold, config)
    require_teachers(fold, recipe)
    pack = run(recipe, fold.arguments.work).report["devices"]
    return {
        "config": config,
        "fold": fold.fold,
        "seed": recipe.seed,
        "epochs": fold.arguments.epochs,
        "finetune_epochs": recipe.devices.finetune.epochs,
        "models": pack["models"],
        "all": {who: pack["test"][who]["accuracy"] for who in ("general", "pack")},
    }


def summary(lines: list[dict[str, Any]]) -> str:
    """Markdown: means over the folds."""
    by_device = defaultdict(list)
    for line in lines:
        for model in line["models"]:
            by_device[model["device"]].append((model["general_accuracy"], model["accuracy"]))
        by_device["all devices"].append((line["all"]["general"], line["all"]["pack"]))
    rows = [("device", "folds", "general model", "its own", "gain"), ("---",) + ("---:",) * 4]
    for device, found in by_device.items():
        general, own = np.mean(found, axis=0)
        rows.append((device, str(len(found)), f"{general:.1f}", f"{own:.1f}", f"{own - general:+.1f}"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="student-distilled", choices=list(CONFIGS))
    add_training_arguments(parser, RESULTS, epochs=40)
    parser.add_argument("--folds", type=int, nargs="+", default=[1], choices=range(1, 6))
    arguments = parsed(parser)
    if not arguments.summary:
        for number in arguments.folds:
            done = {(line["config"], line["fold"], line["seed"], line["epochs"]) for line in read(arguments.results)}
            if (arguments.config, number, arguments.seed, arguments.epochs) not in done:
                append(arguments.results, measured(Benchmark(arguments, number), arguments.config))
    print(summary(read(arguments.results)))


if __name__ == "__main__":
    main()
