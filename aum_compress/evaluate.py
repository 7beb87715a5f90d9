"""Accuracy of a bundle or an ONNX file on a folder of audio or on a recipe's test part."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aum_compress.audio.config import InputSpec
from aum_compress.bundle import CARD, Bundle, read_bundle
from aum_compress.console import log, progress
from aum_compress.data.cache import CachedClips, cache_clips
from aum_compress.data.check import check_data
from aum_compress.data.clips import Clip
from aum_compress.data.folders import windows
from aum_compress.data.index import load_index
from aum_compress.errors import DataError, RecipeError, join_problems
from aum_compress.export.runtime import Classifier
from aum_compress.recipe import find_recipe, load_recipe
from aum_compress.train.metrics import classification_metrics

BATCH = 64


@dataclass(frozen=True)
class Evaluated:
    """What was measured, on what, with what."""

    model: str
    measured_with: str
    data: str
    metrics: dict[str, Any]


def evaluate(model_path: Path, data: str, settings: list[str]) -> Evaluated:
    """Measures the model on a folder of audio (all usable files), or on the test part of a recipe (name or path).

    Args:
        model_path: a bundle (an exported one is measured through its ONNX file) or a .onnx file.
        settings: `section.key=value` for a recipe.

    Raises:
        AumError: no such model or data, or labels of the data that the model does not know.
    """
    model = _Model(model_path)
    clips, seen = _clips(data, settings, model.spec)
    unknown = sorted({clip.label for clip in clips} - set(model.labels))
    if unknown:
        raise DataError(
            join_problems(
                f"{data}: has labels that {model_path} does not know (it knows {', '.join(model.labels)}):", unknown
            )
        )
    with progress("evaluate: features") as reporter:
        cached = cache_clips(
            clips, model.spec.front_end, model.spec.clip_seconds, on_bad_files="skip", progress=reporter.advance
        )
    if not len(cached):
        raise DataError(f"{data}: no clip could be used; aum-compress data check {data} says why")
    with progress(f"evaluate: {model_path.name}") as reporter:
        logits = model.logits(cached, reporter.advance)
    number = {label: place for place, label in enumerate(model.labels)}
    targets = np.array([number[clip.label] for clip in cached.clips])
    metrics = classification_metrics(logits, targets, model.labels, [c.device for c in cached.clips], seen)
    return Evaluated(str(model_path), model.measured_with, data, metrics)


class _Model:
    """A torch bundle or an ONNX file, whichever `path` is."""

    def __init__(self, path: Path) -> None:
        self.bundle: Bundle | None = None
        if path.is_dir() or path.name == CARD:
            bundle = read_bundle(path if path.is_dir() else path.parent)
            if bundle.card.kind == "model":
                self.bundle = bundle
            else:
                path = bundle.path / f"model-{bundle.card.precision}.onnx"
        if self.bundle:
            self.labels, self.spec, self.measured_with = self.bundle.card.labels, self.bundle.card.input, "torch"
        else:
            self.classifier = Classifier(path)
            self.labels = self.classifier.labels
            self.spec = InputSpec.model_validate(dict(self.classifier.metadata.input))
            self.measured_with = "onnxruntime"

    def logits(self, cached: CachedClips, advance) -> np.ndarray:
        """(n,C) for all clips."""
        if self.bundle:
            from aum_compress.train.predict import predict_logits

            return predict_logits(self.bundle.load_model(), cached, self.spec, advance)
        found = []
        for start in range(0, len(cached), BATCH):
            features = (cached[start : start + BATCH] - self.spec.mean) / self.spec.std
            found.append(self.classifier.logits(features.astype(np.float32)[:, None]))
            advance(min(start + BATCH, len(cached)), len(cached))
        return np.concatenate(found)


def _clips(data: str, settings: list[str], spec: InputSpec) -> tuple[tuple[Clip, ...], frozenset[str]]:
    """The clips to measure on, and the devices that the recipe's training part has (none for a folder)."""
    root = Path(data).expanduser()
    if not root.is_dir():
        try:
            path = find_recipe(data)
        except RecipeError as error:
            raise DataError(f"--data: no folder of audio there, and {error}") from None
        recipe = load_recipe(path, settings)
        with progress("evaluate: data") as reporter:
            index = load_index(recipe.data, recipe.seed, reporter.advance)
        return index.test, index.seen_devices
    with progress("evaluate: reading") as reporter:
        report = check_data(root, clip_seconds=spec.clip_seconds, progress=reporter.advance)
    if report.bad:
        log(f"{root}: {len(report.bad)} files are left out; aum-compress data check {root} says why")
    return tuple(window for clip, _ in report.good for window in windows(clip, spec.clip_seconds)), frozenset()
