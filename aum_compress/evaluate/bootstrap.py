"""How sure figures are: the bootstrap over recordings, and tests of two models on the same clips. numpy only.

Clips of one recording sound alike, so that a model is right or wrong on many of them at once. Drawing single clips
would take them for independent and give intervals that are too narrow: recordings are drawn instead, each with all its
clips (the cluster bootstrap; Field and Welsh 2007, "Bootstrapping clustered data").
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aum_compress.train.metrics import CALIBRATION_BINS, device_groups, log_softmax

CONFIDENCE = 95
"""Percent of an interval."""
_DRAWS_AT_ONCE = 64
Key = tuple[str, ...]
"""Place of a figure in the metrics, such as ("by_device", "a")."""


@dataclass(frozen=True)
class Answers:
    """What a model answered on n clips, and what it should have."""

    logits: np.ndarray
    """(n,C)."""
    targets: np.ndarray
    """(n,) class indices."""
    labels: Sequence[str]
    devices: Sequence[str]
    """n names; empty where a clip has none."""
    recordings: Sequence[str]
    """n names of the recordings that the clips were cut from."""
    seen_devices: Collection[str] = ()
    """Those of the training part, where they are known."""


def resampled_figures(answers: Answers, draws: int, seed: int = 0) -> dict[Key, np.ndarray]:
    """Figure -> its value (draws,) in each draw of as many recordings as there are, with replacement.

    The keys are those of `train.metrics.classification_metrics`. NaN where a draw has no clip to measure on. The same
    recordings are drawn for the same recordings, `draws` and `seed`, whatever the answers: so figures of two models are
    paired.
    """
    recordings, row = np.unique(np.asarray(answers.recordings), return_inverse=True)
    devices, device = np.unique(np.asarray(answers.devices, dtype=np.str_), return_inverse=True)
    n_classes, count = len(answers.labels), len(recordings)
    cell = device * n_classes + answers.targets
    right = answers.logits.argmax(1) == answers.targets
    log_probability = log_softmax(answers.logits)
    confidence = np.exp(log_probability.max(1))
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)

    def by_recording(column: np.ndarray, width: int, values: np.ndarray) -> np.ndarray:
        """(recordings,width): sums of `values` (n,) in each column."""
        return np.bincount(row * width + column, weights=values, minlength=count * width).reshape(count, width)

    sums = {
        "right": by_recording(cell, len(devices) * n_classes, right.astype(float)),
        "clips": by_recording(cell, len(devices) * n_classes, np.ones(len(row))),
        "loss": by_recording(np.zeros_like(row), 1, -log_probability[np.arange(len(row)), answers.targets]),
        "gap": by_recording(bins, CALIBRATION_BINS, right - confidence),
    }
    members = _members(answers, [str(name) for name in devices])
    parts = [
        _figures({name: weights @ values for name, values in sums.items()}, members, answers.labels)
        for weights in _drawn(count, draws, seed)
    ]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def intervals(figures: dict[Key, np.ndarray]) -> dict[str, Any]:
    """[low, high] of each figure, nested as the metrics are; one that no draw could measure is left out."""
    tail = (100 - CONFIDENCE) / 2
    nested: dict[str, Any] = {}
    for key, values in figures.items():
        if np.isnan(values).all():
            continue
        place = nested
        for part in key[:-1]:
            place = place.setdefault(part, {})
        place[key[-1]] = np.nanpercentile(values, [tail, 100 - tail]).tolist()
    return nested


def two_sided_p(differences: np.ndarray) -> float:
    """How often draws put a difference at or beyond zero, on the side where that is rarer, twice over; at most 1.

    One draw is added on either side, so that p is never 0 (Davison and Hinkley 1997, section 4.2).
    """
    differences = differences[~np.isnan(differences)]
    fewer = min((differences <= 0).sum(), (differences >= 0).sum())
    return min(1.0, 2 * (1 + int(fewer)) / (1 + len(differences)))


def mcnemar_p(only_first: int, only_second: int) -> float:
    """McNemar's exact two-sided test (McNemar 1947): are clips that one model alone has right equally often either's?

    It takes clips for independent. Those of one recording are not, so this p is too small where recordings have several
    clips, and then only `two_sided_p` of the bootstrap should be relied on.

    Args: numbers of clips that only the first model, and only the second one, has right.
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    # of a fair coin thrown n times; in logarithms, as n reaches tens of thousands
    terms = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(fewer + 1)
    ]
    largest = max(terms)
    return min(1.0, 2 * math.exp(largest) * math.fsum(math.exp(term - largest) for term in terms))


def _drawn(count: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """(b,count) how often each recording is drawn, in pieces of b draws."""
    chance = np.random.default_rng(seed)
    for start in range(0, draws, _DRAWS_AT_ONCE):
        size = min(_DRAWS_AT_ONCE, draws - start)
        drawn = chance.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count).astype(np.float64)


def _members(answers: Answers, devices: list[str]) -> dict[Key, list[int]]:
    """Figure -> numbers of the devices whose clips it is measured on."""
    members: dict[Key, list[int]] = {("accuracy",): list(range(len(devices)))}
    if not any(devices):
        return members
    members |= {("by_device", name): [number] for number, name in enumerate(devices)}
    if answers.seen_devices:
        seen = [number for number, name in enumerate(devices) if name in answers.seen_devices]
        members[("seen",)], members[("unseen",)] = seen, [k for k in range(len(devices)) if k not in seen]
    for group, names in device_groups(devices, answers.seen_devices).items():
        members[("by_device_group", group)] = [devices.index(name) for name in names]
    return {key: numbers for key, numbers in members.items() if numbers}


def _figures(
    sums: dict[str, np.ndarray], members: dict[Key, list[int]], labels: Sequence[str]
) -> dict[Key, np.ndarray]:
    """Of b draws, whose sums are (b,devices*C), (b,1) and (b,bins)."""
    cells = (len(sums["loss"]), -1, len(labels))
    right, clips = sums["right"].reshape(cells), sums["clips"].reshape(cells)
    total = clips.sum((1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        by_class = 100 * right.sum(1) / clips.sum(1)
        figures: dict[Key, np.ndarray] = {
            key: _mean_of_known(100 * right[:, numbers].sum(1) / clips[:, numbers].sum(1))
            for key, numbers in members.items()
        }
    figures |= {("by_class", label): by_class[:, number] for number, label in enumerate(labels)}
    figures[("overall_accuracy",)] = 100 * right.sum((1, 2)) / total
    figures[("log_loss",)] = sums["loss"][:, 0] / total
    figures[("ece",)] = 100 * np.abs(sums["gap"]).sum(1) / total
    return figures


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """(b,C) to (b,): mean over the classes that a draw has; NaN where it has none."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(1) / known.sum(1)
