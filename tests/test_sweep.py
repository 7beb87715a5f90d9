"""Sweeps: what is varied, what is counted before it is trained, and workers that die."""

import json
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_recipe import TRAIN, command, raw_recipe, tiny_process, write_recipe

from aum_compress.bundle import read_bundle
from aum_compress.errors import AumError, RecipeError
from aum_compress.recipe import load_recipe
from aum_compress.report.sweep_table import MOST_UNTRAINED, shown, sweep_lines
from aum_compress.sweep.space import Choices, Range, combinations, parse_space, settings_of, values_of
from aum_compress.sweep.study import MOST_DRAWS, Study, study_places
from aum_compress.sweep.trial import Result, Sweep, run_trial
from aum_compress.sweep.worker import work

pytestmark = pytest.mark.usefixtures("cache_of_finished")

DISTILLED = {"reference": None, "distill": {"train": TRAIN}, "prune": None, "export": None, "verify": None}


def test_lists_and_ranges_are_read_as_yaml_has_them():
    space = parse_space(
        ["student.d_model=32,48", "student.stem={kind: conv},[1, 2]", "distill.lambda=0.1..0.5", "seed=1..8:log"]
    )
    assert space == {
        "student.d_model": Choices({"32": 32, "48": 48}),
        "student.stem": Choices({'{"kind": "conv"}': {"kind": "conv"}, "[1, 2]": [1, 2]}),
        "distill.lambda": Range(0.1, 0.5),
        "seed": Range(1, 8, log=True),
    }
    assert space["seed"].is_whole
    assert not space["distill.lambda"].is_whole
    drawn = {"student.d_model": "48", "student.stem": "[1, 2]", "distill.lambda": 0.3, "seed": 2}
    settings = settings_of(values_of(space, drawn))
    assert settings == ["student.d_model=48", "student.stem=[1, 2]", "distill.lambda=0.3", "seed=2"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "wanted at least one"),
        (["student.d_model"], "wanted section.key=a,b,c"),
        (["a b=1"], "wanted section.key=a,b,c"),
        (["seed=1,2", "seed=3"], "seed: named twice"),
        (["seed="], "one value or more"),
        (["seed=1,1"], "each once"),
        (["seed=[1"], "are not YAML"),
        (["seed=3..1"], "wanted a smaller and a larger number"),
        (["seed=1..e"], "is no range of numbers"),
        (["seed=0..1:log"], "needs numbers above 0"),
    ],
)
def test_what_is_no_list_and_no_range_is_refused(texts, message):
    with pytest.raises(RecipeError, match=message):
        parse_space(texts)


def test_combinations_are_all_of_them_and_not_too_many():
    assert list(combinations(parse_space(["a.b=1,2", "seed=3"]))) == [
        {"a.b": "1", "seed": "3"},
        {"a.b": "2", "seed": "3"},
    ]
    assert combinations(parse_space(["a.b=1,2", "seed=3..4"])) is None
    with pytest.raises(RecipeError, match="1,000,000 combinations"):
        combinations({key: Choices({str(n): n for n in range(100)}) for key in "abc"})


@pytest.fixture
def tiny(finished, tmp_path):
    """A sweep of the tiny recipe, from its parameters."""

    def made(*params: str, folder: str = "study", until: str | None = None, trials: int | None = None, **changes):
        path = write_recipe(tmp_path, finished.tree, **(DISTILLED | changes))
        return Sweep(path, (), parse_space(params), *study_places(tmp_path / folder), trials, until)

    return made


def test_a_student_over_budget_is_counted_and_not_trained(tiny):
    sweep = tiny("student.d_inner=16,4096")
    result = run_trial(sweep, {"student.d_inner": 4096})
    assert result.state == "over"
    assert result.reason.startswith("counted before training")
    assert result.param_bytes > 128_000
    assert not (sweep.folder / "trials").exists()


def test_what_cannot_be_pruned_into_the_budget_is_not_trained_either(tiny):
    pruned = {"prune": {"ratio": 0.5, "max_block_ratio": 0.5, "finetune": TRAIN}, "budget": {"max_param_bytes": 9_000}}
    wide = run_trial(tiny("student.d_inner=16", **pruned), {"student.d_inner": 512})
    assert (wide.state, wide.validation_accuracy) == ("over", None)
    whole = run_trial(tiny("student.d_inner=16", budget={"max_param_bytes": 9_000}), {"student.d_inner": 256})
    assert wide.param_bytes == whole.param_bytes, "half of the channels is the least that it can come to"


