"""Accuracy as DCASE reports it, from logits; numpy only."""

import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

_REAL_DEVICE, _SIMULATED_DEVICE = re.compile(r"[a-d]"), re.compile(r"s\d+")
"""How TAU names its devices."""
CALIBRATION_BINS = 15


def classification_metrics(
    logits: np.ndarray,
    targets: np.ndarray,
    labels: Sequence[str],
    devices: Sequence[str] | None = None,
    seen_devices: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Figures of one model on one set of clips; accuracies in percent.

    Args:
        logits: (n,C). targets: (n,) class indices. labels: C names.
        devices: n device names; empty names count as no device.
        seen_devices: those of the training part; the others are `unseen`.

    Returns:
        clips, accuracy (macro: mean over the classes present), overall_accuracy, log_loss (nats), ece (expected
        calibration error, percent), by_class, confusion (C rows of C counts: row the true class, column the answer);
        where clips have devices by_device, and where those of the training part are known seen and unseen (macro each;
        only where there are such clips) and by_device_group (`device_groups`; macro each).
    """
    correct = logits.argmax(1) == targets
    log_probability = log_softmax(logits)
    figures: dict[str, Any] = {
        "clips": len(targets),
        "accuracy": macro_accuracy(correct, targets),
        "overall_accuracy": float(100 * correct.mean()),
        "log_loss": float(-log_probability[np.arange(len(targets)), targets].mean()),
        "ece": calibration_error(np.exp(log_probability), targets),
        "by_class": {
            label: float(100 * correct[targets == number].mean())
            for number, label in enumerate(labels)
            if (targets == number).any()
        },
        "confusion": confusion_matrix(logits.argmax(1), targets, len(labels)).tolist(),
    }
    if devices is not None and any(devices):
        names = np.asarray(devices)
        figures["by_device"] = {
            device: macro_accuracy(correct[names == device], targets[names == device]) for device in sorted(set(names))
        }
        seen = np.isin(names, sorted(seen_devices))
        for key, chosen in (("seen", seen), ("unseen", ~seen)):
            if seen_devices and chosen.any():
                figures[key] = macro_accuracy(correct[chosen], targets[chosen])
        figures["by_device_group"] = {}
        for group, members in device_groups(set(devices), seen_devices).items():
            chosen = np.isin(names, members)
            figures["by_device_group"][group] = macro_accuracy(correct[chosen], targets[chosen])
    return figures


def device_groups(devices: Collection[str], seen_devices: Collection[str]) -> dict[str, list[str]]:
    """The groups in which DCASE Task 1 reports devices, each with its members among `devices`; no group is empty.

    `real`: recording devices of training. `simulated`: those of training that are processed recordings of a real one.
    `unseen`: those that training has never heard. Empty where devices are not named as in TAU (a to d, s1, s2, ...), or
    where those of training are not known.
    """
    if not seen_devices or not all(_REAL_DEVICE.fullmatch(d) or _SIMULATED_DEVICE.fullmatch(d) for d in devices):
        return {}
    seen = sorted(set(devices) & set(seen_devices))
    groups = {
        "real": [device for device in seen if _REAL_DEVICE.fullmatch(device)],
        "simulated": [device for device in seen if _SIMULATED_DEVICE.fullmatch(device)],
        "unseen": sorted(set(devices) - set(seen_devices)),
    }
    return {group: members for group, members in groups.items() if members}


def confusion_matrix(answers: np.ndarray, targets: np.ndarray, n_classes: int) -> np.ndarray:
    """(C,C) counts: row the true class, column the answer.

    Args: answers, targets (n,) class indices.
    """
    return np.bincount(targets * n_classes + answers, minlength=n_classes**2).reshape(n_classes, n_classes)


def macro_accuracy(correct: np.ndarray, targets: np.ndarray) -> float:
    """Mean over the classes present of the share of right answers, in percent."""
    return float(np.mean([100 * correct[targets == number].mean() for number in np.unique(targets)]))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(n,C) natural logarithms of the probabilities."""
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def calibration_error(probabilities: np.ndarray, targets: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error in percent: how far confidence lies from accuracy, mean over bins of equal width.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.

    Args: probabilities (n,C); targets (n,) class indices.
    """
    confidence = probabilities.max(1)
    gap = (probabilities.argmax(1) == targets) - confidence
    places = np.minimum((confidence * bins).astype(int), bins - 1)
    return float(100 * np.abs(np.bincount(places, weights=gap, minlength=bins)).sum() / len(targets))
