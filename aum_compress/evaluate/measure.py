"""Accuracy of a bundle or an ONNX file on a folder of audio or on a recipe's test part, alone or beside another one."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aum_compress.console import log, progress
from aum_compress.data.cache import CachedClips, cache_clips
from aum_compress.errors import DataError
from aum_compress.evaluate.bootstrap import (
    CONFIDENCE,
    Answers,
    intervals,
    mcnemar_p,
    resampled_figures,
    two_sided_p,
)
from aum_compress.evaluate.clips import TestClips, find_clips, recordings_of, require_labels
from aum_compress.evaluate.predictions import require_new_file, write_predictions
from aum_compress.evaluate.subject import Subject
from aum_compress.train.metrics import classification_metrics, device_groups, log_softmax

COMPARED = ("accuracy", "overall_accuracy", "log_loss", "ece", "seen", "unseen")
"""Figures whose differences are tested."""


@dataclass(frozen=True)
class Evaluated:
    """What was measured, on what, with what."""

    model: str
    measured_with: str
    data: str
    metrics: dict[str, Any]
    """`train.metrics.classification_metrics`."""
    labels: tuple[str, ...]
    device_groups: dict[str, list[str]]
    recordings: int
    """How many the clips were cut from."""
    draws: int
    intervals: dict[str, Any] = field(default_factory=dict)
    """[low, high] of each figure, nested as `metrics` is; empty where fewer than two recordings were drawn from."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "model": self.model,
            "measured_with": self.measured_with,
            "data": self.data,
            "labels": list(self.labels),
            **self.metrics,
            "device_groups": self.device_groups,
            "recordings": self.recordings,
            "confidence": CONFIDENCE,
            "draws": self.draws,
            "intervals": self.intervals,
        }


@dataclass(frozen=True)
class Compared:
    """Two models on the same clips."""

    first: Evaluated
    second: Evaluated
    differences: dict[str, dict[str, Any]]
    """Figure -> `difference` (second less first), its `interval` and the bootstrap's two-sided `p`; both None where
    fewer than two recordings were drawn from."""
    only_first_right: int
    only_second_right: int
    mcnemar_p: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "first": self.first.to_dict(),
            "second": self.second.to_dict(),
            "differences": self.differences,
            "only_first_right": self.only_first_right,
            "only_second_right": self.only_second_right,
            "mcnemar_p": self.mcnemar_p,
        }


@dataclass(frozen=True)
class Request:
    """What a measurement is made on and how."""

    data: str
    """A folder of audio (all usable files), or a recipe (name or path), whose test part is taken."""
    settings: list[str] = field(default_factory=list)
    """`section.key=value` for a recipe."""
    seen_devices: list[str] = field(default_factory=list)
    """Devices of the training part, for a folder."""
    draws: int = 1000
    """Of the bootstrap; 0 leaves intervals out."""


def evaluate(model_path: Path, request: Request, predictions: Path | None = None) -> Evaluated:
    """Measures one model.

    Args:
        model_path: a bundle (an exported one is measured through its ONNX file) or a .onnx file.
        predictions: file that gets the answers in the challenge's format.

    Raises:
        AumError: no such model or data, labels of the data that the model does not know, or a place where predictions
            cannot be written.
    """
    if predictions:
        require_new_file(predictions)
    model = Subject(model_path)
    found = find_clips(request.data, request.settings, model.spec.clip_seconds, request.seen_devices)
    answers, clips = _answers(model, found, request.data)
    if predictions:
        names = [clip.filename for clip in clips.clips]
        count = write_predictions(predictions, names, log_softmax(answers.logits), model.labels)
        log(f"wrote {predictions}: {count} files")
    return _evaluated(model, answers, request)


def compare(first_path: Path, second_path: Path, request: Request) -> Compared:
    """Measures two models on the same clips, each through its own front-end, and tests their difference.

    Raises:
        AumError: as `evaluate`; models of other labels or clip lengths; no draws to test with.
    """
    if not request.draws:
        raise DataError("--draws 0: a comparison is a test on draws; wanted some, such as 1000")
    first, second = Subject(first_path), Subject(second_path)
    if sorted(first.labels) != sorted(second.labels):
        raise DataError(
            f"{second_path}: knows {', '.join(second.labels)}; to be compared it must know the labels of {first_path}, "
            f"{', '.join(first.labels)}"
        )
    if first.spec.clip_seconds != second.spec.clip_seconds:
        raise DataError(
            f"{second_path}: hears clips of {second.spec.clip_seconds:g} s, {first_path} of "
            f"{first.spec.clip_seconds:g} s: they have no clips in common"
        )
    found = find_clips(request.data, request.settings, first.spec.clip_seconds, request.seen_devices)
    one, heard_first = _answers(first, found, request.data)
    other, heard_second = _answers(second, found, request.data, first.labels)
    if heard_first.clips != heard_second.clips:
        raise DataError(
            f"{request.data}: the two front-ends leave out different clips; aum-compress data check says why"
        )
    evaluated = [_evaluated(model, answers, request) for model, answers in ((first, one), (second, other))]
    count = evaluated[0].draws  # none of a single recording: each draw would be the very same clips
    draws = [resampled_figures(answers, count) for answers in (one, other)] if count else []
    differences = {}
    for name in COMPARED:
        if name in evaluated[0].metrics:
            by_draw = draws[1][(name,)] - draws[0][(name,)] if draws else None
            differences[name] = {
                "difference": evaluated[1].metrics[name] - evaluated[0].metrics[name],
                "interval": None if by_draw is None else intervals({(name,): by_draw}).get(name),
                "p": None if by_draw is None else two_sided_p(by_draw),
            }
    right = [answers.logits.argmax(1) == answers.targets for answers in (one, other)]
    only_first, only_second = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    return Compared(*evaluated, differences, only_first, only_second, mcnemar_p(only_first, only_second))


def _answers(
    model: Subject, found: TestClips, data: str, labels: tuple[str, ...] | None = None
) -> tuple[Answers, CachedClips]:
    """Args: labels: the order in which classes are wanted; the model's own when left out."""
    labels = labels or model.labels
    require_labels(found.clips, labels, data, model.path)
    with progress("evaluate: features") as reporter:
        cached = cache_clips(
            found.clips, model.spec.front_end, model.spec.clip_seconds, on_bad_files="skip", progress=reporter.advance
        )
    if not len(cached):
        raise DataError(f"{data}: no clip could be used; aum-compress data check {data} says why")
    with progress(f"evaluate: {model.path.name}") as reporter:
        logits = model.logits(cached, reporter.advance)[:, [model.labels.index(label) for label in labels]]
    number = {label: place for place, label in enumerate(labels)}
    answers = Answers(
        logits=logits,
        targets=np.array([number[clip.label] for clip in cached.clips]),
        labels=labels,
        devices=[clip.device for clip in cached.clips],
        recordings=recordings_of(cached.clips),
        seen_devices=found.seen_devices,
    )
    return answers, cached


def _evaluated(model: Subject, answers: Answers, request: Request) -> Evaluated:
    seen = frozenset(answers.seen_devices)
    metrics = classification_metrics(answers.logits, answers.targets, answers.labels, answers.devices, seen)
    recordings = len(set(answers.recordings))
    draws = request.draws if recordings > 1 else 0
    return Evaluated(
        model=str(model.path),
        measured_with=model.measured_with,
        data=request.data,
        metrics=metrics,
        labels=tuple(answers.labels),
        device_groups=device_groups(set(answers.devices), seen) if any(answers.devices) else {},
        recordings=recordings,
        draws=draws,
        intervals=intervals(resampled_figures(answers, draws)) if draws else {},
    )