def test_values_that_do_not_fit_together_are_no_error_of_the_sweep(tiny):
    result = run_trial(tiny("student.pool=mean"), {"student.pool": "median"})
    assert result.state == "invalid"
    assert "student.pool" in result.reason


@pytest.mark.parametrize(
    ("changes", "until", "message"),
    [
        ({"student": None, "distill": None, "quantize": None}, None, "has no student"),
        ({}, "teacher", "--until teacher: no student is trained by then"),
        ({}, "student", "--until student: no student is trained by then"),
        ({"distill": {"train": TRAIN | {"devices": 2}}}, None, "wants several processes"),
    ],
)
def test_a_recipe_that_nothing_can_be_compared_with_is_refused(tiny, changes, until, message):
    with pytest.raises(RecipeError, match=message):
        work(tiny("seed=1,2", until=until, **changes))


def test_values_that_fit_no_teacher_are_listed_and_the_sweep_goes_on(tiny):
    sweep = tiny("teacher.d_state=4")
    result = run_trial(sweep, {"teacher.stem": {"kind": "patch", "kernel": [64, 64], "stride": [64, 64]}})
    assert result.state == "invalid"
    assert "teacher" in result.reason


def test_workers_may_have_their_audio_elsewhere(tiny):
    Study(tiny("student.d_model=8,12"))
    sweep = tiny("student.d_model=8,12")
    elsewhere = replace(sweep, settings=("data.root=/mnt/other", "threads=1"))
    assert Study(elsewhere).sweep is elsewhere


def test_without_validation_clips_there_is_nothing_to_choose_on(finished, tmp_path):
    data = raw_recipe(finished.tree)["data"] | {"validation_fraction": 0}
    path = write_recipe(tmp_path, finished.tree, **(DISTILLED | {"data": data}))
    text = path.read_text().replace("epochs: 1", "epochs: 1\n    keep: last")
    path.write_text(text)
    load_recipe(path)
    with pytest.raises(RecipeError, match="compared on validation clips"):
        work(Sweep(path, (), parse_space(["seed=1,2"]), *study_places(tmp_path / "study")))


def test_shared_stages_are_those_before_the_first_that_is_varied(tiny):
    assert tiny("distill.lambda=0.1,0.2", student={"d_model": 8, "train": TRAIN}).shared_until == "student"
    assert tiny("student.d_model=8,16").shared_until == "teacher"
    assert tiny("quantize.percentile=99,100", "budget.max_macs=1,2").shared_until == "distill"
    assert tiny("teacher.d_model=8,16").shared_until is None
    assert tiny("seed=1,2").shared_until is None


def test_a_killed_worker_loses_a_trial_that_another_one_runs_again(tiny):
    """Two processes in one study: one is killed with a trained and unwritten student, the other one is at work then."""
    sweep = tiny("student.d_model=8,12")
    words = ("sweep", sweep.recipe, "--param", "student.d_model=8,12", "--study", sweep.folder)
    die = "import os, signal, aum_compress.pipeline as p; p.quantise = lambda *a: os.kill(os.getpid(), signal.SIGKILL)"
    dying = tiny_process(die, *words)
    while not list(sweep.folder.glob("locks/*")):
        assert dying.poll() is None, dying.communicate()
        time.sleep(0.05)
    result = command(*words, "--json")
    assert result.exit_code == 0, result.stderr
    assert dying.wait(timeout=60) == -9
    trials = json.loads(result.stdout)["trials"]
    assert sorted(row["params"]["student.d_model"] for row in trials) == ["12", "8"]
    assert sorted(row["attempt"] for row in trials) == [1, 2]
    assert min(trials, key=lambda row: row["param_bytes"])["pareto"]
    shared = read_bundle(sweep.folder / "shared" / "runs" / "tiny" / "02-teacher")
    for row in trials:
        bundle = read_bundle(sweep.folder / row["bundle"])
        assert row["state"] == "complete"
        assert (bundle.card.stage, bundle.card.model.d_model) == ("quantize", int(row["params"]["student.d_model"]))
        assert bundle.card.budget["param_bytes"] == row["param_bytes"]
        assert read_bundle(bundle.path.parent / "02-teacher").sha256 == shared.sha256, "trained once for all"
    assert json.loads((sweep.folder / "sweep.json").read_text())["trials"] == trials
    assert trials[0]["bundle"] in (sweep.folder / "sweep.md").read_text()


