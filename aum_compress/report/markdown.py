"""The report as Markdown (GitHub's flavour). Torch-free."""

import re
from collections.abc import Sequence

from aum_compress.report.comparison import Comparison, comparison_sections, comparison_verdict
from aum_compress.report.content import Cell, Section, Table, Verdict
from aum_compress.report.schema import Report
from aum_compress.report.sections import sections
from aum_compress.report.verdict import verdict

# an underscore within a word is no markup and would only be harder to read
_SPECIAL = re.compile(r"[\\`*<>\[\]|~#&]|(?<![^\W_])_|_(?![^\W_])")


def render_markdown(report: Report) -> str:
    """One document with every figure of `render_html`, tables in place of charts."""
    return markdown_document(report["recipe"], verdict(report), report["next"], sections(report))


def render_comparison_markdown(found: Comparison) -> str:
    """The same for several models."""
    title = ", ".join(one["name"] for one in found["models"])
    return markdown_document(title, comparison_verdict(found), "", comparison_sections(found))


def markdown_document(name: str, found: Verdict, next_command: str, parts: Sequence[Section]) -> str:
    """A whole document."""
    lines = [
        f"# {escaped(name)}: {escaped(found.headline.lower())}",
        "",
        *(f"- {escaped(fact)}" for fact in found.facts),
    ]
    if next_command:
        # an indented block takes any command as it is
        lines += ["", "Next:", "", f"    {' '.join(next_command.split())}"]
    for section in parts:
        lines += ["", f"## {section.title}"]
        for paragraph in section.paragraphs:
            lines += ["", escaped(paragraph)]
        for table in section.tables:
            lines += ["", f"**{escaped(table.title)}**", "", *_table(table)]
    return "\n".join([*lines, ""])


def _table(table: Table) -> list[str]:
    return [
        _row([escaped(column.title) for column in table.columns]),
        _row(["---:" if column.right else "---" for column in table.columns]),
        *(_row([_cell(cell) for cell in row]) for row in table.rows),
    ]


def _cell(cell: Cell) -> str:
    plain = cell.good is None or cell.fraction is not None or cell.shade is not None
    mark = "" if plain else "✓ " if cell.good else "✗ "
    return mark + escaped(cell.text)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def escaped(text: str) -> str:
    """One line that shows `text` and nothing else."""
    return _SPECIAL.sub(r"\\\g<0>", " ".join(text.split()))
