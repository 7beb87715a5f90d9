"""What pruning each dimension would cost, as a table and as a page with a chart for each block. Torch-free."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich.table import Table

from aum_compress.report.charts import Series, line_chart
from aum_compress.report.html import page

COLUMNS = ("dimension", "size", "left", "removed", "loss increase", "param bytes saved", "MACs saved")
_MOST_CURVES = 3
"""In one chart: as many as its marks tell apart."""


def sensitivity_table(found: Mapping[str, Any]) -> Table:
    """A row for each dimension and size, in the order of the model."""
    table = Table()
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "dimension" else "right")
    for row in _rows(found):
        table.add_row(*row)
    return table


def sensitivity_lines(found: Mapping[str, Any]) -> list[str]:
    """What the table is of, what is cheapest to give away, and what is not in the table."""
    cheap = sorted(found["dimensions"], key=lambda one: max(one["loss_increase"], 0.0) / max(_saved(found, one), 1e-9))[
        :3
    ]
    named = ", ".join(f"{one['place']} to {one['new_size']} ({one['loss_increase']:+.3f})" for one in cheap)
    lines = [
        f"loss {found['loss']:.4f} on {found['clips']} {found['part']} clips, ranked by {found['importance']}; bytes "
        f"at {found['precision']}; no training after pruning",
        f"least loss for each share of bytes and MACs saved: {named}",
    ]
    if found["not_tried"]:
        whole = ", ".join(
            f"{one['place']} ({one['size']}, in multiples of {one['multiple']})" for one in found["not_tried"]
        )
        lines.append(f"not tried, since no smaller multiple is left (prune.round_to sets those of widths): {whole}")
    return lines


def sensitivity_html(found: Mapping[str, Any]) -> str:
    """One page that needs nothing else: charts of the loss over the share removed, and the table."""
    groups: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for one in found["dimensions"]:
        place, _, name = one["place"].rpartition(".")
        if one["kind"] in ("blocks", "directions"):
            continue  # one size each: a point is no curve
        groups.setdefault(place or "residual stream", {}).setdefault(name, []).append(one)
    charts = "\n".join(_chart(title, curves) for title, curves in groups.items())
    head = "".join(f"<th{'' if column == COLUMNS[0] else ' class=right'}>{column}</th>" for column in COLUMNS)
    body = "\n".join(
        f"<tr><td>{escape(row[0])}</td>{''.join(f'<td class=right>{escape(cell)}</td>' for cell in row[1:])}</tr>"
        for row in _rows(found)
    )
    title = f"{found['recipe']}: what pruning each dimension costs"
    lines = "".join(f"<p>{escape(line)}</p>" for line in sensitivity_lines(found))
    main = f"""<section><h2>Loss increase over the share removed</h2>
<div class="pair">
{charts}
</div></section>
<section><h2>All that was tried</h2>
<div class="scroll" tabindex="0" role="region" aria-label="All that was tried"><table><thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody></table></div></section>"""
    return page(title, f"<h1>{escape(title)}</h1>{lines}", main)


def _chart(title: str, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One figure for a block, a stage or the stream; every curve begins at nothing removed, nothing lost."""
    shares = sorted({0.0, *(one["ratio"] for tried in curves.values() for one in tried)})
    series = []
    for name, tried in list(curves.items())[:_MOST_CURVES]:
        known = {0.0: 0.0} | {one["ratio"]: one["loss_increase"] for one in tried}
        series.append(Series(name, [known.get(share, _between(known, share)) for share in shares]))
    label = f"{title}: loss increase over the share removed"
    chart = line_chart([100 * share for share in shares], series, label, "% removed")
    # a single curve has no legend to say what it is of
    caption = f"{title}: {series[0].name}" if len(series) == 1 else title
    return f"<figure><figcaption>{escape(caption)}</figcaption>{chart}</figure>"


def _between(known: Mapping[float, float], share: float) -> float | None:
    """On the straight line between two shares that were tried; None beyond them."""
    below, above = [s for s in known if s < share], [s for s in known if s > share]
    if not below or not above:
        return None
    low, high = max(below), min(above)
    return known[low] + (known[high] - known[low]) * (share - low) / (high - low)


def _rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            one["place"],
            f"{one['size']:,}",
            f"{one['new_size']:,}",
            f"{100 * one['ratio']:.1f} %",
            f"{one['loss_increase']:+.4f}",
            f"{found['param_bytes'] - one['param_bytes']:,}",
            f"{found['macs'] - one['macs']:,}",
        )
        for one in found["dimensions"]
    ]


def _saved(found: Mapping[str, Any], one: Mapping[str, Any]) -> float:
    """Shares of all bytes and of all MACs, together."""
    return sum(1 - one[key] / found[key] for key in ("param_bytes", "macs"))
