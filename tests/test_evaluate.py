"""`aum-compress evaluate`: intervals, the paired comparison, predictions, groups of devices."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from answers import answer, message, record
from audio_trees import noise
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from tiny_recipe import command, write_recipe

from aum_compress.data.clips import Clip
from aum_compress.data.tau import recording
from aum_compress.errors import DataError
from aum_compress.evaluate import bootstrap
from aum_compress.evaluate.bootstrap import Answers, intervals, mcnemar_p, resampled_figures, two_sided_p
from aum_compress.evaluate.clips import recordings_of
from aum_compress.evaluate.predictions import write_predictions
from aum_compress.train.metrics import classification_metrics, device_groups

LABELS = ("bus", "park", "tram")
DEVICES = ("a", "b", "s1", "s4")
SEEN = frozenset({"a", "b", "s1"})


def answers_of(seed: int, clips: int, *, recordings: int, devices: tuple[str, ...] = DEVICES) -> Answers:
    chance = np.random.default_rng(seed)
    targets = chance.integers(len(LABELS), size=clips)
    logits = chance.normal(size=(clips, len(LABELS))) + 1.2 * np.eye(len(LABELS))[targets]
    named = [devices[k] for k in chance.integers(len(devices), size=clips)]
    return Answers(logits, targets, LABELS, named, [f"r{k % recordings}" for k in range(clips)], SEEN)


def flat(metrics: dict, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], float]:
    found = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            found |= flat(value, (*path, key))
        elif key not in ("clips", "confusion"):
            found[(*path, key)] = value
    return found


# --- figures and their intervals


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), clips=st.integers(1, 40), recordings=st.integers(1, 12), named=st.booleans())
def test_a_draw_of_every_recording_once_gives_the_metrics_themselves(seed, clips, recordings, named):
    answers = answers_of(seed, clips, recordings=recordings, devices=DEVICES if named else ("",))
    wanted = classification_metrics(answers.logits, answers.targets, LABELS, answers.devices, SEEN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "_drawn", lambda count, draws, seed: [np.ones((draws, count))])
        found = resampled_figures(answers, 1)
    known = {key: value.item() for key, value in found.items() if not np.isnan(value).all()}
    assert known == pytest.approx(flat(wanted))


def test_recordings_are_drawn_with_all_their_clips():
    """Ten equal copies of each clip say nothing new: drawn by recording, the intervals stay the same."""
    one = answers_of(3, 60, recordings=60)
    rows = np.repeat(np.arange(60), 10)
    by_clip = ([values[k] for k in rows] for values in (one.devices, one.recordings))
    copies = Answers(one.logits[rows], one.targets[rows], LABELS, *by_clip, SEEN)
    found, wanted = (resampled_figures(answers, 200) for answers in (copies, one))
    for key in wanted:
        np.testing.assert_allclose(found[key], wanted[key], rtol=1e-9, err_msg=str(key))
    apart = Answers(copies.logits, copies.targets, LABELS, copies.devices, [str(k) for k in range(600)], SEEN)
    low, high = intervals(resampled_figures(apart, 200))["accuracy"]
    wide = intervals(resampled_figures(copies, 200))["accuracy"]
    assert high - low < 0.5 * (wide[1] - wide[0]), "clips drawn one by one would look far too sure"


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Answers that are right with a known chance, which recordings share: 95 % of intervals should contain it."""
    chance = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        right = np.repeat(chance.random(80) < 0.7, 4)
        targets = np.repeat(chance.integers(2, size=80), 4)
        logits = np.eye(2)[np.where(right, targets, 1 - targets)]
        answers = Answers(logits, targets, ("x", "y"), [""] * 320, [str(k // 4) for k in range(320)])
        low, high = intervals(resampled_figures(answers, 200))["overall_accuracy"]
        held += low <= 70 <= high
    assert 87 <= held <= 100


def test_draws_depend_on_nothing_but_their_seed():
    answers = answers_of(1, 50, recordings=20)
    first, again, other = (resampled_figures(answers, 70, seed)[("accuracy",)] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_class_that_a_draw_lacks_is_left_out_of_its_mean():
    answers = Answers(np.eye(3)[[0, 1, 2]], np.array([0, 1, 2]), LABELS, [""] * 3, ["r1", "r2", "r3"])
    found = resampled_figures(answers, 100)
    assert (found[("accuracy",)] == 100).all()
    assert np.isnan(found[("by_class", "bus")]).any()
    assert intervals(found)["by_class"]["bus"] == [100, 100]


@settings(max_examples=100, deadline=None)
@given(first=st.integers(0, 400), second=st.integers(0, 400))
def test_mcnemar_is_the_binomial_test_on_clips_that_one_alone_has_right(first, second):
    wanted = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar_p(first, second) == pytest.approx(wanted, rel=1e-8, abs=1e-300)


def test_p_of_the_bootstrap_is_two_sided_and_never_zero():
    assert two_sided_p(np.full(999, 1.0)) == pytest.approx(2 / 1000)
    assert two_sided_p(np.full(999, -1.0)) == pytest.approx(2 / 1000)
    assert two_sided_p(np.array([-1.0, 1.0, np.nan, 0.0])) == 1.0
    assert two_sided_p(np.zeros(9)) == 1.0


# --- devices and recordings


def test_groups_of_devices_are_those_of_the_challenge():
    named = ["a", "b", "s1", "s4", "s5"]
    assert device_groups(named, {"a", "b", "c", "s1"}) == {
        "real": ["a", "b"],
        "simulated": ["s1"],
        "unseen": ["s4", "s5"],
    }
    assert device_groups(named, ()) == {}, "unknown what training has heard"
    assert device_groups(["phone", "a"], {"a"}) == {}, "not TAU's names"


def test_all_parts_and_devices_of_a_recording_are_one_recording():
    names = [f"audio/tram-lyon-1000-40000-{part}-{device}.wav" for part in range(3) for device in ("a", "s4")]
    assert {recording(name) for name in names} == {"tram-lyon-1000-40000"}
    assert recording("audio/tram-lyon-1000-40000-a.wav") == "tram-lyon-1000-40000", "of 2020, without parts"
    assert recording("dog/1.wav") is None


def clip(name: str, label: str, device: str = "", group: str = "") -> Clip:
    return Clip(name, Path(name), label, device, group or name)


def test_names_with_dashes_are_recordings_of_their_own_unless_they_are_taus():
    parts = [clip(f"audio/tram-lyon-1000-40000-{part}-a.wav", "tram", "a", "lyon-1000") for part in range(2)]
    assert recordings_of(parts) == ["tram-lyon-1000-40000"] * 2
    dated = [clip(f"{label}/2024-05-01-12-0{k}.wav", label) for label in ("bus", "tram") for k in range(3)]
    assert recordings_of(dated) == [one.clip_id for one in dated]
    listed = [clip(f"audio/2024-05-01-12-0{k}.wav", "tram", "a", "place 7") for k in range(2)]
    assert recordings_of(listed) == ["place 7"] * 2
    grouped = [clip(f"tram/tram-lyon-1000-40000-{k}-a.wav#0", "tram", group=f"night {k}") for k in range(2)]
    assert recordings_of(grouped) == ["night 0", "night 1"], "what groups_csv says holds, whatever files are called"


# --- predictions


def test_predictions_are_a_row_a_file_and_clips_of_one_file_vote(tmp_path):
    log_probabilities = np.log(np.array([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1]]))
    path = tmp_path / "output.csv"
    assert write_predictions(path, ["a.wav", "b.wav", "b.wav"], log_probabilities, LABELS) == 2
    rows = list(csv.DictReader(path.open(), delimiter="\t"))
    assert list(rows[0]) == ["filename", "scene_label", *LABELS]
    assert [(row["filename"], row["scene_label"]) for row in rows] == [("a.wav", "bus"), ("b.wav", "park")]
    shares = np.array([[float(row[label]) for label in LABELS] for row in rows])
    vote = np.sqrt(np.exp(log_probabilities[1:]).prod(0))
    np.testing.assert_allclose(shares, [[0.7, 0.2, 0.1], vote / vote.sum()], rtol=1e-6)


def test_predictions_that_cannot_be_written_leave_what_was_there(tmp_path):
    (tmp_path / "kept").mkdir()
    with pytest.raises(DataError, match="cannot be written"):
        write_predictions(tmp_path / "none" / "output.csv", ["a"], np.zeros((1, 3)), LABELS)
    with pytest.raises(DataError, match="cannot be written"):
        write_predictions(tmp_path / "kept", ["a"], np.zeros((1, 3)), LABELS)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_place_where_no_predictions_can_be_is_named_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("evaluate", "no-such-model", "--data", "no-such-data", "--predictions")
    assert ".: is a folder; name a file for the predictions, such as output.csv" in message(*words, ".")
    assert f"{tmp_path}: is a folder" in message(*words, tmp_path)
    assert "none/output.csv: there is no folder none" in message(*words, "none/output.csv")
    assert "no-such-model" in message(*words, "output.csv")


# --- the command

pytestmark = pytest.mark.usefixtures("cache_of_finished")


@pytest.fixture
def recipe(finished, tmp_path) -> Path:
    return write_recipe(tmp_path, finished.tree)


def test_evaluate_gives_every_figure_with_its_interval(exports, recipe):
    found = record("evaluate", exports, "--data", recipe, "--draws", 100)
    assert (found["clips"], found["recordings"], found["draws"], found["confidence"]) == (18, 6, 100, 95)
    assert found["device_groups"] == {"real": ["a"], "simulated": ["s1"], "unseen": ["s4"]}
    assert np.array(found["confusion"]).sum() == 18
    assert np.diag(found["confusion"]).sum() / 18 * 100 == pytest.approx(found["overall_accuracy"])
    for key in ("accuracy", "overall_accuracy", "log_loss", "ece", "seen", "unseen"):
        low, high = found["intervals"][key]
        assert low <= high
    assert found["intervals"]["by_device"].keys() == found["by_device"].keys()
    assert found["intervals"]["by_device_group"].keys() == found["by_device_group"].keys()
    text = answer("evaluate", exports, "--data", recipe, "--draws", 100)
    assert "18 clips of 6 recordings" in text
    low, high = found["intervals"]["accuracy"]
    assert f"{found['accuracy']:.1f} % [{low:.1f}, {high:.1f}]" in " ".join(text.split())
    assert "95 % intervals, bootstrap over recordings, 100 draws" in text
    assert "real devices of training: a" in text
    assert "devices that training has not heard: s4" in text
    assert "confusion: true class by row" in text


def test_evaluate_a_folder_that_cannot_say_which_devices_were_heard(exports, finished):
    words = ("evaluate", exports, "--data", finished.tree, "--draws", 20)
    assert "by_device_group" in record(*words)
    assert record(*words)["by_device_group"] == {}
    found = record(*words, "--seen-devices", "a,b,s1")
    assert found["device_groups"] == {"real": ["a", "b"], "simulated": ["s1"], "unseen": ["s4"]}
    result = command(*words, "--seen-devices", "a,c")
    assert "no clip of c in" in result.stderr
    assert result.exit_code == 0


def test_evaluate_refuses_options_that_are_for_other_data(exports, finished, recipe):
    assert "--set changes a recipe" in message("evaluate", exports, "--data", finished.tree, "--set", "seed=1")
    assert "is a recipe, whose training part" in message("evaluate", exports, "--data", recipe, "--seen-devices", "a")


def test_evaluate_writes_predictions_that_score_as_it_says(exports, recipe, finished, tmp_path):
    path = tmp_path / "output.csv"
    found = record("evaluate", exports, "--data", recipe, "--draws", 0, "--predictions", path)
    assert found["intervals"] == {}
    rows = list(csv.DictReader(path.open(), delimiter="\t"))
    meta = {row["filename"]: row for row in csv.DictReader((finished.tree / "meta.csv").open(), delimiter="\t")}
    right = [row["scene_label"] == meta[row["filename"]]["scene_label"] for row in rows]
    assert len(rows) == 18
    assert 100 * np.mean(right) == pytest.approx(found["overall_accuracy"])
    assert "leave --compare out" in message(
        *("evaluate", exports, "--data", recipe, "--compare", exports, "--predictions", path)
    )


def test_compare_two_models_on_the_same_clips(runs, exports, recipe):
    first, second = runs / "01-reference", exports / "model-int8.onnx"
    found = record("evaluate", first, "--compare", second, "--data", recipe, "--draws", 100)
    alone = record("evaluate", second, "--data", recipe, "--draws", 100)
    assert found["second"] == alone
    test = found["differences"]["accuracy"]
    assert test["difference"] == pytest.approx(alone["accuracy"] - found["first"]["accuracy"])
    assert test["interval"][0] <= test["interval"][1]
    assert 0 < test["p"] <= 1
    clips = (found["second"]["overall_accuracy"] - found["first"]["overall_accuracy"]) / 100 * 18
    assert found["only_second_right"] - found["only_first_right"] == pytest.approx(clips)
    text = answer("evaluate", first, "--compare", second, "--data", recipe, "--draws", 100)
    assert "McNemar's exact test on clips" in text
    assert "bootstrap over recordings of the paired difference" in text


def test_a_file_with_the_front_end_inside_hears_the_clips_themselves(exports, recipe):
    found = [
        record("evaluate", exports / name, "--data", recipe, "--draws", 0)
        for name in ("model-fp32.onnx", "model-fp32-waveform.onnx")
    ]
    assert found[0]["log_loss"] == pytest.approx(found[1]["log_loss"], abs=1e-3)
    assert [one["measured_with"] for one in found] == ["onnxruntime"] * 2


def test_a_bundle_of_files_that_read_waveforms_alone_is_measured_and_held_to_the_budget(runs, recipe, tmp_path):
    place = tmp_path / "edge"
    answer("export", runs / "06-quantize", "--to", place, "--input", "waveform")
    file = place / "model-int8-waveform.onnx"
    bundle, alone = (record("evaluate", one, "--data", recipe, "--draws", 0) for one in (place, file))
    assert bundle["measured_with"] == "onnxruntime"
    assert bundle["log_loss"] == alone["log_loss"]
    found, wanted = record("budget", place), record("budget", file)
    assert (found["param_bytes"], found["macs"]) == (wanted["param_bytes"], wanted["macs"])
    assert found["front_end_bytes"] == wanted["front_end_bytes"] > 0
    assert "configuration" in found["witnesses"]


def test_a_model_does_not_differ_from_itself(exports, recipe):
    found = record("evaluate", exports, "--compare", exports, "--data", recipe, "--draws", 50)
    assert found["mcnemar_p"] == 1
    assert {test["p"] for test in found["differences"].values()} == {1.0}
    assert found["differences"]["accuracy"]["interval"] == [0, 0]


def test_models_that_cannot_be_compared_are_named(exports, recipe, tmp_path):
    from exported import written

    other = written(tmp_path, "fp32")
    text = message("evaluate", exports, "--compare", other, "--data", recipe)
    assert f"{other}: knows airport, bus, metro, park; to be compared it must know" in text
    assert "wanted some, such as 1000" in message(
        "evaluate", exports, "--compare", exports, "--data", recipe, "--draws", 0
    )


def test_one_recording_has_no_intervals(exports, finished, tmp_path):
    name = "metro_station-lyon-1013-40003-0-a.wav"
    (tmp_path / "audio").mkdir()
    shutil.copy(next((finished.tree / "audio").glob("metro_station-lyon-*-a.wav")), tmp_path / "audio" / name)
    found = record("evaluate", exports, "--data", tmp_path)
    assert (found["recordings"], found["draws"], found["intervals"]) == (1, 0, {})
    assert "there is one" in answer("evaluate", exports, "--data", tmp_path)
    words = ("evaluate", exports, "--data", tmp_path, "--compare", exports / "model-fp32.onnx")
    tests = record(*words)["differences"]
    assert tests["accuracy"]["difference"] is not None
    assert {(test["interval"], test["p"]) for test in tests.values()} == {(None, None)}
    text = answer(*words)
    assert "no p and no interval: they are drawn from recordings, and there is one" in text
    assert "draws" not in text


def test_windows_of_a_file_are_one_recording(exports, tmp_path):
    for seed, label in enumerate(("airport", "metro_station")):
        (tmp_path / label).mkdir()
        soundfile.write(tmp_path / label / "long.wav", noise(seed, 0.5, 16_000), 16_000)
    found = json.loads(answer("evaluate", exports, "--data", tmp_path, "--draws", 10, "--json"))
    assert (found["clips"], found["recordings"]) == (10, 2)
