"""The verdict on an exported file: checks, their figures, and what counts as equal."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from aum_compress.errors import VerificationFailed, join_problems
from aum_compress.export.metadata import Precision

_EXACT_DB = 300.0
"""Stands for no difference at all; float32 arithmetic in another order gives 120 to 145 dB."""


RECORDED = ("golden", "clips", "waveform, recordings")
"""Names of inputs that are recordings, or made like them."""
ITSELF = "itself (neither a reference nor golden logits were there)"
"""What values were compared with where there was nothing else: no proof of any model."""
FEW_RECORDINGS = 200
"""Of fewer, a single one between two classes would be too large a share."""


@dataclass(frozen=True)
class Tolerance:
    """How far logits may be from their reference."""

    max_error: float
    """Largest difference, as a share of the largest reference logit of the check."""
    min_sqnr_db: float
    """Signal-to-noise ratio: energy of the reference logits over energy of the differences."""
    min_agreement: float
    """Share of inputs with the same highest class, or with one that the reference puts within twice `max_error` of its
    highest: the tolerance lets those two swap."""
    min_same_class: float | None = None
    """Share of recordings with the very same highest class, where there are at least `FEW_RECORDINGS`."""
    stress_sqnr_db: float | None = None
    """`min_sqnr_db` on inputs that no recording holds, where it is another."""

    def on(self, name: str) -> "Tolerance":
        """For the inputs of that name."""
        if self.stress_sqnr_db is None or name in RECORDED:
            return self
        return replace(self, min_sqnr_db=self.stress_sqnr_db)


_SAME_ARITHMETIC = Tolerance(max_error=1e-4, min_sqnr_db=80.0, min_agreement=1.0)
# a value on the edge between two quantisation steps may fall to either side; noise and square waves of full scale lie
# far outside the calibrated ranges: of what is left, a step is a large share
_EDGES = Tolerance(max_error=0.05, min_sqnr_db=30.0, min_agreement=0.98, min_same_class=0.995)
_INTEGER_KERNELS = replace(_EDGES, max_error=0.10, stress_sqnr_db=20.0)
TOLERANCES: Mapping[tuple[Precision, bool], Tolerance] = {
    ("fp32", False): _SAME_ARITHMETIC,
    ("fp32", True): _SAME_ARITHMETIC,
    ("fp16", False): _SAME_ARITHMETIC,  # fp16 is how values are stored: both sides calculate in float32
    ("fp16", True): _SAME_ARITHMETIC,
    ("int8", False): _EDGES,
    ("int8", True): _INTEGER_KERNELS,
    ("int4", False): _SAME_ARITHMETIC,  # weights alone
    # onnxruntime's kernel for weights of 4 bits rounds what it multiplies them with to 8
    ("int4", True): _EDGES,
    # some layers as in int8 files
    ("mixed", False): _EDGES,
    ("mixed", True): _INTEGER_KERNELS,
}
"""(precision, onnxruntime's graph optimisation on) -> tolerance."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. Figures are None where nothing was compared by value; features have an error
    alone."""

    name: str
    passed: bool
    reason: str
    """Why it failed; empty when it passed."""
    optimised: bool | None = None
    """Whether onnxruntime was allowed to rewrite the graph."""
    n_inputs: int | None = None
    max_abs_error: float | None = None
    sqnr_db: float | None = None
    agreement: float | None = None
    """Share of inputs with the very same highest class."""
    tolerance: Tolerance | None = None
    accuracy: float | None = None
    """In percent, of labelled clips; `reference_accuracy` is what it is compared with."""
    reference_accuracy: float | None = None

    def line(self) -> str:
        """For people."""
        how = "" if self.optimised is None else ", optimised" if self.optimised else ", as written"
        figures = ""
        if self.max_abs_error is not None and self.sqnr_db is None:
            figures = f": max error {self.max_abs_error:.2g} of {self.n_inputs}"
        elif self.max_abs_error is not None:
            figures = (
                f": max error {self.max_abs_error:.2g}, SQNR {self.sqnr_db:.1f} dB, "
                f"same class {self.agreement:.1%} of {self.n_inputs}"
            )
        if self.accuracy is not None:
            figures = f": {self.accuracy:.2f} % of {self.n_inputs}, the reference {self.reference_accuracy:.2f} %"
        return (
            f"{'ok  ' if self.passed else 'FAIL'} {self.name}{how}{figures}{'' if self.passed else ': ' + self.reason}"
        )


@dataclass(frozen=True)
class Verification:
    """All checks of one file."""

    path: Path
    precision: Precision
    reference: str
    """What values were compared with, in words; `ITSELF` where there was nothing."""
    checks: tuple[Check, ...]
    warnings: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """No check failed."""
        return all(check.passed for check in self.checks)

    @property
    def verdict(self) -> Literal["passed", "consistent", "failed"]:
        """`consistent` where no check failed, but none could show whether the model is the right one."""
        if not self.passed:
            return "failed"
        return "consistent" if self.reference == ITSELF else "passed"

    @property
    def max_abs_error(self) -> float | None:
        """Largest difference of any logit in any check."""
        return max((check.max_abs_error for check in self.checks if check.sqnr_db is not None), default=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the path's name alone, so that reports of two machines compare equal."""
        return {
            "file": self.path.name,
            "precision": self.precision,
            "reference": self.reference,
            "verdict": self.verdict,
            "passed": self.passed,
            "max_abs_error": self.max_abs_error,
            "checks": [asdict(check) for check in self.checks],
            "warnings": list(self.warnings),
        }

    def lines(self) -> list[str]:
        """The verdict, then one line a check, then warnings."""
        count, failed = len(self.checks), sum(not check.passed for check in self.checks)
        unproved = "nothing shows whether its model is right: give --reference BUNDLE"
        verdict = {
            "passed": f"PASSED of {count} checks against {self.reference}",
            "consistent": f"CONSISTENT in all {count} checks; {unproved}",
            "failed": f"FAILED in {failed} of {count} checks against {self.reference}",
        }[self.verdict]
        return [
            f"{self.path.name} ({self.precision}): {verdict}",
            *(f"  {check.line()}" for check in self.checks),
            *(f"  note {warning}" for warning in self.warnings),
        ]

    def enforce(self) -> None:
        """Raises VerificationFailed with every failed check, if there is one."""
        if not self.passed:
            failed = [check.line().removeprefix("FAIL ") for check in self.checks if not check.passed]
            raise VerificationFailed(
                join_problems(f"{self.path}: is not what {self.reference} says; export it again:", failed)
            )


@dataclass(frozen=True)
class NotJudged:
    """A file of a precision that no reference holds."""

    path: Path
    precision: Precision

    def to_dict(self) -> dict[str, Any]:
        """JSON values under the keys of `Verification.to_dict`."""
        return {
            "file": self.path.name,
            "precision": self.precision,
            "reference": None,
            "verdict": "not judged",
            "passed": None,
            "max_abs_error": None,
            "checks": [],
            "warnings": [],
        }

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.path.name} ({self.precision}): not judged: no reference holds {self.precision}; "
            "give the bundle that it was exported from too, --reference BUNDLE"
        ]


