"""The study that workers share: an Optuna storage on a common folder, and trials that come back from dead workers.

A worker holds a lock on the file of its trial for as long as it lives; the operating system lets go of it when the
process ends, however it ends. So a trial that is under way and whose file can be locked has lost its worker. No clock
is compared, and no grace period waited for. Whoever talks to the storage holds the lock of the study.
"""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from filelock import FileLock, Timeout
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import OptunaError
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from pydantic import TypeAdapter

from aum_compress.bundle import json_sha256
from aum_compress.console import log
from aum_compress.errors import AumError, RecipeError
from aum_compress.sweep.space import Choices, Range, combinations
from aum_compress.sweep.trial import Result, Sweep

NAME = "aum-compress"
OBJECTIVES = {"validation_accuracy": "maximize", "param_bytes": "minimize", "macs": "minimize"}
SQLITE = (".db", ".sqlite", ".sqlite3")
MOST_ATTEMPTS = 3
"""A trial that has cost so many workers their life is given up."""
MOST_DRAWS = 50
"""So many known combinations in a row, and there are taken to be no new ones; so many trials that are not trained for
each one that is wanted, and there are taken to be too few that fit."""
POLL_SECONDS = 1.0


PLACES = ("root", "device_response_folder", "threads")
"""Keys of a recipe that say where something lies or what a machine has, and may differ between workers."""
_DAMAGE = (OptunaError, ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError)
"""What Optuna, and we, stumble over in a storage that says what no worker has written."""


class Taken(NamedTuple):
    """A trial that this worker has to run; `lock` says that it lives."""

    number: int
    drawn: dict[str, Any]
    lock: FileLock


