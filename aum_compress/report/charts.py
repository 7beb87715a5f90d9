"""Charts as inline SVG without script. Torch-free.

Colours come from the page's style sheet, by series; series differ in shape or dash too, so that none depends on colour.
Drawn 360 units wide, which a phone shows at about their own size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH = 360
_ROW = 40
_TOP, _RIGHT, _BOTTOM, _LEFT = 10, 12, 34, 44
_CURVE_HEIGHT = 210
_MOST_DOTS = 20
"""Above this many points, a curve is drawn without dots."""


@dataclass(frozen=True)
class Series:
    """Values of one kind; None leaves a gap. Position in the list of series decides colour, shape and dash."""

    name: str
    values: Sequence[float | None]


@dataclass(frozen=True)
class Point:
    """One mark of a scatter chart."""

    x: float
    y: float
    series: int
    label: str
    """Stands beside it: a number, explained in a table."""


def dot_chart(rows: Sequence[str], series: Sequence[Series], label: str, reference: tuple[str, float] | None) -> str:
    """Percentages, one row a name, one mark a series.

    Args:
        reference: name and value of a dashed vertical line.
    """
    left, right = 6, _WIDTH - 14
    bottom = _TOP + _ROW * len(rows) + 8
    parts = []
    for tick in range(0, 101, 25):
        x = _scaled(tick, 0, 100, left, right)
        parts += [_line(x, _TOP, x, bottom, "grid"), _text(x, bottom + 15, f"{tick} %", _anchor(x))]
    if reference is not None:
        x = _scaled(reference[1], 0, 100, left, right)
        parts += [_line(x, _TOP, x, bottom, "reference"), _text(x + 4, bottom - 3, reference[0], "start")]
    for place, row in enumerate(rows):
        y = _TOP + _ROW * place
        parts += [_text(left, y + 14, row, "start", "row"), _line(left, y + 27, right, y + 27, "axis")]
        # the first series is the one that counts: drawn last, on top
        for number in reversed(range(len(series))):
            if (value := series[number].values[place]) is not None:
                parts.append(_mark(number, _scaled(value, 0, 100, left, right), y + 27))
    return _svg(label, bottom + 20, parts) + _legend([(number, one.name) for number, one in enumerate(series)])


def line_chart(x: Sequence[float], series: Sequence[Series], label: str, x_label: str) -> str:
    """Curves over `x`, each series as long as `x`; the vertical axis spans what there is, on round numbers."""
    known = [value for one in series for value in one.values if value is not None]
    if not known:
        return ""
    y_ticks, x_ticks = _ticks(min(known), max(known)), _ticks(min(x), max(x), whole=True)
    low, high, first, last = y_ticks[0], y_ticks[-1], min(x), max(x)
    bottom, right = _CURVE_HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for tick in y_ticks:
        y = _scaled(tick, low, high, bottom, _TOP)
        parts += [_line(_LEFT, y, right, y, "grid"), _text(_LEFT - 5, y + 4, f"{tick:g}", "end")]
    for tick in x_ticks:
        if first <= tick <= last:
            parts.append(_text(_scaled(tick, first, last, _LEFT, right), bottom + 16, f"{tick:g}", "middle"))
    parts.append(_text((_LEFT + right) / 2, bottom + 31, x_label, "middle"))
    for number, one in enumerate(series):
        points = [
            None if value is None else (_scaled(at, first, last, _LEFT, right), _scaled(value, low, high, bottom, _TOP))
            for at, value in zip(x, one.values)
        ]
        parts += [_curve(number, run) for run in _runs(points)]
        if len(points) <= _MOST_DOTS:
            parts += [_mark(number, *point, size=3) for point in points if point]
    return _svg(label, _CURVE_HEIGHT, parts) + _legend([(number, one.name) for number, one in enumerate(series)])


def scatter_chart(points: Sequence[Point], label: str, x_label: str, limit: float | None, series: Sequence[str]) -> str:
    """Points over a logarithmic axis; the vertical axis spans what there is, on round numbers.

    Args:
        limit: a dashed vertical line.
        series: names of the series, for the legend; those without a name or a point are left out.
    """
    points = [point for point in points if point.x > 0 and math.isfinite(point.y)]
    if not points:
        return ""
    marked = [point.x for point in points] + ([limit] if limit else [])
    low, high = math.floor(math.log10(min(marked)) * 4) / 4, math.ceil(math.log10(max(marked)) * 4 + 0.2) / 4
    y_ticks = _ticks(min(point.y for point in points), max(point.y for point in points))
    bottom, right = _CURVE_HEIGHT - _BOTTOM, _WIDTH - _RIGHT

    def across(x: float) -> float:
        return _scaled(math.log10(x), low, high, _LEFT, right)

    parts = []
    for tick in y_ticks:
        y = _scaled(tick, y_ticks[0], y_ticks[-1], bottom, _TOP)
        parts += [_line(_LEFT, y, right, y, "grid"), _text(_LEFT - 5, y + 4, f"{tick:g}", "end")]
    for x in _log_ticks(low, high):
        parts += [_line(across(x), _TOP, across(x), bottom, "grid"), _text(across(x), bottom + 16, _short(x), "middle")]
    if limit:
        parts += [_line(across(limit), _TOP, across(limit), bottom, "reference")]
        parts.append(_text(across(limit) + 4, _TOP + 8, "limit", "start"))
    parts.append(_text((_LEFT + right) / 2, bottom + 31, x_label, "middle"))
    # marks first: a label stands clear of all of them where there is room
    taken = [(across(p.x), _scaled(p.y, y_ticks[0], y_ticks[-1], bottom, _TOP), 10, 10) for p in points]
    labels: list[str] = []
    for point in sorted(points, key=lambda point: -point.series):  # what ships is drawn last, on top
        x, y = across(point.x), _scaled(point.y, y_ticks[0], y_ticks[-1], bottom, _TOP)
        parts.append(_mark(point.series, x, y, size=5))
        labels.append(_free_place(x, y, point.label, right, taken))
    parts += labels
    present = {point.series for point in points}
    named = [(number, name) for number, name in enumerate(series) if name and number in present]
    return _svg(label, _CURVE_HEIGHT, parts) + _legend(named)


def _free_place(x: float, y: float, label: str, right: float, taken: list[tuple[float, float, float, float]]) -> str:
    """A label beside, over or below its mark, clear of what is `taken` (centre, width, height); that grows by it."""
    width, height = 7.5 * len(label), 12
    away = 7 + width / 2
    places = [(x + away, y), (x - away, y), (x, y - 12), (x, y + 12), (x + away, y - 10), (x + away, y + 10)]

    def crowd(place: tuple[float, float]) -> tuple[int, int]:
        over = [
            1
            for (tx, ty, tw, th) in taken
            if abs(tx - place[0]) < (tw + width) / 2 and abs(ty - place[1]) < (th + height) / 2
        ]
        return len(over) + 9 * (place[0] + width / 2 > right), places.index(place)

    at = min(places, key=crowd)
    taken.append((*at, width, height))
    return _text(at[0], at[1] + 4, label, "middle", "row")


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 3 times each where they are few; at most five."""
    whole = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)]
    if len(whole) > 5:
        return whole[:: math.ceil(len(whole) / 5)]
    finer = [factor * 10.0**power for power in range(math.floor(low), math.ceil(high)) for factor in (1, 3)]
    between = [x for x in finer if low <= math.log10(x) <= high]
    return between if len(between) <= 5 else whole


