"""What quantisation hears of a run's clips: some to calibrate, others to judge. The test part is never among them."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aum_compress.bundle import Bundle
from aum_compress.compress.search import search
from aum_compress.compress.sensitivity import Judge, Sensitivity, sensitivity
from aum_compress.console import log, progress
from aum_compress.errors import BundleError, DataError
from aum_compress.models.factory import Model
from aum_compress.recipe_schema import QuantizeSection
from aum_compress.same_data import require_same_data
from aum_compress.train.distributed import Ranks
from aum_compress.train.metrics import macro_accuracy
from aum_compress.workspace import Workspace

BATCH = 32
SENSITIVITY = "quantize-sensitivity.json"
SEARCH = "search.json"


def calibration(space: Workspace, section: QuantizeSection) -> list[Tensor]:
    """Batches (B,1,F,T) of training clips that set the ranges."""
    return list(torch.from_numpy(space.normalised("train", section.calibration_clips)).split(BATCH))


def judging_clips(space: Workspace, section: QuantizeSection, count: int, *, calibrating: bool = False) -> Judge:
    """At most `count` validation clips or, where there are none, training clips that calibrate nothing.

    Args:
        calibrating: where neither are there, take those that calibrate: they do for a figure that chooses nothing.

    Raises:
        DataError: neither are there.
    """
    part, rows = _judging(space, section)
    if not len(rows) and calibrating:
        part, rows = "calibration", space.spread(len(space.parts.train), section.calibration_clips)
    elif not len(rows):
        require_judging_clips(space, section)
    cached = space.parts.validation if part == "validation" else space.parts.train
    rows = rows[space.spread(len(rows), count)]
    features = ((cached[rows] - space.spec.mean) / space.spec.std).astype(np.float32)[:, None]
    number = {label: place for place, label in enumerate(space.labels)}
    targets = np.array([number[cached.clips[row].label] for row in rows])
    return Judge(part, torch.from_numpy(features), partial(_accuracy, targets=targets))


def require_judging_clips(space: Workspace, section: QuantizeSection) -> None:
    """Raises DataError where `judging_clips` finds none."""
    if not len(_judging(space, section)[1]):
        raise DataError(
            f"quantize: no clip to judge on: there are no validation clips, and all {len(space.parts.train)} training "
            "clips calibrate. Lower quantize.calibration_clips, or set data.validation_fraction above 0"
        )


def _judging(space: Workspace, section: QuantizeSection) -> tuple[str, np.ndarray]:
    """Part and rows of the clips that may judge."""
    if len(space.parts.validation):
        return "validation", np.arange(len(space.parts.validation))
    n_clips = len(space.parts.train)
    return "train", np.setdiff1d(np.arange(n_clips), space.spread(n_clips, section.calibration_clips))


def _accuracy(logits: np.ndarray, targets: np.ndarray) -> float:
    return float(macro_accuracy(logits.argmax(1) == targets, targets))


def searched(space: Workspace, model: Model, section: QuantizeSection, work_dir: Path, workers: Ranks) -> dict:
    """What `section.search` finds (`Found.to_dict`), by the first of `workers` for all; kept in `work_dir`, so that a
    training that was killed behind it goes on with the very same."""
    path = work_dir / SEARCH

    def find() -> None:
        if path.is_file():
            return
        judge = judging_clips(space, section, section.search.clips)
        with progress(f"quantize: each tensor alone, on {len(judge.features)} {judge.part} clips") as reporter:
            found = search(model, calibration(space, section), judge, section, reporter.advance)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".writing")
        beside.write_text(json.dumps(found.to_dict()), encoding="utf-8")
        beside.replace(path)
        log(f"quantize: {found.param_bytes:,} bytes, {found.accuracy_drop:+.2f} points lost on {judge.part} clips")

    workers.first(find)
    return json.loads(path.read_text(encoding="utf-8"))


def measure_sensitivity(space: Workspace, bundle: Bundle, count: int) -> tuple[Sensitivity, Path]:
    """One tensor of a float bundle quantised at a time, as the recipe's `quantize` section quantises it; and the JSON
    file with it, beside the bundle.

    Raises:
        BundleError: a bundle without a float model, or of other labels or features than the recipe's.
    """
    card = bundle.card
    if card.kind != "model" or card.precision != "fp32":
        raise BundleError(
            f"{bundle.path}: holds {card.kind} in {card.precision}, wanted a model in fp32: a stage before quantize"
        )
    require_same_data(space, bundle)
    section = space.recipe.quantize or QuantizeSection()
    judge = judging_clips(space, section, count)
    with progress(f"quantize: each tensor alone, on {len(judge.features)} {judge.part} clips") as reporter:
        found = sensitivity(bundle.load_model(), calibration(space, section), judge, section, advance=reporter.advance)
    path = space.runs / SENSITIVITY
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"bundle": bundle.path.name, "sha256": bundle.sha256, **found.to_dict()}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return found, path
