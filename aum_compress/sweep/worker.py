"""A worker: takes trials from the study until none is left. Any number of them, on any number of machines."""

import json
import os
from typing import Any

from aum_compress.console import log
from aum_compress.report.sweep_table import sweep_markdown
from aum_compress.sweep.space import values_of
from aum_compress.sweep.study import OBJECTIVES, Study
from aum_compress.sweep.trial import Sweep, require_sweepable, run_shared, run_trial

SWEEP_JSON, SWEEP_MARKDOWN = "sweep.json", "sweep.md"


def work(sweep: Sweep) -> dict[str, Any]:
    """Runs trials until all are done, and returns the list of all, the work of others included.

    Trials that need the same teacher share it. A worker that is killed loses nothing but time: its trial is run again
    by another one, behind the last whole epoch.

    Raises:
        RecipeError: a recipe that cannot be swept, or a study of another sweep.
        AumError: what a worker cannot go on with, such as data that cannot be read or a full disk.
    """
    recipe = sweep.base()
    require_sweepable(recipe, sweep.until)
    study = Study(sweep)
    run_shared(sweep)
    while (taken := study.next()) is not None:
        result = run_trial(sweep, values_of(sweep.space, taken.drawn))
        study.finish(taken, result)
        log(f"sweep: trial {taken.number}: {result.state} {result.reason}".rstrip())
        if result.validation_accuracy is not None:
            write_summary(sweep, study)
    return write_summary(sweep, study)


def write_summary(sweep: Sweep, study: Study) -> dict[str, Any]:
    """`sweep.json` and `sweep.md` of what is known by now."""
    summary = {
        "recipe": sweep.base().name,
        "study": str(sweep.storage),
        "params": {key: str(varied) for key, varied in sweep.space.items()},
        "objectives": OBJECTIVES,
        "trials": study.rows(),
    }
    texts = {SWEEP_JSON: json.dumps(summary, indent=1) + "\n", SWEEP_MARKDOWN: sweep_markdown(summary)}
    for name, text in texts.items():
        beside = sweep.folder / f".{name}.{os.getpid()}"
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, sweep.folder / name)
    return summary
