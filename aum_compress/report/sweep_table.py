"""Trials of a sweep for people: those that no other beats first. Torch-free."""

from typing import Any

from rich.table import Table

from aum_compress.report.content import figure
from aum_compress.report.markdown import escaped

_COLUMNS = ("validation", "param bytes", "MACs")
MOST_UNTRAINED = 10
"""Rows of trials that were over budget by count, or whose values do not fit together."""
_KEYS = (("validation_accuracy", ".1f"), ("param_bytes", ","), ("macs", ","))


def ranked(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The Pareto set by accuracy, then the other complete trials, then those that were not trained or not kept."""

    def place(row: dict[str, Any]) -> tuple[bool, bool, float, int]:
        return (not row["pareto"], row["state"] != "complete", -(row["validation_accuracy"] or 0), row["trial"])

    return sorted(summary["trials"], key=place)


def shown(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """As ranked, without most of those that were not trained."""
    rows = ranked(summary)
    untrained = [row for row in rows if row["state"] in ("over", "invalid") and row["validation_accuracy"] is None]
    left_out = {row["trial"] for row in untrained[MOST_UNTRAINED:]}
    return [row for row in rows if row["trial"] not in left_out]


def sweep_table(summary: dict[str, Any]) -> Table:
    """One row a trial."""
    table = Table()
    for title, right in _columns(summary):
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    for row in shown(summary):
        table.add_row(*_cells(summary, row))
    return table


def sweep_lines(summary: dict[str, Any]) -> list[str]:
    """The Pareto set in words."""
    best = [row for row in ranked(summary) if row["pareto"]]
    return [
        _counts(summary),
        f"no other trial beats {len(best)} of them in validation accuracy, param bytes and MACs at once:",
        *(f"  {row['exported'] or row['bundle']}" for row in best),
    ]


def sweep_markdown(summary: dict[str, Any]) -> str:
    """The same as a document."""
    columns = _columns(summary)
    lines = [
        f"# Sweep of {escaped(summary['recipe'])}",
        "",
        *(f"- `{key}`: {escaped(text)}" for key, text in summary["params"].items()),
        "",
        "Accuracy: % of validation clips, mean over classes; the test part has not been looked at. MACs for one second "
        "of audio. Best: no other trial is better in one of the three and as good in the others.",
        "",
        f"| {' | '.join(title for title, _ in columns)} |",
        f"| {' | '.join('---:' if right else '---' for _, right in columns)} |",
        *(f"| {' | '.join(escaped(cell) for cell in _cells(summary, row))} |" for row in shown(summary)),
        "",
        _counts(summary),
        "",
    ]
    return "\n".join(lines)


def _counts(summary: dict[str, Any]) -> str:
    states = [row["state"] for row in summary["trials"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    left_out = len(states) - len(shown(summary))
    others = f"; {left_out} that were not trained stand in sweep.json alone" if left_out else ""
    return f"{len(states)} trials: {counts or 'none'}{others}"


def _columns(summary: dict[str, Any]) -> list[tuple[str, bool]]:
    """Title, and whether it stands right."""
    keys = [(key, False) for key in summary["params"]]
    return [
        ("trial", True),
        ("best", False),
        *keys,
        *((title, True) for title in _COLUMNS),
        ("state", False),
        ("bundle", False),
    ]


def _cells(summary: dict[str, Any], row: dict[str, Any]) -> list[str]:
    reason = f": {' '.join(row['reason'].split())}" if row["reason"] else ""
    return [
        str(row["trial"]),
        "best" if row["pareto"] else "",
        *(str(row["params"].get(key, "")) for key in summary["params"]),
        *(figure(row[key], form) for key, form in _KEYS),
        f"{row['state']}{reason}",
        row["exported"] or row["bundle"] or "",
    ]
