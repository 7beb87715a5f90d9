"""One trial: a recipe with some values changed, counted before it is trained, trained, and measured on validation."""

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock

from aum_compress.budget.analytic import analytic_macs
from aum_compress.budget.records import per_second
from aum_compress.bundle import Bundle, json_sha256, replace_folder
from aum_compress.compress.prune_plan import (
    Cost,
    Costing,
    fewest_blocks,
    kinds_of,
    least_config,
    room,
    share_floors,
)
from aum_compress.console import log
from aum_compress.data.config import DataConfig
from aum_compress.data.index import load_index
from aum_compress.errors import RecipeError, TrainingDiverged, VerificationFailed
from aum_compress.models.config import AudioMambaConfig, CPMobileConfig
from aum_compress.pipeline import STAGES, run, shipped_budget
from aum_compress.pruning import costing
from aum_compress.recipe import load_recipe
from aum_compress.recipe_schema import BudgetSection, Recipe
from aum_compress.sweep.space import Space, settings_of
from aum_compress.train.metrics import macro_accuracy
from aum_compress.train.predict import predict_logits
from aum_compress.workspace import FOLDERS, Workspace

MODEL_STAGES = ("reference", "teacher", "student", "distill", "prune", "quantize")
BEHIND_MODELS = ("budget", "export", "verify")


@dataclass(frozen=True)
class Sweep:
    """What all workers of one study agree on."""

    recipe: Path
    settings: tuple[str, ...]
    space: Space
    folder: Path
    """Of the study: its trials, and the list of their results."""
    storage: Path
    """The study's journal, or an SQLite file."""
    trials: int | None = None
    """How many to train, besides those that are over budget by count; every combination when left out."""
    until: str | None = None
    """Last stage of a trial; all of the recipe's when left out."""
    compose: Callable[[Mapping[str, Any]], Sequence[str]] = settings_of
    """From the values of a trial to `section.key=value` settings."""
    sections: frozenset[str] | None = None
    """Sections that a trial may change; those that the keys of `space` begin with when left out."""

    def base(self) -> Recipe:
        """The recipe that every trial starts from."""
        return load_recipe(self.recipe, self.settings)

    @property
    def shared_until(self) -> str | None:
        """The last stage that no trial changes, so that it is run once for all; None where there is none."""
        varied = self.sections or {key.partition(".")[0] for key in self.space}
        if varied - {*MODEL_STAGES, *BEHIND_MODELS}:
            return None  # data, features, seed: everything follows from these
        first = min((MODEL_STAGES.index(name) for name in varied if name in MODEL_STAGES), default=len(MODEL_STAGES))
        recipe = self.base()
        present = [name for name in MODEL_STAGES[:first] if getattr(recipe, name) is not None]
        made = [name for name in present if name != "student" or recipe.student.train]
        return made[-1] if made else None


@dataclass(frozen=True)
class Result:
    """What came of one trial. Only those that are `complete` compete; of the others all that is known is kept."""

    state: Literal["complete", "over", "invalid", "failed"]
    reason: str = ""
    validation_accuracy: float | None = None
    """Macro, percent. The test part is not looked at."""
    param_bytes: int | None = None
    macs: int | None = None
    """For one second of audio."""
    bundle: str | None = None
    """Of the newest model, below the study's folder."""
    exported: str | None = None
    """The folder that ships, where the trial got so far."""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def require_sweepable(recipe: Recipe, until: str | None) -> None:
    """Refuses a recipe that no trial could be measured with.

    Raises:
        RecipeError: no student, no validation clips to choose on, trainings of several processes, or a stage to stop
            at that makes no student.
    """
    problems = []
    if recipe.student is None:
        problems.append("has no student, so that there is nothing to compare")
    if not recipe.data.validation_fraction:
        problems.append("data.validation_fraction is 0, and trials are compared on validation clips")
    problems += [
        f"{place}: wants several processes; give each worker of the sweep a device of its own, with devices: 1"
        for place, config in recipe.trainings().items()
        if (config.devices, config.nodes) != (1, 1)
    ]
    student_made = ["distill", "prune", "quantize"]
    if recipe.student is not None and recipe.student.train:
        student_made.insert(0, "student")
    if not any(stage in student_made and getattr(recipe, stage) is not None for stage in _stages(until)):
        problems.append(f"--until {until}: no student is trained by then" if until else "trains no student")
    if problems:
        raise RecipeError(f"{recipe.name}: cannot be swept: " + "; ".join(problems))


def run_shared(sweep: Sweep) -> None:
    """Stages before those that trials change, run by the first worker while the others wait."""
    if (last := sweep.shared_until) is None:
        return
    folder = sweep.folder / "shared"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        run(sweep.base(), folder, last)


