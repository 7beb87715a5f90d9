"""Students against CP-Mobile on ESC10-mobile: real recordings through measured microphones, fold by fold.

    python benchmarks/esc10_mobile.py --data DIR [--folds 1 2 3] [--configs student-distilled ...] [--seed 0]
    python benchmarks/esc10_mobile.py --summary           Markdown of benchmarks/results/esc10_mobile.jsonl

DIR is what make_esc10_mobile.py writes; --responses names the folder of impulse responses (MicIRP).

Every configuration is a recipe that the package itself runs, so a killed benchmark goes on at the epoch where it was,
and a line of the results is written once. All trainings of a table have the same number of epochs, all but the anchor's
the same augmentation. The test part chooses nothing: there is no validation part either, the averaged weights of the
last epoch are what counts. Accuracy is that of the exported file in onnxruntime.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from aum_compress import __version__
from aum_compress.data.cache import CachedClips, cache_index
from aum_compress.data.index import load_index
from aum_compress.export.runtime import Classifier
from aum_compress.models.presets import front_end_of
from aum_compress.pipeline import run
from aum_compress.recipe_schema import Recipe
from aum_compress.train.metrics import classification_metrics, log_softmax, macro_accuracy

RESULTS = Path(__file__).parent / "results" / "esc10_mobile.jsonl"
TEST_DEVICES = (
    "IR_ResloCR600.wav",
    "IR_Shure510C.wav",
    "IR_Astatic77.wav",
    "IR_AKG_FaultyD12.wav",
    "GEC_bigdynamic.wav",
    "IR_Lomo52A5M.wav",
)
"""Responses that make the devices of the data set, seen and unseen: augmentation never draws them."""
QUANTIZE = {"calibration_clips": 512, "percentile": 99.99}
EXPORT = {"waveform": False}
FILES = {"fp32": "model-fp32.onnx", "fp16": "model-fp16.onnx", "int8": "model-int8.onnx"}
BATCH = 256

CP_MOBILE = {"preset": "cp-mobile"}
STUDENT = {"preset": "student-int8"}
EDGE_FRONT_END = front_end_of("student-edge").model_dump(mode="json")
"""What `student-edge` hears; every other network hears DCASE's 256 mel bins."""
EDGE = {"preset": "student-edge"}
CONVOLUTION = [
    {"mixer": "conv", "d_inner": 70, "d_conv": 17, "along": "time"},
    {"mixer": "conv", "d_inner": 70, "d_conv": 31, "along": "mel"},
]
"""In place of the student's blocks: taps from end to end of 9 columns and 16 rows, and as many channels as take the
bytes of the scan and its projections (91,281 bytes in all against 91,183)."""
EDGE_CONVOLUTION = [
    {"mixer": "conv", "d_inner": 72, "d_conv": 17, "along": "time"},
    {"mixer": "conv", "d_inner": 72, "d_conv": 15, "along": "mel"},
]
"""The same for `student-edge`, 9 columns and 8 rows: 74,037 bytes in all against 74,163."""


class Benchmark:
    """Recipes of one fold."""

    def __init__(self, arguments: argparse.Namespace, fold: int) -> None:
        self.arguments, self.fold = arguments, fold

    @property
    def of_teachers(self) -> "Benchmark":
        """The same fold with the teachers' seed, whatever the student's."""
        return Benchmark(argparse.Namespace(**vars(self.arguments) | {"seed": TEACHER_SEED}), self.fold)

    def name(self, config: str) -> str:
        return f"esc10-{config}-fold{self.fold}-seed{self.arguments.seed}-{self.arguments.epochs}epochs"

    def recipe(self, config: str, **sections: Any) -> Recipe:
        root = self.arguments.data
        data = {
            "kind": "tau",
            "root": root,
            "train_split": f"split/fold{self.fold}_train.csv",
            "test_split": f"split/fold{self.fold}_test.csv",
            "validation_fraction": 0,
        }
        whole = {"name": self.name(config), "seed": self.arguments.seed, "threads": 1, "data": data}
        return Recipe.model_validate(whole | sections)

    def own(self) -> dict[str, Any]:
        """CP-Mobile's own recipe (CPJKU/dcase2024_task1_baseline), its rates for batches of 32."""
        augment = {"time_roll_seconds": 0.1, "mixstyle_p": 0.4, "mixstyle_alpha": 0.3}
        return self.training() | {"augment": augment}

    def training(self) -> dict[str, Any]:
        augment = {
            "time_roll_seconds": 0,
            "window_shift_seconds": 0.5,
            "speed_factor": 1.25,
            "mixstyle_p": 0.4,
            "mixstyle_alpha": 0.3,
            "mixup_alpha": 0.3,
            "device_response_p": 0.6,
            "device_response_folder": self.arguments.responses,
            "device_response_exclude": list(TEST_DEVICES),
        }
        return {
            "epochs": self.arguments.epochs,
            "batch_size": 32,
            "learning_rate": 3e-3,
            "weight_decay": 1e-3,
            "warmup_epochs": 2,
            "weight_average": 0.999,
            "keep": "last",
            "views": 8,
            "augment": augment,
        }

    def bundle(self, config: str) -> Path:
        """Where a network that learns from labels lies."""
        return self.arguments.work / "runs" / self.name(config) / "03-student"

    def distillation(self) -> dict[str, Any]:
        teachers = [str(self.of_teachers.bundle(config)) for config in TEACHERS]
        return {"teachers": teachers, "lambda": 0.17, "temperature": 2, "train": self.training()}


