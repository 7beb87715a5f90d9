"""Which class was taken for which, by one model. Torch-free."""

from collections.abc import Sequence

from aum_compress.report.content import Cell, Section, Table, figure, names, numbers
from aum_compress.report.schema import RoadStep

MOST_CLASSES = 40
"""Above this a matrix is no picture any more; report.json has it."""
MOST_PAIRS = 5


def confusion_section(step: RoadStep | None, labels: Sequence[str]) -> Section | None:
    """The matrix of one model, and its most frequent mistakes in words; None where it was not counted."""
    matrix = step and step["test"].get("confusion")
    if not matrix or len(labels) != len(matrix) or len(labels) > MOST_CLASSES:
        return None
    rows = tuple((Cell(label), *_row(counts, place)) for place, (label, counts) in enumerate(zip(labels, matrix)))
    table = Table("Confusion", (*names("true class"), *numbers(*labels), *numbers("clips")), rows)
    text = f"Of {step['title']}: clips by true class (rows) and by answer (columns)."
    mistakes = _mistakes(matrix, labels)
    return Section("confusion", "What is taken for what", (text, mistakes) if mistakes else (text,), (table,))


def _row(counts: Sequence[int], own: int) -> list[Cell]:
    whole = sum(counts)
    cells = [
        Cell(f"{count:,}", shade=count / whole, good=place == own or None) if count else Cell("")
        for place, count in enumerate(counts)
    ]
    return [*cells, Cell(figure(whole))]


def _mistakes(matrix: Sequence[Sequence[int]], labels: Sequence[str]) -> str:
    pairs = [
        (count / sum(counts), labels[true], labels[answer])
        for true, counts in enumerate(matrix)
        for answer, count in enumerate(counts)
        if true != answer and count
    ]
    most = sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:MOST_PAIRS]
    if not most:
        return ""
    return "Most often: " + ", ".join(f"{true} heard as {answer} ({share:.0%})" for share, true, answer in most) + "."