class Study:
    """The study of a sweep, made by its first worker.

    Raises:
        RecipeError: the study at that place is of another recipe or other parameters.
        AumError: the storage cannot be read.
    """

    def __init__(self, sweep: Sweep) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.sweep = sweep
        self.seed = sweep.base().seed
        self.lock = FileLock(sweep.folder / ".study.lock")
        (sweep.folder / "locks").mkdir(parents=True, exist_ok=True)
        with self._at_work():
            self.storage = _storage(sweep.storage, sweep.folder)
            self.study = optuna.create_study(
                storage=self.storage,
                study_name=NAME,
                directions=list(OBJECTIVES.values()),
                load_if_exists=True,
            )
            self._agree()

    def next(self) -> Taken | None:
        """A trial for this worker; None when all are done. Waits while others are at work: theirs may come back."""
        said = False
        while True:
            with self._at_work():
                self._recover()
                if (taken := self._take()) is not None:
                    return taken
                running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if not running:
                return None
            if not said:
                log(f"sweep: waits for {len(running)} trials of other workers")
                said = True
            time.sleep(POLL_SECONDS)

    def finish(self, taken: Taken, result: Result) -> None:
        """Writes down what came of a trial, and the list of all."""
        with self._at_work():
            self._set(taken.number, "result", result.to_dict())
            # Optuna's sampler learns from what is complete or pruned; from what was not trained it had better not:
            # it avoids such values by repeating others
            state = {"complete": TrialState.COMPLETE, "over": TrialState.PRUNED}.get(result.state, TrialState.FAIL)
            state = TrialState.FAIL if result.validation_accuracy is None else state
            values = [getattr(result, name) for name in OBJECTIVES] if state == TrialState.COMPLETE else None
            self.study.tell(taken.number, values, state)
        taken.lock.release()

    def rows(self) -> list[dict[str, Any]]:
        """One for each trial but those that came back: number, attempt, values, result, whether no other beats it."""
        with self._at_work():
            best = {trial.number for trial in self.study.best_trials}
            return [
                {
                    "trial": trial.number,
                    "attempt": trial.user_attrs.get("attempt", 1),
                    "pareto": trial.number in best,
                    "params": trial.params or trial.system_attrs.get("fixed_params", {}),
                    **Result("failed", reason=str(trial.user_attrs.get("reason", ""))).to_dict(),
                    **(_unfinished(trial) if (found := _result_of(trial)) is None else found.to_dict()),
                }
                for trial in self.study.get_trials(deepcopy=False)
                if not trial.user_attrs.get("came_back")
            ]

    def _agree(self) -> None:
        """The first worker says what is varied; the others must mean the same."""
        sweep = self.sweep
        mine = {
            "recipe": json_sha256(_without_places(sweep.base().model_dump(mode="json"))),
            "params": {key: str(varied) for key, varied in sweep.space.items()},
            "until": sweep.until,
        }
        found = self.study.user_attrs.get("sweep")
        if found is None:
            every = combinations(sweep.space) if sweep.trials is None else iter(())
            if every is None:
                raise RecipeError("--trials: a range has no end of values; say how many of them to try")
            for drawn in islice(every, len(self.study.get_trials(deepcopy=False)), None):  # a killed one has begun
                self.study.enqueue_trial(drawn)
            self.study.set_user_attr("sweep", mine)
        elif changed := [key for key in mine if found.get(key) != mine[key]]:
            raise RecipeError(
                f"{sweep.folder}: is the study of another sweep: differs in {', '.join(changed)}: found "
                f"{json.dumps(found.get(changed[0]))}, wanted {json.dumps(mine[changed[0]])}; name a new folder with "
                "--study"
            )

    def _recover(self) -> None:
        """Trials of workers that have ended are to be run again."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            lock = self._lock_of(trial.number)
            try:
                lock.acquire()
            except Timeout:
                continue
            try:
                attempt = trial.user_attrs.get("attempt", 1)
                if attempt < MOST_ATTEMPTS:
                    drawn = trial.system_attrs.get("fixed_params") or trial.params
                    self._set(trial.number, "came_back", True)
                    self.study.enqueue_trial(drawn, user_attrs={"attempt": attempt + 1, "again": trial.number})
                    log(f"sweep: trial {trial.number} has lost its worker and is run again")
                else:
                    self._set(trial.number, "reason", f"has ended its worker {attempt} times")
                self.study.tell(trial.number, state=TrialState.FAIL)
            finally:
                lock.release()

    def _take(self) -> Taken | None:
        for draw in range(MOST_DRAWS):
            trials = self.study.get_trials(deepcopy=False)
            waiting = any(trial.state == TrialState.WAITING for trial in trials)
            own = [trial for trial in trials if not trial.user_attrs.get("came_back")]
            trained = sum(not _untrained(trial) for trial in own)
            wanted = self.sweep.trials or 0
            if not waiting and (trained >= wanted or len(own) >= MOST_DRAWS * wanted):
                return None
            self.study.sampler = self._sampler(len(trials), draw)
            trial = self.study.ask(_distributions(self.sweep))
            known = [other for other in own if other.params == trial.params and other.number != trial.number]
            if known and not waiting:
                self._set(trial.number, "came_back", True)
                self.study.tell(trial.number, state=TrialState.FAIL)
                continue
            lock = self._lock_of(trial.number)
            lock.acquire()
            return Taken(trial.number, dict(trial.params), lock)
        log(f"sweep: the last {MOST_DRAWS} combinations drawn had been tried; there seem to be no others")
        return None

    def _sampler(self, n_trials: int, draw: int) -> BaseSampler:
        """One for each draw: what is drawn follows from the seed and the trials so far.

        What looks best to the estimator is one combination, whatever the seed, and stays so where it was not trained:
        once it has drawn what is known, chance draws.
        """
        seed = ((self.seed + 1) * 1_000_003 + n_trials) % 2**32
        return RandomSampler(seed=seed) if draw else TPESampler(seed=seed, constant_liar=True)

    def _lock_of(self, number: int) -> FileLock:
        return FileLock(self.sweep.folder / "locks" / f"{number}", timeout=0)

    def _set(self, number: int, key: str, value: Any) -> None:
        study_id = self.storage.get_study_id_from_name(NAME)
        trial_id = self.storage.get_trial_id_from_study_id_trial_number(study_id, number)
        self.storage.set_trial_user_attr(trial_id, key, value)

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        try:
            with self.lock:
                yield
        except _DAMAGE as error:
            raise AumError(
                f"{self.sweep.storage}: cannot be used as a study: {type(error).__name__}: {error}; cut short or "
                "altered? Name a new folder with --study; bundles of finished trials stay where they are"
            ) from None


def study_places(study: Path) -> tuple[Path, Path]:
    """Folder and storage that `--study` means: a folder, or an SQLite file with its folder beside it."""
    if study.suffix in SQLITE:
        return study.with_suffix(""), study
    return study, study / "study.journal"


def _untrained(trial: FrozenTrial) -> bool:
    """Over budget by count, or values that do not fit together: it cost nothing, and does not count as tried."""
    result = _result_of(trial)
    return result is not None and result.state in ("over", "invalid") and result.validation_accuracy is None


def _result_of(trial: FrozenTrial) -> Result | None:
    """What came of it; None while nothing has."""
    found = trial.user_attrs.get("result")
    return None if found is None else TypeAdapter(Result).validate_python(found)


def _unfinished(trial: FrozenTrial) -> dict[str, Any]:
    return {} if trial.state.is_finished() else {"state": trial.state.name.lower(), "reason": ""}


def _distributions(sweep: Sweep) -> dict[str, BaseDistribution]:
    return {key: _distribution(varied) for key, varied in sweep.space.items()}


def _distribution(varied: Choices | Range) -> BaseDistribution:
    if isinstance(varied, Choices):
        return CategoricalDistribution(list(varied.values))
    if varied.is_whole:
        return IntDistribution(int(varied.low), int(varied.high), log=varied.log)
    return FloatDistribution(varied.low, varied.high, log=varied.log)


def _without_places(value: Any) -> Any:
    """A recipe's mapping without `PLACES`, at any depth."""
    if isinstance(value, dict):
        return {key: _without_places(each) for key, each in value.items() if key not in PLACES}
    return [_without_places(each) for each in value] if isinstance(value, list) else value


def _storage(path: Path, folder: Path) -> BaseStorage:
    if path.suffix in SQLITE:
        return RDBStorage(f"sqlite:///{path.resolve()}")
    return JournalStorage(JournalFileBackend(os.fspath(path), _JournalLock(folder)))


class _JournalLock:
    """In place of Optuna's own, which outlives its process: 30 seconds for every worker that dies with it."""

    def __init__(self, folder: Path) -> None:
        self.lock = FileLock(folder / ".journal.lock")

    def acquire(self) -> bool:
        self.lock.acquire()
        return True

    def release(self) -> None:
        self.lock.release()
