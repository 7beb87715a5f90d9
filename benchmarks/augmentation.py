"""What each augmentation is worth on devices that training never heard: `student-edge` of esc10_mobile.py without one.

    python benchmarks/augmentation.py --data DIR --responses DIR [--folds 1 2 3] [--epochs 20]
    python benchmarks/augmentation.py --summary           Markdown of benchmarks/results/augmentation.jsonl

The student learns from labels alone; resumable, and measured as there.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from esc10_mobile import Benchmark, Configs, arguments_of, on_edge, read, run_all, student

RESULTS = Path(__file__).parent / "results" / "augmentation.jsonl"
NO_RESPONSES = {"device_response_p": 0, "device_response_folder": None, "device_response_exclude": []}
NOTHING = NO_RESPONSES | {"mixstyle_p": 0, "mixup_alpha": 0, "window_shift_seconds": 0, "speed_factor": 1}


def bare(fold: Benchmark, network: dict[str, Any]) -> dict[str, Any]:
    """Each clip as it is, always."""
    sections = student(fold, network, **NOTHING)
    sections["student"]["train"]["views"] = 1
    return sections


CONFIGS: Configs = {
    name: (title, on_edge(partial(student, **changes)))
    for name, (title, changes) in {
        "all": ("all of it", {}),
        "no-responses": ("without impulse responses", NO_RESPONSES),
        "no-mixstyle": ("without Freq-MixStyle", {"mixstyle_p": 0}),
        "no-mixup": ("without mixup", {"mixup_alpha": 0}),
        "no-shift": (
            "a roll of 0.1 s, ends joined, in place of shifts",
            {"window_shift_seconds": 0, "time_roll_seconds": 0.1},
        ),
        "no-speed": ("without changes of speed", {"speed_factor": 1}),
        "masks": ("and masks of up to 12 of 64 mel bins", {"frequency_mask_mels": 12}),
    }.items()
}
CONFIGS["none"] = ("none of it", on_edge(bare))


def summary(lines: list[dict[str, Any]]) -> str:
    """Markdown: means over folds, and what changes against `all` on the same folds."""
    rows = [("augmentation", "folds", "epochs", "all devices", "unseen", "change, all", "change, unseen", "log loss")]
    rows.append(("---", "---", *["---:"] * 6))
    for config, (title, _) in CONFIGS.items():
        own = {
            (line["fold"], line["epochs"], line["seed"]): line["files"]["int8"]
            for line in lines
            if line["config"] == config
        }
        whole = {
            (line["fold"], line["epochs"], line["seed"]): line["files"]["int8"]
            for line in lines
            if line["config"] == "all"
        }
        both = sorted(own.keys() & whole.keys())
        if not both:
            continue
        mean = {key: np.mean([own[run][key] for run in both]) for key in ("all", "unseen", "log_loss")}
        change = {key: np.mean([own[run][key] - whole[run][key] for run in both]) for key in ("all", "unseen")}
        rows.append(
            (
                title,
                ", ".join(str(fold) for fold, _, _ in both),
                ", ".join(sorted({str(epochs) for _, epochs, _ in both})),
                f"{mean['all']:.1f}",
                f"{mean['unseen']:.1f}",
                f"{change['all']:+.1f}",
                f"{change['unseen']:+.1f}",
                f"{mean['log_loss']:.3f}",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments = arguments_of(parser, CONFIGS, RESULTS, folds=[1, 2, 3], epochs=20)
    if not arguments.summary:
        run_all(arguments, CONFIGS)
    print(summary(read(arguments.results)))


if __name__ == "__main__":
    main()