def _cp_mobile(fold: Benchmark) -> dict[str, Any]:
    return {"student": CP_MOBILE | {"train": fold.own()}}


def _cp_mobile_augmented(fold: Benchmark) -> dict[str, Any]:
    return {"student": CP_MOBILE | {"train": fold.training()}}


def student(fold: Benchmark, network: dict[str, Any] = STUDENT, **augment: Any) -> dict[str, Any]:
    """A student from labels alone. Args: augment: what its augmentation has instead."""
    train = fold.training()
    return {"student": network | {"train": train | {"augment": train["augment"] | augment}}}


def _distilled(fold: Benchmark, network: dict[str, Any] = STUDENT) -> dict[str, Any]:
    return {"student": network, "distill": fold.distillation()}


def learning_int8(fold: Benchmark, epochs: int) -> dict[str, Any]:
    """Quantisation-aware training: as the student was trained, for fewer epochs at a tenth of the rate."""
    train = fold.training()
    return train | {"epochs": epochs, "learning_rate": train["learning_rate"] / 10, "warmup_epochs": 1}


def _learnt_int8(fold: Benchmark, config: str) -> dict[str, Any]:
    """The student that `config` has trained, its int8 learnt in half as many epochs."""
    name = fold.name(config)
    return CONFIGS[config][1](fold) | {
        "name": name,
        "quantize": QUANTIZE | {"train": learning_int8(fold, fold.arguments.epochs // 2)},
        "export": EXPORT | {"name": f"{name}-learnt-int8"},
    }


def on_edge(
    sections: Callable[..., dict[str, Any]], network: dict[str, Any] = EDGE
) -> Callable[[Benchmark], dict[str, Any]]:
    """The same of `student-edge`, or of another network, on what it hears."""
    return lambda fold: {"features": EDGE_FRONT_END} | sections(fold, network)


Configs = dict[str, tuple[str, Callable[[Benchmark], dict[str, Any]]]]
CONFIGS: Configs = {
    "cp-mobile": ("CP-Mobile, its own recipe", _cp_mobile),
    "cp-mobile-augmented": ("CP-Mobile, our augmentation", _cp_mobile_augmented),
    "student": ("student, no distillation", student),
    "cp-mobile-distilled": ("CP-Mobile, our teachers", partial(_distilled, network=CP_MOBILE)),
    "student-distilled": ("student, our teachers", _distilled),
    "student-learnt-int8": ("student, our teachers, int8 learnt", partial(_learnt_int8, config="student-distilled")),
    "convolution-distilled": (
        "the scan replaced by a convolution of equal bytes, our teachers",
        partial(_distilled, network=STUDENT | {"blocks": CONVOLUTION}),
    ),
    "convolution-learnt-int8": (
        "the scan replaced by a convolution of equal bytes, our teachers, int8 learnt",
        partial(_learnt_int8, config="convolution-distilled"),
    ),
    "student-fp16-distilled": (
        "student-fp16, our teachers",
        partial(_distilled, network={"preset": "student-fp16"}),
    ),
    "student-edge": ("student-edge, no distillation", on_edge(student)),
    "student-edge-distilled": ("student-edge, our teachers", on_edge(_distilled)),
    "student-edge-learnt-int8": (
        "student-edge, our teachers, int8 learnt",
        partial(_learnt_int8, config="student-edge-distilled"),
    ),
    "student-edge-convolution": (
        "student-edge, a convolution of equal bytes for the scan, no distillation",
        on_edge(student, EDGE | {"blocks": EDGE_CONVOLUTION}),
    ),
    "student-edge-convolution-distilled": (
        "student-edge, a convolution of equal bytes for the scan, our teachers",
        on_edge(_distilled, EDGE | {"blocks": EDGE_CONVOLUTION}),
    ),
}
"""Name -> its row's title and its sections; in an order in which teachers come first."""
_SHOWN = {
    "cp-mobile": ("fp16",),
    "cp-mobile-augmented": ("fp16",),
    "cp-mobile-distilled": ("fp16",),
    "convolution-distilled": ("fp16", "int8"),
    "student-learnt-int8": ("int8",),
    "convolution-learnt-int8": ("int8",),
    "student-fp16-distilled": ("fp16",),
    "student-edge-learnt-int8": ("int8",),
    "student-edge-convolution": ("int8",),
    "student-edge-convolution-distilled": ("int8",),
}
"""Files of a configuration that have a row, where not all have one: CP-Mobile ships as fp16."""
TEACHERS = ("cp-mobile-augmented", "student", "student-edge")
"""Two networks on 256 mel bins and one on 64: on folds 4 and 5 such a mean was 1.0 point better than one without the
third (docs/students.md)."""
TEACHER_SEED = 0
"""Each teacher is trained once a fold: seeds of a student differ in the student, its views and its batches."""


def measure(classifier: Classifier, test: CachedClips, seen: frozenset[str]) -> dict[str, Any]:
    """Figures of one file on the test part."""
    record = classifier.metadata.input
    logits = []
    for start in range(0, len(test), BATCH):
        features = ((test[start : start + BATCH] - record["mean"]) / record["std"]).astype(np.float32)[:, None]
        logits.append(classifier.logits(features))
    return figures(np.concatenate(logits), classifier.labels, test, seen)


def figures(logits: np.ndarray, labels: Sequence[str], test: CachedClips, seen: frozenset[str]) -> dict[str, Any]:
    """Of logits (n,C) for the test part; accuracies in percent, macro over the classes."""
    number = {label: place for place, label in enumerate(labels)}
    targets = np.array([number[clip.label] for clip in test.clips])
    devices = np.array([clip.device for clip in test.clips])
    found = classification_metrics(logits, targets, labels, list(devices), seen)
    probabilities = np.exp(log_softmax(logits))
    return {
        "all": found["accuracy"],
        "a": found["by_device"]["a"],
        "seen": found["by_device_group"]["simulated"],
        "unseen": found["unseen"],
        "clip_vote": _vote(probabilities, targets, test, devices == devices),
        "clip_vote_a": _vote(probabilities, targets, test, devices == "a"),
        "log_loss": found["log_loss"],
        "ece": found["ece"],
        "by_class": found["by_class"],
        "by_device": found["by_device"],
    }


def _vote(probabilities: np.ndarray, targets: np.ndarray, test: CachedClips, chosen: np.ndarray) -> float:
    """Share of whole clips, of each device by itself, that the mean over their segments gets right; macro."""
    total: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(probabilities.shape[1]))
    truth = {}
    for clip, row, target, wanted in zip(test.clips, probabilities, targets, chosen, strict=True):
        if wanted:
            total[clip.group, clip.device] += row
            truth[clip.group, clip.device] = target
    right = np.array([total[key].argmax() == truth[key] for key in total])
    return macro_accuracy(right, np.array([truth[key] for key in total]))


def require_teachers(fold: Benchmark, recipe: Recipe) -> None:
    """Trains those that the recipe wants and whose bundles are not here, though perhaps measured elsewhere."""
    first = fold.of_teachers
    for teacher in TEACHERS if recipe.distill else ():
        if not first.bundle(teacher).is_dir():
            run(first.recipe(teacher, **CONFIGS[teacher][1](first)), fold.arguments.work, "student")


def run_config(fold: Benchmark, config: str, sections: dict[str, Any]) -> dict[str, Any]:
    """Trains, quantises, exports and measures one configuration on one fold; what is finished is not done again.

    Args: sections: of the recipe, up to the trained student.
    """
    sections = {"quantize": QUANTIZE, "export": EXPORT, "verify": {"clips": 32}} | sections
    recipe = fold.recipe(config, **sections)
    require_teachers(fold, recipe)
    start = time.monotonic()
    outcome = run(recipe, fold.arguments.work)
    minutes = (time.monotonic() - start) / 60
    parts = cache_index(load_index(recipe.data, recipe.seed), recipe.features)
    shipped = {row["file"]: row for row in outcome.report["road"] if row["file"]}
    files = {
        precision: {
            "param_bytes": shipped[name]["param_bytes"],
            "macs": shipped[name]["macs"],
            "file_bytes": (outcome.folder / name).stat().st_size,
            **measure(Classifier(outcome.folder / name, intra_op_num_threads=1), parts.test, parts.index.seen_devices),
        }
        for precision, name in FILES.items()
    }
    return {
        "config": config,
        "fold": fold.fold,
        "seed": recipe.seed,
        "epochs": fold.arguments.epochs,
        "teachers": list(TEACHERS) if recipe.distill else [],
        "train_clips": len(parts.train),
        "test_clips": len(parts.test),
        "minutes": round(minutes, 1),
        "files": files,
        "version": __version__,
        "commit": _commit(),
        "machine": _machine(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return found.stdout.strip()


def _machine() -> str:
    return f"{os.cpu_count()} x {platform.machine()}, one thread"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def summary(lines: list[dict[str, Any]]) -> str:
    """Markdown: means over folds and seeds, one row a configuration and file."""
    header = (
        "configuration",
        "file",
        "folds",
        "runs",
        "bytes",
        "MACs",
        "all",
        "a",
        "seen",
        "unseen",
        "clip vote",
        "on a",
        "log loss",
        "ECE",
    )
    rows = []
    for config, (title, _) in CONFIGS.items():
        own = [line for line in lines if line["config"] == config]
        for precision in _SHOWN.get(config, FILES):
            found = [line["files"][precision] for line in own]
            if not found:
                continue
            means = [
                np.mean([file[key] for file in found])
                for key in ("all", "a", "seen", "unseen", "clip_vote", "clip_vote_a")
            ]
            rows.append(
                [
                    title,
                    precision,
                    ", ".join(str(fold) for fold in sorted({line["fold"] for line in own})),
                    str(len(own)),
                    f"{found[0]['param_bytes']:,}",
                    f"{found[0]['macs']:,}",
                ]
                + [f"{value:.1f}" for value in means]
                + [
                    f"{np.mean([file['log_loss'] for file in found]):.3f}",
                    f"{np.mean([file['ece'] for file in found]):.1f}",
                ]
            )
    table = [header, ["---"] * 2 + ["---:"] * (len(header) - 2), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def add_training_arguments(parser: argparse.ArgumentParser, results: Path, epochs: int) -> None:
    """What each benchmark that trains on ESC10-mobile is told."""
    parser.add_argument("--data", type=Path, help="ESC10-mobile")
    parser.add_argument("--responses", type=Path, help="folder of impulse responses")
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/esc10-mobile-benchmark"), help="checkpoints, bundles")
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--summary", action="store_true")


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with what training needs checked; folders as absolute paths."""
    arguments = parser.parse_args()
    if not arguments.summary:
        if arguments.data is None or arguments.responses is None:
            parser.error("--data and --responses are needed to train")
        for name in ("data", "responses", "work"):
            setattr(arguments, name, getattr(arguments, name).resolve())
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
    return arguments


def arguments_of(
    parser: argparse.ArgumentParser, configs: Iterable[str], results: Path, *, folds: list[int], epochs: int
) -> argparse.Namespace:
    """Of a benchmark that runs these configurations."""
    add_training_arguments(parser, results, epochs)
    parser.add_argument("--folds", type=int, nargs="+", default=folds, choices=range(1, 6))
    parser.add_argument("--configs", nargs="+", default=list(configs), choices=list(configs))
    return parsed(parser)


def append(results: Path, line: dict[str, Any]) -> None:
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")


def run_all(arguments: argparse.Namespace, configs: Configs) -> None:
    """Adds the lines that the results lack, fold by fold."""
    for fold, config in [(f, c) for f in arguments.folds for c in configs if c in arguments.configs]:
        done = {(line["config"], line["fold"], line["seed"], line["epochs"]) for line in read(arguments.results)}
        if (config, fold, arguments.seed, arguments.epochs) in done:
            continue
        of_fold = Benchmark(arguments, fold)
        append(arguments.results, run_config(of_fold, config, configs[config][1](of_fold)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments = arguments_of(parser, CONFIGS, RESULTS, folds=[1, 2, 3], epochs=40)
    if not arguments.summary:
        run_all(arguments, CONFIGS)
    print(summary(read(arguments.results)))


if __name__ == "__main__":
    main()
