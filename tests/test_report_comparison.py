"""What a report says beyond the road: cost, confusion, signal, time; and several models side by side."""

import copy
import json
import math

import pytest
import torch
from exported import SPEC, model
from tiny_recipe import command

from aum_compress.bundle import golden_inputs
from aum_compress.compress.layer_signal import layer_signal
from aum_compress.errors import AumError, BundleError
from aum_compress.export.onnx_writer import fold_if_needed
from aum_compress.report.charts import Point, scatter_chart
from aum_compress.report.comparison import compared_published, comparison_sections, comparison_verdict
from aum_compress.report.confusion import confusion_section
from aum_compress.report.published import PUBLISHED, TAU_SCENES, published_for
from aum_compress.report.trade_off import Contender, trade_off, trade_off_charts, unbeaten
from aum_compress.report.write import comparison_files, report_files


def test_a_run_says_all_of_it(exports):
    report = json.loads((exports / "report.json").read_text())
    by_stage = {step["stage"]: step for step in report["road"]}
    assert by_stage["int8"]["latency_is"] == "measured"
    assert by_stage["teacher"]["latency_is"] == "estimated"
    assert by_stage["reference"]["latency_ms"] is None, "the estimate knows no CP-Mobile"
    assert all(step["latency_ms"] > 0 for step in report["road"] if step["latency_is"])
    assert sum(map(sum, by_stage["int8"]["test"]["confusion"])) == 18
    assert report["signal"]
    assert all(layer["output_sqnr_db"] > 5 for layer in report["signal"])
    page, text = (exports / "report.html").read_text(), (exports / "report.md").read_text()
    for title in ("Accuracy against cost", "What is taken for what", "What quantising costs"):
        assert title in page
        assert title in text
    assert f"{by_stage['teacher']['latency_ms']:.2f} (estimated)" in text
    assert report["machine"] in text
    assert page.count('<svg class="chart"') == 3 + 2 * len(report["training"])


def test_signal_is_that_of_each_layer_alone_and_of_all_before_it():
    full, quantized = fold_if_needed(model("fp32")), model("int8")
    inputs = torch.from_numpy(golden_inputs(SPEC))
    found = {layer["name"]: layer for layer in layer_signal(full, quantized, inputs)}
    assert "layers.0.mixer.in_proj" in found
    for name, layer in found.items():
        wanted, stored = full.get_submodule(name).weight.detach(), quantized.get_submodule(name)
        kept = stored.weight * stored.weight_scale.view(-1, *[1] * (wanted.dim() - 1))
        error = wanted - (kept if stored.input_factor is None else kept * stored.input_factor.detach())
        assert layer["weight_sqnr_db"] == pytest.approx(20 * math.log10(wanted.norm() / error.norm()), abs=1e-3)
    coarse = copy.deepcopy(quantized)
    coarse.get_submodule("layers.0.mixer.in_proj").weight.div_(16, rounding_mode="trunc").mul_(16)
    worse = {layer["name"]: layer for layer in layer_signal(full, coarse, inputs)}
    assert worse["layers.0.mixer.in_proj"]["weight_sqnr_db"] < found["layers.0.mixer.in_proj"]["weight_sqnr_db"] - 10
    assert worse["head"]["weight_sqnr_db"] == found["head"]["weight_sqnr_db"]
    assert worse["head"]["output_sqnr_db"] < found["head"]["output_sqnr_db"]
    same = copy.deepcopy(quantized)
    assert {layer["output_sqnr_db"] for layer in layer_signal(same, quantized, inputs)} == {None}, "nothing is lost"


def test_published_systems_stand_beside_tau_alone():
    assert published_for("tau", sorted(TAU_SCENES)) == PUBLISHED
    assert published_for("synth", sorted(TAU_SCENES)) == ()
    assert published_for("tau", ["dog", "rain"]) == ()
    assert all(40 < one.accuracy < 70 and one.param_bytes <= 128_000 and one.macs <= 30e6 for one in PUBLISHED)


def test_the_unbeaten_are_those_that_nobody_beats():
    models = [
        Contender("large", 60.0, 200, 200),
        Contender("small", 50.0, 100, 100),
        Contender("worse", 49.0, 100, 150),
        Contender("twin", 50.0, 100, 100),
    ]
    assert unbeaten(models) == {0, 1, 3}
    section = trade_off(models, PUBLISHED[:1])
    rows = [[cell.text for cell in row] for row in section.tables[0].rows]
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5"]
    assert rows[4][1] == PUBLISHED[0].name
    assert rows[4][5].startswith("published, development test")
    charts = trade_off_charts(models, PUBLISHED[:1], (128_000, 30_000_000))
    assert charts.count('class="reference"') == 2
    large = [*models, Contender("teacher", 70.0, 2_000_000, 1)]
    assert "The largest models are left out" in trade_off_charts(large, (), (128_000, 30_000_000))
    assert "The largest" not in charts
    assert trade_off(models[:1], ()) is None
    assert trade_off_charts(models[:1], (), (None, None)) == ""


def test_points_stay_inside_their_frame_and_bad_ones_are_left_out():
    points = [Point(x, y, 0, "1") for x, y in ((1, 0), (1e12, 100), (5, 50), (0, 1), (3, math.nan))]
    chart = scatter_chart(points, "label", "x", 7.0, ("one",))
    assert chart.count("<circle") == 3
    for place in chart.split('cx="')[1:]:
        assert 44 <= float(place.split('"')[0]) <= 348
    assert scatter_chart([Point(0, 1, 0, "1")], "label", "x", None, ()) == ""