def _short(value: float) -> str:
    """1000 as 1k, 3e7 as 30M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _scaled(value: float, low: float, high: float, start: float, end: float) -> float:
    """`value` of [low, high] on [start, end]; the middle where the range is empty."""
    return start + (end - start) * ((value - low) / (high - low) if high > low else 0.5)


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Two to seven round numbers, 1, 2 or 5 times a power of ten apart, around [low, high]."""
    size = max(1.0, abs(low), abs(high))
    # a range that its own labels could not tell apart counts as flat
    span = high - low if high - low > 1e-4 * size else size
    step = 10.0 ** math.floor(math.log10(span / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
    if whole:
        step = max(1.0, step)
    start, end = math.floor(low / step), math.ceil(high / step)
    return [round(place * step, 12) for place in range(start, max(end, start + 1) + 1)]


def _runs(points: Sequence[tuple[float, float] | None]) -> list[list[tuple[float, float]]]:
    """Stretches without a gap."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is None:
            runs.append([])
        else:
            runs[-1].append(point)
    return [run for run in runs if len(run) > 1]


def _curve(number: int, points: Sequence[tuple[float, float]]) -> str:
    return f'<polyline class="curve s{number}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def _mark(number: int, x: float, y: float, size: float = 6) -> str:
    """A disc, a triangle or a square."""
    if number == 0:
        return f'<circle class="mark s0" cx="{x:.1f}" cy="{y:.1f}" r="{size:g}"/>'
    if number == 1:
        corners = ((x, y - size), (x + size, y + size * 0.8), (x - size, y + size * 0.8))
    else:
        half = size * 0.85
        corners = ((x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half))
    return f'<polygon class="mark s{number}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in corners)}"/>'


def _legend(series: Sequence[tuple[int, str]]) -> str:
    """Number and name of each; nothing where there is but one."""
    if len(series) < 2:
        return ""
    items = "".join(
        f'<li><svg viewBox="0 0 16 16" aria-hidden="true">{_mark(number, 8, 8)}</svg>{escape(name)}</li>'
        for number, name in series
    )
    return f'<ul class="legend">{items}</ul>'


def _svg(label: str, height: float, parts: Sequence[str]) -> str:
    head = f'<svg class="chart" viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{escape(label)}">'
    return f"{head}{''.join(parts)}</svg>"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _anchor(x: float) -> str:
    """Text at the edges stays inside."""
    return "start" if x < 20 else "end" if x > _WIDTH - 24 else "middle"
