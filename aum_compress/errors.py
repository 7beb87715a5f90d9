"""Every error that a user can meet, with its exit code (DESIGN section 7); the CLI prints it without a traceback.

A message says what failed, where (file, key or tensor), what was found, what was wanted and how to mend it. Collect
problems first and raise once: `join_problems` writes the list.
"""

from collections.abc import Sequence


class AumError(Exception):
    """Base of all expected errors: wrong usage, recipe or data."""

    exit_code = 2


class RecipeError(AumError):
    """A recipe that cannot be read or does not validate."""


class DataError(AumError):
    """Audio or labels that cannot be used as they are."""


class BundleError(AumError):
    """A bundle that is absent, cut short, altered, or of another kind than wanted."""


class ModelFileError(AumError):
    """An ONNX file or a checkpoint that is not what it should be."""


class TrainingDiverged(AumError):
    """A loss that is no number any more."""


class BudgetExceeded(AumError):
    """A model over its limit on bytes or MACs."""

    exit_code = 3


class VerificationFailed(AumError):
    """An exported model that does not compute what its reference computes."""

    exit_code = 4


def join_problems(heading: str, problems: Sequence[str], most: int = 20) -> str:
    """`heading`, then one problem a line; past `most` only their number, so that a screen stays readable."""
    lines = [heading, *(f"  - {problem}" for problem in problems[:most])]
    if len(problems) > most:
        lines.append(f"  ... and {len(problems) - most} more")
    return "\n".join(lines)
