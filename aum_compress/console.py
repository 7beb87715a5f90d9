"""What a person sees while work goes on: progress and logs to stderr, results to stdout. Torch-free."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

Advance = Callable[[int, int], None]
"""Called with (done, total); the total may become known only on the way."""

out = Console(highlight=False, soft_wrap=True)
log_console = Console(stderr=True, highlight=False, soft_wrap=True)

_process = ""
"""Its name, where another process shows what goes on."""

PIPE_COLUMNS = 250
PLAIN_SECONDS = 10.0
"""In a pipe, a line at most this often."""


class Reporter:
    """A running progress display: `advance(done, total)`, `note(text)` for the latest figure."""

    def __init__(self, advance: Advance, note: Callable[[str], None]) -> None:
        self.advance = advance
        self.note = note


def only_errors_of(process: str) -> None:
    """From here on this process, one of several at the same work, shows nothing but errors, and these with its name."""
    global _process
    _process = process


def log(message: str) -> None:
    """One line to stderr."""
    if not _process:
        log_console.print(message, markup=False)


def log_error(message: str) -> None:
    """One line to stderr that every process shows."""
    log_console.print(f"{_process}: error: {message}" if _process else f"error: {message}", markup=False)


def say(message: str = "") -> None:
    """One line to stdout, without markup."""
    print(message)  # rich would turn a reader that has gone into an exit code of its own


def show(table: Table) -> None:
    """A table to stdout: drawn on a terminal; in a pipe plain text, a line a row, no cell folded."""
    if out.is_terminal:
        out.print(table)
    else:
        table.box = None
        Console(width=PIPE_COLUMNS, highlight=False).print(table)


@contextmanager
def progress(description: str) -> Iterator[Reporter]:
    """A bar on a terminal; in a pipe, plain lines now and then and one at the end."""
    if _process:
        yield Reporter(advance=lambda done, whole: None, note=lambda text: None)
        return
    if log_console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=log_console, transient=False) as bar:
            task = bar.add_task(description, total=None, note="")
            yield Reporter(
                advance=lambda done, whole: bar.update(task, completed=done, total=whole),
                note=lambda text: bar.update(task, note=text),
            )
        return
    yield from _plain_progress(description)


def _plain_progress(description: str) -> Iterator[Reporter]:
    started = last = time.monotonic()
    state = {"done": 0, "total": 0, "note": ""}

    def show() -> None:
        note = f"  {state['note']}" if state["note"] else ""
        print(f"{description}: {state['done']}/{state['total']}{note}", file=sys.stderr, flush=True)

    def advance(done: int, total: int) -> None:
        nonlocal last
        state.update(done=done, total=total)
        if time.monotonic() - last >= PLAIN_SECONDS and done < total:
            last = time.monotonic()
            show()

    yield Reporter(advance=advance, note=lambda text: state.update(note=text))
    note = f"  {state['note']}" if state["note"] else ""
    print(f"{description}: done in {time.monotonic() - started:.0f} s{note}", file=sys.stderr, flush=True)
