"""The verb `report`."""

from pathlib import Path
from typing import Annotated

import typer

from aum_compress.cli_options import Json, print_json
from aum_compress.console import say
from aum_compress.errors import AumError


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="exports/<name> or runs/<recipe>; several, bundles too: side by side."),
    ],
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write report.html, .md and .json there, anew.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the report of a finished run again, or several models side by side."""
    from aum_compress.comparing import compare_models
    from aum_compress.report.tables import comparison_lines, print_report
    from aum_compress.report.write import comparison_files, read_report, report_files

    if len(folders) == 1:
        content = read_report(folders[0])
        files = report_files(content)
    else:
        content = compare_models(folders)
        files = comparison_files(content)
    if to:
        _write(to, files)
    if as_json:
        print_json(content)
    elif len(folders) == 1:
        print_report(content, to or folders[0])
    else:
        for line in comparison_lines(content):
            say(line)
        if to:
            say(f"report: {to / 'report.html'}")


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Into a folder that holds nothing yet, or an earlier report alone: never over a run's own.

    Raises:
        AumError: a folder with something else in it.
    """
    others = sorted(path.name for path in folder.iterdir() if path.name not in files) if folder.is_dir() else []
    if others:
        raise AumError(f"--to {folder}: holds {', '.join(others[:3])}; wanted a new folder, or one with a report alone")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
