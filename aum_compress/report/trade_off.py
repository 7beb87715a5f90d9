"""Accuracy against bytes and MACs: of a run's models, of models side by side, with published systems. Torch-free."""

from collections.abc import Sequence
from dataclasses import dataclass

from aum_compress.report.charts import Point, scatter_chart
from aum_compress.report.content import Cell, Section, Table, names, numbers, percent
from aum_compress.report.published import PublishedSystem

OWN, SHIPPED, OTHERS = 1, 0, 2
"""Series of the charts."""
FAR = 10
"""Times its limit: a model beyond stands in the table alone."""


@dataclass(frozen=True)
class Contender:
    """One model and what it costs."""

    name: str
    accuracy: float
    param_bytes: int
    macs: int
    shipped: bool = False


def unbeaten(contenders: Sequence[Contender]) -> set[int]:
    """Places of those that no other one beats: at least as good in accuracy, bytes and MACs, and better in one."""

    def beats(one: Contender, other: Contender) -> bool:
        pairs = (
            (one.accuracy, other.accuracy),
            (other.param_bytes, one.param_bytes),
            (other.macs, one.macs),
        )
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    return {place for place, own in enumerate(contenders) if not any(beats(other, own) for other in contenders)}


def trade_off(contenders: Sequence[Contender], published: Sequence[PublishedSystem]) -> Section | None:
    """The table; `trade_off_charts` draws it, with the same numbers at its points."""
    if len(contenders) + len(published) < 2:
        return None
    best = unbeaten(contenders)
    rows = [
        (
            Cell(f"{place + 1}"),
            Cell(one.name),
            percent(one.accuracy),
            Cell(f"{one.param_bytes:,}"),
            Cell(f"{one.macs:,}"),
            Cell("not beaten in all three at once" if place in best else ""),
        )
        for place, one in enumerate(contenders)
    ]
    rows += [
        (
            Cell(f"{len(contenders) + place + 1}"),
            Cell(one.name),
            percent(one.accuracy),
            Cell(f"{one.param_bytes:,}"),
            Cell(f"{one.macs:,}"),
            Cell(f"published, {one.tested_on}: {one.source}"),
        )
        for place, one in enumerate(published)
    ]
    text = "Accuracy: % of test clips, mean over classes. MACs for one second of audio."
    if published:
        text += (
            " Published systems learnt from the 25 % split of TAU 2022 Mobile; their figures are their authors' "
            "or the organisers', and nothing of them was run here."
        )
    columns = (*numbers("no."), *names("model"), *numbers("accuracy", "param bytes", "MACs"), *names(""))
    return Section("trade-off", "Accuracy against cost", (text,), (Table("Accuracy and cost", columns, tuple(rows)),))


def trade_off_charts(
    contenders: Sequence[Contender],
    published: Sequence[PublishedSystem],
    limits: tuple[int | None, int | None],
) -> str:
    """Two charts side by side.

    Args:
        limits: on bytes and on MACs, drawn as dashed lines.
    """
    if len(contenders) + len(published) < 2:
        return ""
    left_out = False
    series = ("what ships" if any(one.shipped for one in contenders) else "", "other models", "published")
    drawn = []
    for title, key, limit in (("parameter bytes", "param_bytes", limits[0]), ("MACs, one second", "macs", limits[1])):
        points = [
            Point(getattr(one, key), one.accuracy, SHIPPED if one.shipped else OWN, f"{place + 1}")
            for place, one in enumerate(contenders)
        ]
        points += [
            Point(getattr(one, key), one.accuracy, OTHERS, f"{len(contenders) + place + 1}")
            for place, one in enumerate(published)
        ]
        near = [point for point in points if limit is None or point.x <= FAR * limit]
        if len(near) > 1:  # a teacher a thousand times as large would press all others into a corner
            left_out, points = left_out or len(near) < len(points), near
        chart = scatter_chart(points, f"Test accuracy in percent against {title}", title, limit, series)
        drawn.append(f"<figure><figcaption>Accuracy, %, against {title}</figcaption>{chart}</figure>")
    said = "<p>The largest models are left out of the charts.</p>\n" if left_out else ""
    return f'<div class="pair">{"".join(drawn)}</div>\n{said}'
