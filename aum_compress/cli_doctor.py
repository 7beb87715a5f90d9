"""The verb `doctor`."""

from typing import Annotated

import typer

from aum_compress.cli_options import Json, print_json
from aum_compress.console import say, show
from aum_compress.errors import AumError

_MARK = {"ok": "ok", "absent": "-", "problem": "PROBLEM"}


def doctor(
    timed: Annotated[bool, typer.Option("--time/--no-time", help="Train, export and run a tiny model.")] = True,
    as_json: Json = False,
) -> None:
    """What is installed, what is missing for what, which scan runs here, and how fast. Exit code 2 on problems."""
    from rich.table import Table
    from rich.text import Text

    from aum_compress.doctor.examine import examine

    findings = examine(timed=timed)
    problems = [finding for finding in findings if finding.state == "problem"]
    if as_json:
        print_json({"ok": not problems, "findings": [finding.to_dict() for finding in findings]})
    else:
        table = Table("", "what", "found", "note")
        section = None
        for finding in findings:
            what = f"{finding.section}: {finding.name}" if finding.section != section else f"  {finding.name}"
            section = finding.section
            cells = (_MARK[finding.state], what, finding.found, finding.note)
            table.add_row(*map(Text, cells))  # a name of an extra is no markup
        show(table)
        say("no problems" if not problems else f"{len(problems)} problems")
    if problems:
        raise AumError("; ".join(f"{one.section}, {one.name}: {one.found} {one.note}".strip() for one in problems))
