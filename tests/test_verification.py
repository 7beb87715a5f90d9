"""What counts as equal: tolerances, their figures, and how they are judged."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aum_compress.export.metadata import Precision
from aum_compress.export.verification import TOLERANCES, Check, Tolerance, compare, compare_accuracy
from aum_compress.export.verify import saturation_notes

TOLERANCE = Tolerance(max_error=0.01, min_sqnr_db=30.0, min_agreement=1.0)


def test_accuracy_may_fall_by_a_little_and_no_more():
    assert compare_accuracy("clips", 5000, 60.0, 60.05, "fp32").passed
    assert compare_accuracy("clips", 5000, 70.0, 60.0, "fp32").passed
    worse = compare_accuracy("clips", 5000, 59.5, 60.0, "fp16")
    assert not worse.passed
    assert worse.reason == "0.50 points worse, at most 0.10 wanted"
    assert "accuracy on clips, optimised: 59.50 % of 5000, the reference 60.00 %: 0.50 points worse" in worse.line()
    assert compare_accuracy("clips", 5000, 59.5, 60.0, "int8").passed
    assert not compare_accuracy("clips", 5000, 58.9, 60.0, "int8").passed
    assert compare_accuracy("clips", 50, 58.0, 60.0, "fp32").passed, "one clip of 50"
    assert not compare_accuracy("clips", 50, 56.0, 60.0, "fp32").passed


@pytest.mark.parametrize("precision", get_args(Precision))
def test_every_precision_has_its_limits(precision):
    assert compare_accuracy("clips", 5000, 60.0, 60.05, precision).passed
    assert not compare_accuracy("clips", 5000, 58.9, 60.0, precision).passed
    assert {(precision, False), (precision, True)} <= TOLERANCES.keys()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(2, 8), st.floats(0, 0.009), st.integers(0, 1000))
def test_small_errors_pass_and_large_ones_fail(n_inputs, n_classes, share, seed):
    rng = np.random.default_rng(seed)
    expected = rng.uniform(0.5, 1.0, (n_inputs, n_classes)) * rng.choice([-1, 1], (n_inputs, n_classes))
    signs = rng.choice([-1, 1], expected.shape)
    near = compare("near", expected + share * np.abs(expected).max() * signs, expected, TOLERANCE, optimised=None)
    assert near.passed, near.reason
    far = compare("far", expected + 0.1 * signs, expected, TOLERANCE, optimised=None)
    assert not far.passed
    assert far.max_abs_error == pytest.approx(0.1)


def test_figures_of_a_comparison():
    expected = np.array([[1.0, 0.0], [0.0, 1.0]])
    found = np.array([[1.0, 0.0], [1.0, 0.0]])
    check = compare("swapped", found, expected, TOLERANCE, optimised=True)
    assert (check.max_abs_error, check.agreement, check.n_inputs) == (1.0, 0.5, 2)
    assert check.sqnr_db == pytest.approx(0.0)
    assert "same class for 50.0%, ties included, at least 100% wanted" in check.reason
    assert compare("same", expected, expected, TOLERANCE, optimised=None).sqnr_db == 300
    tie = np.array([[1.0, 0.999]])
    swapped = compare("tie", tie[:, ::-1], tie, TOLERANCE, optimised=None)
    assert swapped.passed
    assert swapped.agreement == 0.0, "what is printed is what was chosen"
    assert "logits of shape (2, 2), wanted (1, 2)" in compare("shape", found, tie, TOLERANCE, optimised=None).reason
    assert "the reference's" in compare("bad", tie, tie * np.inf, TOLERANCE, optimised=None).reason


def test_many_recordings_have_to_have_the_very_same_class():
    """Ties do not excuse more than 0.5 %; of few recordings, or of noise, they may."""
    tolerance = TOLERANCES["int8", True]
    expected = np.tile([[1.0, 0.99, 0.0]], (1000, 1))
    found = expected.copy()
    found[:5] = [0.99, 1.0, 0.0]
    assert compare("clips", found, expected, tolerance, optimised=True).passed
    found[5] = [0.99, 1.0, 0.0]
    failed = compare("clips", found, expected, tolerance, optimised=True)
    assert not failed.passed
    assert failed.reason == "same class for 99.40%, at least 99.5% wanted"
    assert compare("random", found, expected, tolerance, optimised=True).passed
    assert compare("clips", found[:100], expected[:100], tolerance, optimised=True).passed


def test_stress_of_integer_kernels_is_judged_more_mildly_than_recordings():
    for key, tolerance in TOLERANCES.items():
        assert tolerance.on("clips") == tolerance.on("golden") == tolerance.on("waveform, recordings") == tolerance
        milder = tolerance.on("full scale") != tolerance
        assert milder == (key in (("int8", True), ("mixed", True)))
    assert TOLERANCES["int8", True].on("full scale") == replace(TOLERANCES["int8", True], min_sqnr_db=20.0)


def test_saturating_kernels_are_told_apart_from_a_wrong_file(monkeypatch):
    monkeypatch.setattr("aum_compress.export.verify.exact_int8_products", lambda: False)
    checks = [Check("random", True, "", optimised, 4, 0.1, sqnr) for optimised, sqnr in ((False, 60.0), (True, 14.0))]
    (note,) = saturation_notes(checks)
    assert note.startswith("random: 14.0 dB optimised, 60.0 dB as written: int8 kernels of x86 processors without VNNI")
    assert not list(saturation_notes([checks[0], replace(checks[1], sqnr_db=45.0)]))
    monkeypatch.setattr("aum_compress.export.verify.exact_int8_products", lambda: True)
    assert not list(saturation_notes(checks)), "this processor cannot saturate"
