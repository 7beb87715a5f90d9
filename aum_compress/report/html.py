"""The report as one HTML file that needs nothing else: style and charts inside, no script, no request. Torch-free."""

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files

from aum_compress.report.charts import Series, dot_chart, line_chart
from aum_compress.report.comparison import (
    Comparison,
    compared_contenders,
    compared_limits,
    compared_published,
    comparison_sections,
    comparison_verdict,
)
from aum_compress.report.content import Cell, Column, Section, Table, Verdict
from aum_compress.report.schema import Epoch, Report
from aum_compress.report.sections import contenders, published, sections
from aum_compress.report.trade_off import trade_off_charts
from aum_compress.report.verdict import verdict

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Holds the browser to it: nothing is loaded, whatever a label says."""

_MARK = {None: ("open", "–"), True: ("good", "✓"), False: ("bad", "✗")}


def render_html(report: Report) -> str:
    """One page: verdict, road, budget, layers, devices, classes, training, verification, provenance.

    All text is escaped. Figures are those of `render_markdown`; charts are drawn beside them.
    """
    limits = report["budget"] and report["budget"]["limits"]
    bounds = (limits.get("max_param_bytes"), limits.get("max_macs")) if limits else (None, None)
    charts = {
        "road": _road_chart(report),
        "trade-off": trade_off_charts(contenders(report), published(report), bounds),
        "training": _training_charts(report),
    }
    return html_page(report["recipe"], report["created"], verdict(report), report["next"], sections(report), charts)


def render_comparison_html(found: Comparison) -> str:
    """One page for several models: what each is best at, their figures, charts, classes, devices, layers."""
    points, others = compared_contenders(found), compared_published(found)
    charts = {"trade-off": trade_off_charts(points, others, compared_limits(found))}
    title = " | ".join(one["name"] for one in found["models"])
    return html_page(title, found["created"], comparison_verdict(found), "", comparison_sections(found), charts)


def html_page(
    name: str, created: str, found: Verdict, next_command: str, parts: Sequence[Section], charts: Mapping[str, str]
) -> str:
    """A whole page; `charts` by the key of the section in which they stand."""
    kind, symbol = _MARK[found.good]
    facts = "".join(f"<li>{escape(fact)}</li>" for fact in found.facts)
    header = f"""<p class="over">aum-compress report, {escape(created)}</p>
<h1>{escape(name)}</h1>
<div class="verdict {kind}"><p><span class="symbol" aria-hidden="true">{symbol}</span>{escape(found.headline)}</p>
{f"<ul>{facts}</ul>" if facts else ""}</div>
{f"<p>Next:</p><pre>{escape(next_command)}</pre>" if next_command else ""}"""
    body = "\n".join(_section(section, charts.get(section.key, "")) for section in parts)
    return page(f"{name}: {found.headline.lower()}", header, body)


def page(title: str, header: str, main: str) -> str:
    """The frame of every page. Args: title: in words; header, main: HTML."""
    style = files("aum_compress.report").joinpath("page.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
{header}
</header>
<main>
{main}
</main>
</body>
</html>
"""


def _section(section: Section, chart: str) -> str:
    paragraphs = "".join(f"<p>{escape(text)}</p>\n" for text in section.paragraphs)
    several = len(section.tables) > 1
    tables = "\n".join(_table(table, captioned=several) for table in section.tables)
    return f'<section id="{section.key}">\n<h2>{escape(section.title)}</h2>\n{paragraphs}{chart}{tables}\n</section>'


def _table(table: Table, captioned: bool) -> str:
    """A table that scrolls sideways by itself where the screen is narrow; a folded one opens on demand."""
    title = escape(table.title)
    head = "".join(f"<th{_side(column)}>{escape(column.title)}</th>" for column in table.columns)
    rows = "\n".join(
        f"<tr>{''.join(_cell(cell, column) for cell, column in zip(row, table.columns))}</tr>" for row in table.rows
    )
    shaded = ' class="matrix"' if any(cell.shade is not None for row in table.rows for cell in row) else ""
    caption = f"<h3>{title}</h3>" if captioned and not table.folded else ""
    whole = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title}">'
        f"<table{shaded}><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    )
    return f"<details><summary>{title}</summary>{whole}</details>" if table.folded else caption + whole


def _cell(cell: Cell, column: Column) -> str:
    text = escape(cell.text)
    if cell.shade is not None:
        own = " own" if cell.good else ""
        return f'<td class="right shaded{own}" style="--shade:{min(max(cell.shade, 0), 1):.0%}">{text}</td>'
    if cell.fraction is None and cell.good is not None:
        kind, symbol = _MARK[cell.good]
        text = f'<span class="{kind}"><span aria-hidden="true">{symbol} </span>{text}</span>'
    if cell.fraction is not None:
        over = " over" if cell.good is False else ""
        width = 100 * min(max(cell.fraction, 0), 1)
        text += f'<span class="bar{over}" aria-hidden="true"><i style="width:{width:.1f}%"></i></span>'
    return f"<td{_side(column)}>{text}</td>"


def _side(column: Column) -> str:
    return ' class="right"' if column.right else ""


def _road_chart(report: Report) -> str:
    road = report["road"]
    series = [
        Series(name, [step["test"].get(key) for step in road])
        for name, key in (("all clips", "accuracy"), ("seen devices", "seen"), ("unseen devices", "unseen"))
        if any(step["test"].get(key) is not None for step in road)
    ]
    if not series:
        return ""
    labels = report["data"]["labels"]
    chance = ("chance", 100 / len(labels)) if labels else None
    chart = dot_chart([step["title"] for step in road], series, "Test accuracy of every model in percent", chance)
    return f"<figure><figcaption>Test accuracy</figcaption>{chart}</figure>\n"


def _training_charts(report: Report) -> str:
    return "".join(_curves(name, epochs) for name, epochs in report["training"].items() if epochs)


def _curves(name: str, epochs: list[Epoch]) -> str:
    at = [epoch["epoch"] for epoch in epochs]
    losses = [
        Series("training loss", [epoch["train_loss"] for epoch in epochs]),
        Series("validation loss", [epoch["val_loss"] for epoch in epochs]),
    ]
    accuracy = [Series("validation accuracy, %", [epoch["val_accuracy"] for epoch in epochs])]
    drawn = (
        ("loss", line_chart(at, losses, f"{name}: loss by epoch", "epoch")),
        ("validation accuracy, %", line_chart(at, accuracy, f"{name}: validation accuracy by epoch", "epoch")),
    )
    figures = "".join(
        f"<figure><figcaption>{escape(name)}: {title}</figcaption>{chart}</figure>" for title, chart in drawn if chart
    )
    return f'<div class="pair">{figures}</div>\n'