def finding(name: str, problems: list[str]) -> Check:
    """A check without figures: passed when there are no problems."""
    return Check(name, not problems, "; ".join(problems[:5]) + (f"; {len(problems) - 5} more" if problems[5:] else ""))


MAX_ACCURACY_DROP: Mapping[Precision, float] = {"fp32": 0.1, "fp16": 0.1, "int8": 1.0, "int4": 1.0, "mixed": 1.0}
"""Percentage points that a file may be worse than its reference on labelled clips, or one clip where that is more: an
answer on the edge between two classes may fall to either side."""


def compare_accuracy(data: str, n_clips: int, found: float, reference: float, precision: Precision) -> Check:
    """Accuracies in percent on the clips of `data`; a file that is better passes."""
    drop, limit = reference - found, max(MAX_ACCURACY_DROP[precision], 100 / n_clips)
    reason = "" if drop <= limit + 1e-6 else f"{drop:.2f} points worse, at most {limit:.2f} wanted"
    name = f"accuracy on {data}"
    return Check(name, not reason, reason, True, n_clips, accuracy=found, reference_accuracy=reference)


def compare(
    name: str, found: np.ndarray, expected: np.ndarray, tolerance: Tolerance, *, optimised: bool | None
) -> Check:
    """Logits (B,C) against their reference (B,C)."""
    if found.shape != expected.shape:
        reason = f"logits of shape {found.shape}, wanted {expected.shape}"
        return Check(name, False, reason, optimised, len(expected), tolerance=tolerance)
    for whose, logits in (("", found), ("the reference's ", expected)):
        if bad := int((~np.isfinite(logits)).sum()):
            reason = f"{bad} of {whose}{logits.size} logits are NaN or infinite"
            return Check(name, False, reason, optimised, len(expected), tolerance=tolerance)
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    difference = np.abs(found - expected)
    limit = tolerance.max_error * max(float(np.abs(expected).max()), 1e-6)
    signal, noise = float((expected**2).sum()), float((difference**2).sum())
    sqnr_db = min(_EXACT_DB, 10 * np.log10(signal / noise)) if noise and signal else 0.0 if noise else _EXACT_DB
    chosen = np.take_along_axis(expected, found.argmax(1)[:, None], axis=1)[:, 0]
    near = float((chosen >= expected.max(1) - 2 * limit).mean())
    same = float((found.argmax(1) == expected.argmax(1)).mean())
    least = tolerance.min_same_class if name in RECORDED and len(expected) >= FEW_RECORDINGS else None
    problems = []
    if (error := float(difference.max())) > limit:
        problems.append(f"an error of {error:.3g}, at most {limit:.3g} wanted")
    if sqnr_db < tolerance.min_sqnr_db:
        problems.append(f"SQNR {sqnr_db:.1f} dB, at least {tolerance.min_sqnr_db:.0f} dB wanted")
    if near < tolerance.min_agreement:
        problems.append(f"same class for {near:.1%}, ties included, at least {tolerance.min_agreement:.0%} wanted")
    elif least is not None and same < least:
        problems.append(f"same class for {same:.2%}, at least {least:.1%} wanted")
    return Check(
        name, not problems, "; ".join(problems), optimised, len(expected), error, float(sqnr_db), same, tolerance
    )