def test_confusion_is_shaded_by_row_and_names_the_worst():
    step = {"title": "it", "test": {"confusion": [[8, 2, 0], [0, 0, 0], [5, 0, 5]]}}
    section = confusion_section(step, ["a", "b", "c"])
    assert [[cell.text for cell in row] for row in section.tables[0].rows] == [
        ["a", "8", "2", "", "10"],
        ["b", "", "", "", "0"],
        ["c", "5", "", "5", "10"],
    ]
    assert section.tables[0].rows[0][1].shade == 0.8
    assert section.tables[0].rows[0][1].good
    assert section.paragraphs[1] == "Most often: c heard as a (50%), a heard as b (20%)."
    assert confusion_section(step, ["a", "b"]) is None
    assert confusion_section(None, ["a"]) is None


@pytest.fixture
def side_by_side(exports, runs):
    result = command("report", exports, runs / "06-quantize", runs / "01-reference", "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_models_side_by_side_carry_the_same_figures_in_every_form(side_by_side, exports, runs, tmp_path):
    names = [one["name"] for one in side_by_side["models"]]
    assert names == ["tiny: model-int8.onnx", "tiny: quantize", "tiny: reference"]
    assert [one["verified"] for one in side_by_side["models"]] == [True, None, None]
    assert side_by_side["models"][1]["data_kind"] == "tau"
    files = comparison_files(side_by_side)
    for form in (files["report.html"].decode(), files["report.md"].decode()):
        for one in side_by_side["models"]:
            for key in ("param_bytes", "macs"):
                assert f"{one['step'][key]:,}" in form
            assert f"{one['step']['test']['accuracy']:.1f}" in form
    result = command("report", exports, runs / "06-quantize", "--to", tmp_path / "both")
    assert result.exit_code == 0, result.stderr
    assert "most accurate: " in result.stdout
    assert {path.name for path in (tmp_path / "both").iterdir()} == {"report.html", "report.md", "report.json"}
    assert command("report", exports, runs / "06-quantize", "--to", tmp_path / "both").exit_code == 0, "anew"
    assert "script" not in files["report.html"].decode().split("<body>")[1]


def test_what_does_not_compare_is_said(side_by_side):
    assert comparison_verdict(side_by_side).good is None, "the reference is over its limits as fp32"
    assert any("over their limits: tiny: reference" in fact for fact in comparison_verdict(side_by_side).facts)
    other = copy.deepcopy(side_by_side)
    other["models"][1]["step"]["test"]["clips"] = 19
    assert "tested on different data" in comparison_verdict(other).facts[-1]
    assert not any("most accurate" in fact for fact in comparison_verdict(other).facts)
    other["models"][0]["verified"] = False
    assert comparison_verdict(other).good is False
    assert compared_published(side_by_side) == ()
    for one in other["models"]:
        one["labels"] = sorted(TAU_SCENES)
    assert compared_published(other) == PUBLISHED
    assert comparison_sections(other)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda one: one.update(data_kind="synth"), "kinds of data"),
        (lambda one: one["step"]["test"].update(clips_sha256="of another seed"), "clips"),
        (lambda one: one.update(labels=[*one["labels"][:-1], "zoo"]), "labels"),
    ],
)
def test_models_tested_on_other_clips_do_not_compare(change, said, side_by_side):
    facts = comparison_verdict(side_by_side).facts
    assert any("most accurate: " in fact for fact in facts)
    assert len({one["step"]["test"]["clips_sha256"] for one in side_by_side["models"]}) == 1
    change(side_by_side["models"][1])
    facts = comparison_verdict(side_by_side).facts
    assert facts[-1] == f"tested on different data ({said}): accuracies do not compare"
    assert not any("most accurate" in fact for fact in facts)


def test_older_reports_compare_by_what_they_say(side_by_side):
    side_by_side["models"][0]["step"]["test"]["clips_sha256"] = "of another seed"
    del side_by_side["models"][1]["step"]["test"]["clips_sha256"]
    two = side_by_side | {"models": side_by_side["models"][:2]}
    assert any("most accurate: " in fact for fact in comparison_verdict(two).facts)


def test_a_comparison_is_no_report_of_a_run_and_says_so(exports, runs, tmp_path):
    assert command("report", exports, runs / "06-quantize", "--to", tmp_path / "both").exit_code == 0
    for words in ((tmp_path / "both",), (tmp_path / "both", exports)):
        result = command("report", *words)
        assert result.exit_code == BundleError.exit_code
        assert "shows several models side by side and is no report of a run; open" in result.stderr
        assert "schema_version" not in result.stderr


def test_a_folder_without_a_model_is_named(exports, runs, tmp_path):
    result = command("report", exports, tmp_path)
    assert result.exit_code == BundleError.exit_code
    assert str(tmp_path) in result.stderr
    early = json.loads((exports / "report.json").read_text()) | {"road": [], "budget": None}
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "report.json").write_text(json.dumps(early))
    result = command("report", exports, tmp_path / "early")
    assert result.exit_code == AumError.exit_code
    assert "has no model in it yet" in result.stderr
    result = command("report", exports, "--to", runs)
    assert "wanted a new folder" in result.stderr


def test_an_older_report_can_be_written_anew(exports, tmp_path):
    report = json.loads((exports / "report.json").read_text())
    for key in ("signal", "machine"):
        del report[key]
    for step in report["road"]:
        for key in ("latency_ms", "latency_is"):
            del step[key]
        for key in ("confusion", "ece", "by_device_group"):
            step["test"].pop(key, None)
    assert b"What is taken for what" not in report_files(report)["report.html"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "report.json").write_text(json.dumps(report))
    assert command("report", tmp_path / "old", "--to", tmp_path / "new").exit_code == 0
    assert (tmp_path / "new" / "report.html").is_file()