def test_an_sqlite_file_serves_as_well(tiny, monkeypatch):
    _fake_trials(monkeypatch)
    sweep = tiny("student.d_model=8,12", folder="study.sqlite")
    Study(sweep).next().lock.release()  # as the system does it for a dead process
    assert [row["attempt"] for row in work(sweep)["trials"]] == [1, 2]
    assert sweep.storage.read_bytes().startswith(b"SQLite format 3")
    assert (sweep.folder / "sweep.md").is_file()


def _fake_trials(monkeypatch, accuracy=lambda values: 50.0):
    def fake(sweep, values):
        wide = int(values["student.d_model"])
        return Result("complete", "", accuracy(wide), 1000 * wide, 10_000 * wide, f"trials/{wide}")

    monkeypatch.setattr("aum_compress.sweep.worker.run_trial", fake)
    monkeypatch.setattr("aum_compress.sweep.worker.run_shared", lambda sweep: None)


def test_the_pareto_set_is_what_no_other_beats(tiny, monkeypatch):
    _fake_trials(monkeypatch, {8: 50.0, 12: 49.0, 16: 60.0}.get)
    rows = work(tiny("student.d_model=8,12,16"))["trials"]
    assert {row["params"]["student.d_model"]: row["pareto"] for row in rows} == {"8": True, "12": False, "16": True}


