"""Accuracy as DCASE reports it, from logits; numpy only."""

from collections.abc import Sequence
from typing import Any

import numpy as np


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
        calibration error, percent), by_class; where clips have devices by_device, and where those of the training part
        are known seen and unseen (macro each; only where there are such clips).
    """
    correct = logits.argmax(1) == targets
    shifted = logits - logits.max(1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
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
    return figures


def macro_accuracy(correct: np.ndarray, targets: np.ndarray) -> float:
    """Mean over the classes present of the share of right answers, in percent."""
    return float(np.mean([100 * correct[targets == number].mean() for number in np.unique(targets)]))


def calibration_error(probabilities: np.ndarray, targets: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error in percent: how far confidence lies from accuracy, mean over bins of equal width.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.

    Args: probabilities (n,C); targets (n,) class indices.
    """
    confidence = probabilities.max(1)
    gap = (probabilities.argmax(1) == targets) - confidence
    places = np.minimum((confidence * bins).astype(int), bins - 1)
    return float(100 * np.abs(np.bincount(places, weights=gap, minlength=bins)).sum() / len(targets))
