"""The verb `sweep`."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from aum_compress.cli_options import Json, RecipeArgument, Settings, StageName, print_json
from aum_compress.console import log, say, show
from aum_compress.errors import AumError

WORKER = "from aum_compress.cli import main; main()"


def sweep(
    recipe: RecipeArgument,
    params: Annotated[
        list[str],
        typer.Option("--param", metavar="SECTION.KEY=VALUES", help="a,b,c or low..high[:log]; repeatable."),
    ],
    trials: Annotated[
        int | None, typer.Option(min=1, help="How many to train; every combination of lists when left out.")
    ] = None,
    study: Annotated[
        Path | None,
        typer.Option(metavar="DIR|FILE.sqlite", help="Where all workers meet; sweeps/<recipe> when left out."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    until: Annotated[StageName | None, typer.Option(help="Last stage of a trial; all when left out.")] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Try values of a recipe: accuracy on validation clips against bytes and MACs, and the models that none beats.

    The same command on other machines, with --study on a folder that all of them see, joins in; a trial whose worker
    was killed is run again.
    """
    from aum_compress.recipe import find_recipe
    from aum_compress.sweep.space import parse_space

    space = parse_space(params)
    if workers > 1:
        given = {"--trials": trials, "--study": study, "--until": until and until.value}
        words = [recipe, *(f"--param={text}" for text in params), *(f"--set={text}" for text in settings or ())]
        _workers(workers, words + [f"{name}={value}" for name, value in given.items() if value is not None])

    from aum_compress.report.sweep_table import sweep_lines, sweep_table
    from aum_compress.sweep.study import study_places
    from aum_compress.sweep.trial import Sweep
    from aum_compress.sweep.worker import work

    path = find_recipe(recipe)
    folder, storage = study_places(study or Path("sweeps") / path.stem)
    summary = work(Sweep(path, tuple(settings or ()), space, folder, storage, trials, until and until.value))
    if as_json:
        print_json(summary)
    else:
        show(sweep_table(summary))
        for line in sweep_lines(summary):
            say(line)
        say(f"list: {folder / 'sweep.md'}")
    if not any(row["state"] == "complete" for row in summary["trials"]):
        raise AumError(f"{folder}: no trial could be completed; the list says why")


def _workers(count: int, words: list[str]) -> None:
    """Further processes with the same command; this one goes on when they have ended, to say what came of it."""
    command = [sys.executable, "-c", WORKER, "sweep", *words]
    threads = str(max(1, (os.cpu_count() or 1) // count))
    environment = {"OMP_NUM_THREADS": threads} | os.environ
    running: list[subprocess.Popen[bytes]] = []
    try:
        running += (subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) for _ in range(count))
        codes = [process.wait() for process in running]
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if all(codes):
        raise AumError(f"sweep: all {count} workers have failed; what they wrote above says why")
    for number, code in enumerate(codes, start=1):
        if code:
            log(f"sweep: worker {number} has ended with code {code}; the others have done its work")
