"""The benchmarks on ESC10-mobile: their networks are what their pages say, and their lists keep folds apart."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from audio_trees import META_COLUMNS, write_table

from aum_compress.budget.analytic_bytes import analytic_stored
from aum_compress.models.factory import folded_config
from aum_compress.recipe_schema import StudentSection

LABELS = ("bark", "rain")


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import device_gain
    import esc10_mobile
    import student_choices

    return SimpleNamespace(esc10=esc10_mobile, choices=student_choices, devices=device_gain)


def int8_bytes(section: dict, n_mels: int) -> int:
    config = folded_config(StudentSection(**section).resolve(n_mels, 65, 10))
    return sum(layer.param_bytes for layer in analytic_stored(config, "int8").values())


@pytest.mark.parametrize(
    ("student", "convolution", "n_mels"), [("STUDENT", "CONVOLUTION", 256), ("EDGE", "EDGE_CONVOLUTION", 64)]
)
def test_convolutions_in_place_of_scans_take_as_many_bytes(benchmarks, student, convolution, n_mels):
    scan = getattr(benchmarks.esc10, student)
    replaced = scan | {"blocks": getattr(benchmarks.esc10, convolution)}
    assert int8_bytes(replaced, n_mels) == pytest.approx(int8_bytes(scan, n_mels), rel=0.005)


def test_seeds_of_a_student_share_its_teachers(benchmarks, tmp_path):
    sections = benchmarks.esc10.CONFIGS["student-distilled"][1]
    folds = [
        benchmarks.esc10.Benchmark(
            SimpleNamespace(data=tmp_path, responses=tmp_path, work=tmp_path, epochs=40, seed=seed), 1
        )
        for seed in (0, 2)
    ]
    first, other = (fold.recipe("student-distilled", **sections(fold)) for fold in folds)
    assert first.distill.teachers == other.distill.teachers
    assert first.name != other.name
    assert (first.seed, other.seed) == (0, 2)


def test_every_configuration_is_a_recipe(benchmarks, tmp_path):
    arguments = SimpleNamespace(data=tmp_path, responses=tmp_path, work=tmp_path, epochs=40, seed=0)
    fold = benchmarks.esc10.Benchmark(arguments, 1)
    for config, (title, sections) in benchmarks.esc10.CONFIGS.items():
        recipe = fold.recipe(config, **sections(fold))
        assert title
        assert recipe.student, config
        trained = recipe.distill.train if recipe.distill else recipe.student.train
        assert trained.epochs == 40, "the same schedule for all"
        assert (
            not set(benchmarks.esc10.TEST_DEVICES) - {*trained.augment.device_response_exclude} or config == "cp-mobile"
        )
    learnt = fold.recipe("student-learnt-int8", **benchmarks.esc10.CONFIGS["student-learnt-int8"][1](fold))
    assert learnt.name == fold.name("student-distilled"), "it goes on from the student that is there"
    by_device = benchmarks.devices.with_devices(fold, "student-distilled")
    assert by_device.name == learnt.name
    assert by_device.devices.finetune.epochs == 50


def test_choices_are_made_on_folds_that_decide_nothing_else(benchmarks, tmp_path):
    names = {
        fold: [f"audio/{label}-{fold}-{device}.wav" for label in LABELS for device in "ab"] for fold in range(1, 6)
    }
    for fold, own in names.items():
        others = [name for other, found in names.items() if other != fold for name in found if name.endswith("a.wav")]
        for part, chosen in (("test", own), ("train", others)):
            rows = [(name, name.split("/")[1].split("-")[0]) for name in chosen]
            write_table(tmp_path / "split" / f"fold{fold}_{part}.csv", META_COLUMNS[:2], rows)
    train, test = (path.read_text().splitlines()[1:] for path in benchmarks.choices.write_lists(tmp_path, tmp_path))
    assert {line.split("-")[1] for line in train} == {"1", "2", "3"}
    assert {line.split("-")[1] for line in test} == {"4", "5"}
    assert len(train) == 3 * len(LABELS)
    assert len(test) == 2 * 2 * len(LABELS)


def test_the_gain_by_device_is_a_mean_over_folds(benchmarks):
    lines = [
        {"models": [{"device": "a", "general_accuracy": 80, "accuracy": own}], "all": {"general": 79, "pack": 79.5}}
        for own in (81, 84)
    ]
    table = benchmarks.devices.summary(lines)
    assert "| a | 2 | 80.0 | 82.5 | +2.5 |" in table
    assert "| all devices | 2 | 79.0 | 79.5 | +0.5 |" in table


def test_tables_are_means_of_the_lines_that_are_there(benchmarks):
    lines = [
        {"choice": "student-edge", "seed": seed, "all": 80 + seed, "a": 85, "unseen": 77, "log_loss": 0.6}
        for seed in (0, 1)
    ]
    assert "| 2 | 80.5 | 80.0, 81.0 | 85.0 | 77.0 | 0.600 |" in benchmarks.choices.summary(lines)
    kept = benchmarks.esc10.read(benchmarks.esc10.RESULTS)
    assert kept == [json.loads(line) for line in benchmarks.esc10.RESULTS.read_text().splitlines()]
    table = benchmarks.esc10.summary([line for line in kept if line["config"] == "cp-mobile" and line["fold"] == 1])
    assert "| CP-Mobile, its own recipe | fp16 | 1 | 1 | 119,588 | 29,416,448 | 80.6 |" in table
