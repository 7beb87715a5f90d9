"""What a submission scores on labelled clips, and what it answers on the evaluation set."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from aum_compress.console import progress
from aum_compress.data.cache import cache_clips
from aum_compress.data.splitting import read_table
from aum_compress.device_names import GENERAL
from aum_compress.errors import DataError, join_problems
from aum_compress.evaluate.clips import find_clips, require_labels, tau_recording
from aum_compress.evaluate.predictions import write_predictions
from aum_compress.submission.inference import FILES_AT_ONCE, Submission, device_logits, predict
from aum_compress.train.metrics import classification_metrics, log_softmax

EVALUATION_LIST = Path("evaluation_setup") / "fold1_test.csv"
_BATCH = 64


@dataclass(frozen=True)
class TestResults:
    """Figures of the development set's test part."""

    __test__ = False  # no test, though pytest would take it for one by its name

    test_accuracy: float
    """Share of all clips that are right, in percent, to two digits: what the organisers' script prints."""
    for_meta: dict[str, Any]
    """`general` and, where devices have models of their own, `device_specific`, as the meta file wants them."""
    test_list: str
    """test.csv; empty where clips have no names of the challenge."""


def test_results(submission: Submission, data: str, settings: list[str]) -> TestResults:
    """Measures each clip with its device's model, and with the general one.

    Raises:
        DataError: no such data, labels that the model does not know, no clip that can be used.
    """
    spec = submission.spec
    clips = find_clips(data, settings, spec.clip_seconds, []).clips
    require_labels(clips, submission.labels, data, Path("the submission"))
    with progress("package: features") as reporter:
        cached = cache_clips(clips, spec.front_end, spec.clip_seconds, on_bad_files="skip", progress=reporter.advance)
    if not len(cached):
        raise DataError(f"{data}: no clip could be used; aum-compress data check {data} says why")
    number = {label: place for place, label in enumerate(submission.labels)}
    targets = np.array([number[clip.label] for clip in cached.clips])
    devices = [clip.device for clip in cached.clips]
    found = {}
    routes = {"general": [GENERAL] * len(devices)}
    if len(submission.model.names) > 1:
        routes["device_specific"] = devices
    with progress("package: test accuracy") as reporter:
        for done, (route, asked) in enumerate(routes.items(), start=1):
            logits = []
            for start in range(0, len(cached), _BATCH):
                features = (cached[start : start + _BATCH] - spec.mean) / spec.std
                inputs = [torch.from_numpy(one[None, None].astype(np.float32)) for one in features]
                logits += device_logits(submission, inputs, asked[start : start + _BATCH], _BATCH)
            found[route] = torch.stack(logits).numpy()
            reporter.advance(done, len(routes))
    shipped = found.get("device_specific", found["general"])
    rows = [f"{clip.filename}\t{clip.label}" for clip in cached.clips]
    return TestResults(
        test_accuracy=round(100 * float((shipped.argmax(1) == targets).mean()), 2),
        for_meta={route: _for_meta(found[route], targets, submission.labels, devices) for route in reversed(found)},
        test_list="\n".join(["filename\tscene_label", *rows, ""]) if all(map(tau_recording, cached.clips)) else "",
    )


def write_output(submission: Submission, evaluation_set: Path, path: Path) -> int:
    """output.csv of all files that the evaluation set lists, each by its device's model; returns how many there are.

    Raises:
        DataError: no such list, a name in it that leads out of the folder, or a file that cannot be read.
    """
    rows = read_table(evaluation_set / EVALUATION_LIST, ("filename", "device_id"))
    names = [row["filename"] for row in rows]
    if outside := [name for name in names if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]:
        raise DataError(
            join_problems(f"{evaluation_set / EVALUATION_LIST}: names that lead out of the folder:", outside)
        )
    logits = []
    with progress("package: evaluation set") as reporter:
        for start in range(0, len(rows), FILES_AT_ONCE):
            part = rows[start : start + FILES_AT_ONCE]
            files = [str(evaluation_set / row["filename"]) for row in part]
            logits += predict(files, [row["device_id"] for row in part], submission)[0]
            reporter.advance(start + len(part), len(rows))
    return write_predictions(path, names, log_softmax(torch.stack(logits).numpy()), submission.labels)


def _for_meta(logits: np.ndarray, targets: np.ndarray, labels: tuple[str, ...], devices: list[str]) -> dict[str, Any]:
    named = np.asarray(devices)

    def figures(chosen: np.ndarray) -> dict[str, float]:
        metrics = classification_metrics(logits[chosen], targets[chosen], labels)
        return {"accuracy": round(metrics["accuracy"], 2), "logloss": round(metrics["log_loss"], 4)}

    classes = {label: targets == place for place, label in enumerate(labels) if (targets == place).any()}
    return {
        "overall": figures(np.ones(len(targets), dtype=bool)),
        "class_wise": {label: figures(chosen) for label, chosen in classes.items()},
        "device_wise": {device: figures(named == device) for device in sorted(set(filter(None, devices)))},
    }
