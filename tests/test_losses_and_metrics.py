import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from aum_compress.train.losses import distillation_loss, label_loss, soften
from aum_compress.train.metrics import calibration_error, classification_metrics, macro_accuracy
from aum_compress.train.module import MacroAccuracy


def log_softmax(values):
    shifted = values - values.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def restated(student, one_hot, teacher_logits, *, label_weight, temperature, mean):
    """Loss and its gradient by the student's logits, in numpy float64, as CP-JKU's run_training.py writes it.

    kl_div(log_softmax(s/T), log_softmax(t/T), log_target=True, reduction="none") is exp(t) * (t - s), (B,C).
    """
    labels = -(one_hot * log_softmax(student)).sum(1).mean()
    s, t = log_softmax(student / temperature), log_softmax(teacher_logits / temperature)
    terms = np.exp(t) * (t - s)
    kl = terms.mean() if mean else terms.sum() / len(terms)
    loss = label_weight * labels + (1 - label_weight) * temperature**2 * kl
    rows = len(student) * (student.shape[1] if mean else 1)
    by_labels = (np.exp(log_softmax(student)) - one_hot) / len(student)
    by_teacher = temperature * (np.exp(s) - np.exp(t)) / rows
    return loss, label_weight * by_labels + (1 - label_weight) * by_teacher


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(2, 12)),
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(0.01, 30),
    label_weight=st.floats(0, 1),
    temperature=st.floats(0.5, 8),
    reduction=st.sampled_from(["batchmean", "mean"]),
)
def test_distillation_loss_and_gradient_by_definition(shape, seed, scale, label_weight, temperature, reduction):
    chance = np.random.default_rng(seed)
    student, teacher = scale * chance.standard_normal((2, *shape))
    one_hot = np.eye(shape[1])[chance.integers(shape[1], size=shape[0])]
    wanted, gradient = restated(
        *(student, one_hot, teacher),
        **{"label_weight": label_weight, "temperature": temperature, "mean": reduction == "mean"},
    )
    logits = torch.tensor(student, requires_grad=True)
    found = distillation_loss(
        logits,
        torch.tensor(one_hot.argmax(1)),
        soften(torch.tensor(teacher), temperature),
        label_weight=label_weight,
        temperature=temperature,
        kl_reduction=reduction,
    )
    found.backward()
    assert found.item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(logits.grad, gradient, rtol=1e-9, atol=1e-12)


def test_cp_jku_weighting_in_figures():
    """Their lambda 0.02, T 2 and `.mean()` over 10 classes weigh as 0.02 to 0.98 * 4 / 10, that is 1 to 19.6."""
    chance = np.random.default_rng(0)
    student, teacher = chance.standard_normal((2, 256, 10))
    y = chance.integers(10, size=256)
    logits, probabilities = torch.tensor(student), soften(torch.tensor(teacher), 2.0)
    found = distillation_loss(
        logits, torch.tensor(y), probabilities, label_weight=0.02, temperature=2.0, kl_reduction="mean"
    )
    theirs = F.kl_div(
        F.log_softmax(logits / 2, 1), F.log_softmax(torch.tensor(teacher) / 2, 1), log_target=True, reduction="none"
    ).mean()
    wanted = 0.02 * F.cross_entropy(logits, torch.tensor(y)) + 0.98 * 4 * theirs
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    ours = distillation_loss(logits, torch.tensor(y), probabilities, label_weight=0.0, temperature=2.0)
    label = F.cross_entropy(logits, torch.tensor(y))
    assert found.item() == pytest.approx(0.02 * label.item() + 0.98 * ours.item() / 10, rel=1e-12)


def test_mean_reduction_divides_by_the_classes_too():
    student, teacher, y = torch.randn(5, 10), soften(torch.randn(5, 10), 2.0), torch.zeros(5, dtype=torch.int64)
    settings = {"label_weight": 0.0, "temperature": 2.0}
    proper = distillation_loss(student, y, teacher, **settings)
    cpjku = distillation_loss(student, y, teacher, **settings, kl_reduction="mean")
    torch.testing.assert_close(proper, 10 * cpjku)


def test_equal_logits_leave_the_label_loss():
    logits, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    found = distillation_loss(logits, y, soften(logits, 2.0), label_weight=0.17, temperature=2.0)
    torch.testing.assert_close(found, 0.17 * label_loss(logits, y))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1), temperature=st.floats(0.5, 8))
def test_mixed_targets_give_the_mixture_of_two_gradients(seed, share, temperature):
    """What is mixed is probabilities, so a mixture pulls as its two clips would, each by its share."""
    chance = torch.Generator().manual_seed(seed)
    student, *teachers = (4 * torch.randn(3, 5, generator=chance, dtype=torch.float64) for _ in range(3))
    one, other = (soften(teacher, temperature) for teacher in teachers)

    def gradient(target):
        logits = student.clone().requires_grad_()
        y = torch.tensor([0, 1, 2])
        distillation_loss(logits, y, target, label_weight=0.0, temperature=temperature).backward()
        return logits.grad

    mixed = share * one + (1 - share) * other
    torch.testing.assert_close(gradient(mixed), share * gradient(one) + (1 - share) * gradient(other))


def test_certain_teacher_gives_a_finite_loss():
    logits = torch.zeros(2, 3, requires_grad=True)
    teacher = soften(torch.tensor([[0.0, 400.0, 0.0], [400.0, 0.0, -400.0]]), 1.0)
    found = distillation_loss(logits, torch.tensor([0, 0]), teacher, label_weight=0.0, temperature=1.0)
    found.backward()
    assert found.item() == pytest.approx(np.log(3))
    assert logits.grad.isfinite().all()


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


@given(st.integers(0, 9999), st.integers(2, 5))
@settings(max_examples=30, deadline=None)
def test_validation_in_training_is_the_accuracy_of_reports(seed, n_classes):
    """Classes without clips, which a device may have, count in neither."""
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, max(1, n_classes - 1), 12)
    answers = generator.integers(0, n_classes, 12)
    metric = MacroAccuracy(n_classes)
    for part in (slice(5), slice(5, 12)):
        metric(torch.tensor(answers[part]), torch.tensor(targets[part]))
    assert 100 * float(metric.compute()) == pytest.approx(macro_accuracy(answers == targets, targets), abs=1e-4)


def test_metrics_without_devices():
    found = classification_metrics(np.eye(2, dtype=np.float32), np.array([0, 1]), ("x", "y"), ["", ""])
    assert "by_device" not in found
    assert "unseen" not in found
    assert found["accuracy"] == 100.0


def test_calibration_error_by_hand():
    # three answers at 0.9, two of them right; two at 0.6, both right: (3*|2/3 - 0.9| + 2*|1 - 0.6|) / 5
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.4, 0.6]])
    targets = np.array([0, 1, 1, 0, 1])
    assert calibration_error(probabilities, targets) == pytest.approx(100 * (3 * (0.9 - 2 / 3) + 2 * 0.4) / 5)


def test_certain_and_right_is_calibrated():
    assert calibration_error(np.eye(4), np.arange(4)) == 0
