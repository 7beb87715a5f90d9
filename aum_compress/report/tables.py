"""Results on the screen: tables for a terminal, the same figures as plain lines for a pipe. Torch-free."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from aum_compress.console import out, say
from aum_compress.report.comparison import Comparison, comparison_verdict
from aum_compress.report.content import Cell, figure, names, numbers
from aum_compress.report.pack import pack_lines
from aum_compress.report.schema import Report
from aum_compress.report.verdict import checks_passed, exported, step_budget, verdict, verified_cell

_COLUMNS = (*names("model", "run as"), *numbers("accuracy", "seen", "unseen", "param bytes", "MACs"), *names("budget"))
_STYLE = {None: "", True: "green", False: "bold red"}
_GAP = "  "


def print_report(report: Report, folder: Path) -> None:
    """The result of a run, to stdout.

    Args:
        folder: where the report's files lie.
    """
    if out.is_terminal and report["road"]:
        out.print(road_table(report))
        lines = summary_lines(report)
    else:
        lines = plain_lines(report)
    for line in [*lines, f"report: {folder / 'report.html'}"]:
        say(line)


def road_table(report: Report) -> Table:
    """Every model from teacher to shipped file, for a terminal of 100 columns or more."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for column in _COLUMNS:
        # figures must never be cut; long titles may take a second line
        table.add_column(
            column.title, justify="right" if column.right else "left", no_wrap=column.right, overflow="fold"
        )
    for row in _road(report):
        # Text: titles come from recipes and must not be read as markup
        table.add_row(*(Text(cell.text, style=_STYLE[cell.good]) for cell in row))
    return table


def summary_lines(report: Report) -> list[str]:
    """What stands below the road: the shipped model against its limits, each file's verification, what to do next."""
    found = verdict(report)
    files = [(name, verified_cell(report, name).text, checks_passed(report, name)) for name in exported(report)]
    lines = ["", found.headline, *(_GAP + line for line in (*found.facts, *aligned(files)))]
    if report["road"]:
        devices = "; seen, unseen: devices in training and not" if report["data"]["seen_devices"] else ""
        lines.insert(0, f"accuracy: % of {report['data']['test']:,} test clips, mean over classes{devices}")
    lines += pack_lines(report)
    return [*lines, "", f"next: {report['next']}"] if report["next"] else lines


def plain_lines(report: Report) -> list[str]:
    """The whole result in letters alone: the road, then `summary_lines`."""
    rows = [[column.title for column in _COLUMNS], *([cell.text for cell in row] for row in _road(report))]
    road = aligned(rows, [column.right for column in _COLUMNS]) if report["road"] else []
    return [*road, *summary_lines(report)]


def comparison_lines(found: Comparison) -> list[str]:
    """Several models side by side: a line each, then what is best at what."""
    rows = [[column.title for column in _COLUMNS]]
    for one in found["models"]:
        step = one["step"]
        accuracies = (figure(step["test"].get(key), ".1f") for key in ("accuracy", "seen", "unseen"))
        cost = (f"{step[key]:,}" for key in ("param_bytes", "macs"))
        budget = "within" if step["within_budget"] else "over"
        rows.append([one["name"], f"{step['precision']} {step['measured_with']}", *accuracies, *cost, budget])
    return [*aligned(rows, [column.right for column in _COLUMNS]), "", *comparison_verdict(found).facts]


def data_lines(summary: dict[str, Any]) -> list[str]:
    """What `data.check` found: counts, then rejected files by reason and usable ones by class, device and rate."""
    counts = [(key, f"{summary[key]:,}") for key in ("files", "usable", "rejected", "usable_hours")]
    lines = aligned([(key.replace("_", " "), value) for key, value in counts], (False, True))
    for key in ("by_reason", "by_class", "by_device", "by_sample_rate_hz"):
        if summary[key]:
            what = key.removeprefix("by_").replace("_", " ")
            rows = [(name, f"{count:,}") for name, count in summary[key].items()]
            lines += ["", f"by {what}", *(_GAP + line for line in aligned(rows, (False, True)))]
    return lines


def _road(report: Report) -> list[tuple[Cell, ...]]:
    return [
        (
            Cell(step["title"]),
            Cell(f"{step['precision']} {step['measured_with']}"),
            Cell(figure(step["test"]["accuracy"], ".1f")),
            Cell(figure(step["test"].get("seen"), ".1f")),
            Cell(figure(step["test"].get("unseen"), ".1f")),
            Cell(f"{step['param_bytes']:,}"),
            Cell(f"{step['macs']:,}"),
            step_budget(report, step),
        )
        for step in report["road"]
    ]


def aligned(rows: Sequence[Sequence[str]], right: Sequence[bool] = ()) -> list[str]:
    """Columns padded to their widest cell; those marked `right` on their left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    right = right or [False] * len(widths)
    return [
        _GAP.join(
            text.rjust(width) if push else text.ljust(width) for text, width, push in zip(row, widths, right)
        ).rstrip()
        for row in rows
    ]