def run_trial(sweep: Sweep, values: Mapping[str, Any]) -> Result:
    """Runs the recipe with `values`; a trial that was begun before, by whomever, goes on where it was.

    Raises:
        AumError: what has to do with the machine or the data and not with the trial's values.
    """
    started = time.monotonic()

    def result(state: str, **known: Any) -> Result:
        return Result(state, seconds=round(time.monotonic() - started, 1), **known)

    try:
        recipe = load_recipe(sweep.recipe, [*sweep.settings, *sweep.compose(values)])
        require_sweepable(recipe, sweep.until)
        counted = _counted(recipe, sweep.until)
    except RecipeError as error:
        return result("invalid", reason=str(error))
    if reason := _over(recipe, *counted):
        return result("over", reason=f"counted before training: {reason}", param_bytes=counted[0], macs=counted[1])

    log(f"sweep: trains {', '.join(f'{key} {value}' for key, value in values.items())}")
    folder = sweep.folder / "trials" / json_sha256(dict(values))[:12]
    _take_shared(sweep, recipe.name, folder)
    made = [stage for stage in _stages(sweep.until) if stage in MODEL_STAGES and getattr(recipe, stage) is not None]
    known: dict[str, Any] = {}
    try:
        bundle = list(run(recipe, folder, made[-1]).bundles.values())[-1]
        _give_logits(sweep, recipe.name, folder)
        space = Workspace(recipe, folder)
        budget = shipped_budget(space, bundle)
        known = {
            "validation_accuracy": _validation_accuracy(space, bundle),
            "param_bytes": budget.param_bytes,
            "macs": budget.macs,
            "bundle": str(bundle.path.relative_to(sweep.folder)),
        }
        if reason := _over(recipe, budget.param_bytes, budget.macs):
            return result("over", reason=reason, **known)
        if _stages(sweep.until)[-1] in BEHIND_MODELS and recipe.export:
            outcome = run(recipe, folder, sweep.until)
            if outcome.folder == space.exports:
                known["exported"] = str(outcome.folder.relative_to(sweep.folder))
    except (TrainingDiverged, VerificationFailed) as error:
        return result("failed", reason=str(error), **known)
    except RecipeError as error:  # of another network than the student, which is counted beforehand
        return result("invalid", reason=str(error), **known)
    return result("complete", **known)


def _stages(until: str | None) -> Sequence[str]:
    return STAGES[: STAGES.index(until or STAGES[-1]) + 1]


def _counted(recipe: Recipe, until: str | None) -> tuple[int | None, int]:
    """The least that the student can come to, from its configuration alone: param bytes where known, and MACs a second.

    Pruning may take what `prune.dimensions` names, up to `max_block_ratio` of each.
    """
    seconds = recipe.data.clip_seconds
    config = recipe.student.resolve(
        recipe.features.n_mels, recipe.features.n_frames(seconds), len(_labels(recipe.data, recipe.seed))
    )
    if recipe.prune and "prune" in _stages(until):
        config = _pruned(recipe, config, until)
    searched = recipe.quantize and recipe.quantize.search and "quantize" in _stages(until)
    if isinstance(config, CPMobileConfig) or searched:  # how many bytes, is known only when it is made
        return None, per_second(sum(analytic_macs(config).values()), seconds)
    cost = _costing(recipe, until)(config)
    return cost.param_bytes, cost.macs


def _pruned(recipe: Recipe, config: AudioMambaConfig, until: str | None) -> AudioMambaConfig:
    section, share = recipe.prune, recipe.prune.max_block_ratio
    left = room(
        *(config, kinds_of(section.dimensions), section.round_to),
        *(share_floors(config, share), fewest_blocks(config, share)),
    )
    limits = recipe.budget or BudgetSection()
    return least_config(config, left, _costing(recipe, until), Cost(limits.max_param_bytes, limits.max_macs))


def _costing(recipe: Recipe, until: str | None) -> Costing:
    """Of the file that ships, as `pipeline.shipped_budget` takes it."""
    shipped = recipe if "quantize" in _stages(until) else recipe.model_copy(update={"quantize": None})
    return costing(shipped, recipe.data.clip_seconds)


@cache
def _labels(data: DataConfig, seed: int) -> tuple[str, ...]:
    return load_index(data, seed).labels


def _over(recipe: Recipe, param_bytes: int | None, macs: int) -> str:
    """What is over the recipe's budget, in words; empty where nothing is."""
    if (limits := recipe.budget) is None:
        return ""
    found = (("param bytes", param_bytes, limits.max_param_bytes), ("MACs", macs, limits.max_macs))
    return ", ".join(f"{count:,} {what} of {limit:,}" for what, count, limit in found if count and count > limit)


def _validation_accuracy(space: Workspace, bundle: Bundle) -> float:
    """Macro, percent, of the newest model: quantising may cost some of what its training had."""
    part = space.parts.validation
    logits = predict_logits(bundle.load_model(), part, space.spec)
    number = {label: place for place, label in enumerate(space.labels)}
    targets = np.array([number[clip.label] for clip in part.clips])
    return round(macro_accuracy(logits.argmax(1) == targets, targets), 3)


def _take_shared(sweep: Sweep, name: str, folder: Path) -> None:
    """Bundles of the shared stages, and what teachers have said so far, into the trial's own folders."""
    shared, own = (place / "runs" / name for place in (sweep.folder / "shared", folder))
    for stage in MODEL_STAGES:
        source, target = shared / FOLDERS[stage], own / FOLDERS[stage]
        if source.is_dir() and not target.exists():
            beside = target.with_name(f".{target.name}.writing-{os.getpid()}")
            shutil.rmtree(beside, ignore_errors=True)
            shutil.copytree(source, beside, copy_function=_link)
            replace_folder(beside, target)
    _link_files(shared / "teacher-logits", own / "teacher-logits")


def _give_logits(sweep: Sweep, name: str, folder: Path) -> None:
    """What this trial's teachers have said, for the trials that follow."""
    if sweep.shared_until:
        own, shared = (place / "runs" / name / "teacher-logits" for place in (folder, sweep.folder / "shared"))
        _link_files(own, shared)


def _link_files(source: Path, target: Path) -> None:
    for path in source.glob("*.npz") if source.is_dir() else ():
        target.mkdir(parents=True, exist_ok=True)
        if not (target / path.name).exists():
            _link(path, target / path.name)


def _link(source: str | Path, target: str | Path) -> None:
    """A second name for a file that nobody changes any more; a copy where the file system has no such thing."""
    beside = Path(target).with_name(f".{Path(target).name}.{os.getpid()}")
    try:
        os.link(source, beside)
    except OSError:
        log(f"{source}: copied")
        shutil.copyfile(source, beside)
    os.replace(beside, target)