def test_drawn_trials_are_new_ones_within_their_number_and_the_same_again(tiny, monkeypatch):
    _fake_trials(monkeypatch)
    drawn = [
        [row["params"]["student.d_model"] for row in work(tiny("student.d_model=4..64", folder=f, trials=12))["trials"]]
        for f in ("one", "other")
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 12
    few = work(tiny("student.d_model=4..6", folder="few", trials=12))["trials"]
    assert sorted(row["params"]["student.d_model"] for row in few) == [4, 5, 6], "there are no more"


def test_what_is_not_trained_does_not_count_as_tried(tiny, monkeypatch):
    def fake(sweep, values):
        if values["student.d_model"] > 40:
            return Result("over", "counted before training", None, 200_000, 1)
        return Result("complete", "", 50.0, 1000 * values["student.d_model"], 1, "trials/x")

    _fake_trials(monkeypatch)
    monkeypatch.setattr("aum_compress.sweep.worker.run_trial", fake)
    summary = work(tiny("student.d_model=4..200", trials=4))
    states = [row["state"] for row in summary["trials"]]
    assert states.count("complete") == 4
    assert states.count("over") > 0
    many = {"params": {}, "trials": [row | {"trial": k} for k, row in enumerate(40 * summary["trials"])]}
    assert len(shown(many)) == 160 + MOST_UNTRAINED
    assert f"{40 * states.count('over') - 10} that were not trained stand in sweep.json" in sweep_lines(many)[0]
    monkeypatch.setattr("aum_compress.sweep.worker.run_trial", lambda *_: Result("over", "", None, 1, 1))
    assert len(work(tiny("student.d_model=1..9999", folder="none", trials=1))["trials"]) == MOST_DRAWS


def test_a_sweep_goes_on_where_what_looks_best_does_not_fit_together(tiny, monkeypatch):
    """Of two values that are best each, but refused together, the estimator draws nothing else."""

    def fake(sweep, values):
        first, second = (values[f"student.{key}"] for key in ("d_model", "d_inner"))
        if first == second == 8:
            return Result("invalid", "do not fit together")
        return Result("complete", "", 90.0 if 8 in (first, second) else 10.0, 1000, 1, "trials/x")

    _fake_trials(monkeypatch)
    monkeypatch.setattr("aum_compress.sweep.worker.run_trial", fake)
    names = ("d_model", "d_inner", "d_state", "dt_rank", "depth")
    rows = work(tiny(*(f"student.{name}=4,8,12,16,20" for name in names), trials=40))["trials"]
    assert sum(row["state"] == "complete" for row in rows) == 40


def test_a_study_goes_on_and_grows(tiny, monkeypatch):
    _fake_trials(monkeypatch)
    first = work(tiny("student.d_model=4..64", trials=2))["trials"]
    then = work(tiny("student.d_model=4..64", trials=3))["trials"]
    assert then[:2] == [row | {"pareto": then[k]["pareto"]} for k, row in enumerate(first)]
    assert len(then) == 3


def test_a_trial_that_ends_its_workers_is_given_up(tiny):
    study = Study(tiny("student.d_model=8"))
    for _ in range(3):
        study.next().lock.release()
    assert study.next() is None
    (row,) = study.rows()
    assert (row["state"], row["attempt"]) == ("failed", 3)
    assert "ended its worker 3 times" in row["reason"]


def test_another_sweep_in_the_same_folder_is_refused(tiny):
    Study(tiny("student.d_model=8,12"))
    with pytest.raises(RecipeError, match=r"differs in params: .*\"8, 12\".*\"8, 16\""):
        Study(tiny("student.d_model=8,16"))
    with pytest.raises(RecipeError, match="differs in recipe"):
        Study(tiny("student.d_model=8,12", seed=5))


def test_a_range_needs_a_number_of_trials(tiny):
    with pytest.raises(RecipeError, match="--trials: a range has no end"):
        Study(tiny("student.d_model=8..12"))


def test_a_damaged_study_is_named(tiny):
    sweep = tiny("student.d_model=8,12")
    Study(sweep)
    sweep.storage.write_bytes(b"{\n" + sweep.storage.read_bytes())
    with pytest.raises(AumError, match="cannot be used as a study"):
        Study(sweep)


def test_the_verb_shows_a_table_and_fails_where_nothing_was_completed(tiny, monkeypatch):
    _fake_trials(monkeypatch)
    sweep = tiny("student.d_model=8,12")
    words = ("sweep", sweep.recipe, "--param", "student.d_model=8,12", "--study", sweep.folder)
    result = command(*words)
    assert result.exit_code == 0, result.stderr
    assert "2 trials: 2 complete" in result.stdout
    assert "trials/8" in result.stdout
    shutil.rmtree(sweep.folder)
    monkeypatch.setattr("aum_compress.sweep.worker.run_trial", lambda *_: Result("invalid", "too round"))
    result = command(*words)
    assert result.exit_code == 2
    assert "no trial could be completed" in result.stderr
    assert "invalid: too round" in result.stdout


def test_further_processes_get_the_same_command(tiny, monkeypatch, tmp_path):
    _fake_trials(monkeypatch)
    sweep = tiny("student.d_model=8,12")
    note = tmp_path / "note"
    monkeypatch.setattr(
        "aum_compress.cli_sweep.WORKER", f"import sys; print(sys.argv[1:], file=open({str(note)!r}, 'a'))"
    )
    words = ("sweep", sweep.recipe, "--param", "student.d_model=8,12", "--study", sweep.folder, "--set", "seed=1")
    assert command(*words, "--workers", 2).exit_code == 0
    own = [str(sweep.recipe), "--param=student.d_model=8,12", "--set=seed=1", f"--study={sweep.folder}"]
    assert note.read_text() == 2 * f"{['sweep', *own]}\n"
    monkeypatch.setattr("aum_compress.cli_sweep.WORKER", "import sys; sys.exit(9)")
    result = command(*words, "--workers", 2)
    assert result.exit_code == 2
    assert "all 2 workers have failed" in result.stderr


def test_shapes_of_students_fit_or_are_refused_with_a_reason(tiny, monkeypatch):
    """benchmarks/student_sweep.py: every mixer, and everything else that it varies, can be trained."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from student_sweep import SPACE, student

    sweep = replace(tiny("seed=1", student={"preset": "student"}), compose=student)
    generator, resolved = random.Random(0), []
    for _ in range(80):
        values = values_of(SPACE, {key: generator.choice(list(varied.values)) for key, varied in SPACE.items()})
        rowless = values["along"] != "tokens" or values["position"] == "factorised"
        if (rowless or values["head"] == "batch_norm") and values["pool"] == "class_token":
            with pytest.raises(RecipeError, match="class token (stands in no row and no column|is but one)"):
                load_recipe(sweep.recipe, student(values)).student.resolve(256, 65, 10)
        else:
            config = load_recipe(sweep.recipe, student(values)).student.resolve(256, 65, 10)
            assert len(config.blocks) == values["depth"]
            resolved.append(values)
    for key in ("mixer", "along", "token", "position", "pool", "head", "stem_stages"):
        assert {values[key] for values in resolved} == set(SPACE[key].values.values()), key
