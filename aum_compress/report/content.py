"""The parts of which a report is built, the same for screen, Markdown and HTML. Torch-free.

Cells hold their text as printed, so that no form can round or choose differently from another.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

ABSENT = "-"


class Cell(NamedTuple):
    """One cell of a table, as printed."""

    text: str
    fraction: float | None = None
    """Length of a bar beside the text; above 1 is full."""
    good: bool | None = None
    """A verdict, which the text gives too; beside a bar, it is the bar's."""
    shade: float | None = None
    """Strength of the cell's colour, from 0 to 1, for tables that are looked at as a picture."""


class Column(NamedTuple):
    title: str
    right: bool = True
    """Figures stand right, names left."""


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    folded: bool = False
    """Of interest to few: HTML shows it on demand."""


@dataclass(frozen=True)
class Section:
    key: str
    """Names the place: an anchor in HTML, where charts hang."""
    title: str
    paragraphs: tuple[str, ...]
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class Verdict:
    good: bool | None
    """None where nothing failed but something was not looked at."""
    headline: str
    facts: tuple[str, ...]


def figure(value: float | None, form: str = ",") -> str:
    """`value` in the format `form`; a dash where there is none or it is not finite."""
    if value is None or not math.isfinite(value):
        return ABSENT
    return format(value, form)


def percent(value: float | None) -> Cell:
    """A percentage with one decimal and its bar."""
    known = value is not None and math.isfinite(value)
    return Cell(figure(value, ".1f"), value / 100 if known else None)


def portion(fraction: float | None) -> str:
    """A fraction in percent, sign included."""
    text = figure(None if fraction is None else 100 * fraction, ".1f")
    return text if text == ABSENT else f"{text} %"


def share(part: int, whole: int, good: bool | None = None) -> Cell:
    """`part` of `whole` in percent, with its bar."""
    fraction = part / whole if whole else 0.0
    return Cell(portion(fraction), fraction, good)


def names(*texts: str) -> tuple[Column, ...]:
    """Columns of words."""
    return tuple(Column(text, right=False) for text in texts)


def numbers(*texts: str) -> tuple[Column, ...]:
    """Columns of figures."""
    return tuple(Column(text) for text in texts)
