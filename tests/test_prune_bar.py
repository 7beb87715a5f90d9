"""The pruning benchmark's own arithmetic: widths, equal time, the verdict on its bars."""

from pathlib import Path

import pytest

from aum_compress.models.presets import PRESETS
from aum_compress.recipe_schema import StudentSection


@pytest.fixture
def bar(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import prune_bar

    return prune_bar


@pytest.fixture
def hand():
    return PRESETS["student-edge"](64, 65, 10)


def test_the_wide_student_is_three_times_the_limits(bar, hand):
    limits, wide = bar.cost(hand), bar.cost(bar.wider(hand, bar.WIDER))
    assert all(wide[key] / limits[key] == pytest.approx(3, rel=0.05) for key in limits)


def test_a_recipe_can_say_what_pruning_leaves(bar, hand):
    stages = (
        stage.model_copy(update={"hidden": 40, "shortcut": number == 2} if stage.expansion else {})
        for number, stage in enumerate(hand.stem.stages)
    )
    pruned = hand.model_copy(update={"stem": hand.stem.model_copy(update={"stages": tuple(stages)})})
    assert StudentSection.model_validate(bar.section_of(pruned)).resolve(64, 65, 10) == pruned


def test_time_is_that_of_training_and_of_choosing(bar):
    seconds = [(3.0, 1.0), (2.0, 0.5)]
    assert bar.total_seconds([10, 4], [7], seconds, 5, 2) == 10 * 5 * 3.0 + 4 * 5 * 2.0 + 7 * 2 * 1.0


def test_every_configuration_is_timed(bar, hand):
    (narrow,) = bar.batch_seconds([hand.model_copy(update={"n_mels": 64, "n_frames": 17})], rounds=1)
    assert 0 < narrow[1] < narrow[0]


@pytest.mark.parametrize(("scratch", "half", "words"), [(79.0, 79.5, "met"), (80.5, 78.5, "missed by 0.50")])
def test_the_summary_says_whether_the_bars_are_met(bar, scratch, half, words):
    def files(accuracy):
        return {precision: {"param_bytes": 1, "macs": 2, "all": accuracy} for precision in ("int8", "fp32")}

    runs = {"pruned": 81.0, "scratch": scratch, "half-state": half}
    lines = [{"config": f"prune-bar-{run}", "fold": 1, "files": files(value)} for run, value in runs.items()]
    lines[2]["whole"] = files(80.0)
    text = bar.summary(lines)
    assert text.count(words) == 2
    assert "| whole-state | 1 | 1 | 2 | 80.00 | 80.00 |" in text
