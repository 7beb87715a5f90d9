import numpy as np
import pytest
import torch
import torch.nn.functional as F

from aum_compress.train.losses import distillation_loss, label_loss
from aum_compress.train.metrics import classification_metrics


def test_distillation_loss_by_its_definition():
    torch.manual_seed(0)
    student, teacher, y = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    t = 3.0
    p, q = F.softmax(teacher / t, -1), F.softmax(student / t, -1)
    divergence = (p * (p / q).log()).sum(1).mean()
    wanted = 0.25 * F.cross_entropy(student, y) + 0.75 * t**2 * divergence
    found = distillation_loss(student, y, teacher, label_weight=0.25, temperature=t)
    torch.testing.assert_close(found, wanted)


def test_mean_reduction_divides_by_the_classes_too():
    student, teacher, y = torch.randn(5, 10), torch.randn(5, 10), torch.zeros(5, dtype=torch.int64)
    settings = {"label_weight": 0.0, "temperature": 2.0}
    proper = distillation_loss(student, y, teacher, **settings)
    cpjku = distillation_loss(student, y, teacher, **settings, kl_reduction="mean")
    torch.testing.assert_close(proper, 10 * cpjku)


def test_equal_logits_leave_the_label_loss():
    logits, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    found = distillation_loss(logits, y, logits, label_weight=0.17, temperature=2.0)
    torch.testing.assert_close(found, 0.17 * label_loss(logits, y))


def test_mixed_targets_are_probabilities():
    logits = torch.randn(4, 3)
    one_hot = F.one_hot(torch.tensor([0, 1, 2, 0]), 3).float()
    torch.testing.assert_close(label_loss(logits, one_hot), label_loss(logits, one_hot.argmax(1)))


def test_metrics_are_macro_and_by_device():
    # class 0: 3 of 4 right, class 1: 0 of 1 right
    logits = np.array([[2, 0, 0], [2, 0, 0], [2, 0, 0], [0, 2, 0], [2, 0, 0]], dtype=np.float32)
    targets = np.array([0, 0, 0, 0, 1])
    found = classification_metrics(logits, targets, ("x", "y", "z"), ["a", "a", "s4", "s4", "s4"], frozenset({"a"}))
    assert found["accuracy"] == pytest.approx((75 + 0) / 2)
    assert found["overall_accuracy"] == pytest.approx(60)
    assert found["by_class"] == {"x": 75.0, "y": 0.0}, "classes without clips are not counted"
    assert found["by_device"] == {"a": 100.0, "s4": pytest.approx(25.0)}
    assert (found["seen"], found["unseen"]) == (100.0, pytest.approx(25.0))
    expected = -np.log(np.exp(2) / (np.exp(2) + 2)) * 3 - 2 * np.log(1 / (np.exp(2) + 2))
    assert found["log_loss"] == pytest.approx(expected / 5)


def test_metrics_without_devices():
    found = classification_metrics(np.eye(2, dtype=np.float32), np.array([0, 1]), ("x", "y"), ["", ""])
    assert "by_device" not in found
    assert "unseen" not in found
    assert found["accuracy"] == 100.0
