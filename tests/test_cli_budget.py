"""`aum-compress budget`: every option, what it refuses, exit codes and JSON keys. The planner's are in test_plan."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from answers import answer, message, record
from exported import written
from onnx_text import graph
from rich.console import Console
from tiny_recipe import command

from aum_compress.budget.check_onnx import check_onnx
from aum_compress.budget.limits import RULES
from aum_compress.bundle import read_bundle
from aum_compress.report.budget_compare import compare_table

REPORT_KEYS = {
    *("verdict", "param_bytes", "params", "wide_params", "macs", "macs_per_clip", "clip_seconds", "witnesses"),
    *(
        "elementwise",
        "dcase_bytes",
        "dcase_macs",
        "front_end_macs",
        "front_end_bytes",
        "peak_activation_bytes",
        "file_bytes",
    ),
    *("limits", "notes", "layers"),
}


pytestmark = pytest.mark.usefixtures("cache_of_finished")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The small model's file in each precision."""
    folder = tmp_path_factory.mktemp("files")
    return {precision: written(folder, precision) for precision in ("fp32", "fp16", "int8")}


def graph_file(path: Path, text: str, **weights: np.ndarray) -> Path:
    """An ONNX file of operators from `text`, with initialisers."""
    onnx.save(graph(text, **weights), path)
    return path


@pytest.fixture
def open_dims(tmp_path) -> Path:
    """A file of another maker whose input has an open axis besides the batch."""
    weight = np.ones((6, 5), np.float32)
    text = "g (float[n,time,6] x) => (float[n,time,5] y) { y = MatMul (x, w) }"
    return graph_file(tmp_path / "open.onnx", text, w=weight)


# --- what can be named


def test_a_preset_has_the_published_dcase_figure():
    found = record("budget", "cp-mobile", code=3)
    assert found["dcase_macs"] == 29_419_156
    assert found["dcase_bytes"] == 4 * 61_148
    assert found["param_bytes"] > found["dcase_bytes"], "batch statistics are stored too"
    assert found["macs"] < 30_000_000
    assert found["verdict"] == "over"


def test_json_has_the_same_keys_for_presets_bundles_and_files(runs, files):
    for target, code in (("cp-mobile", 3), (runs / "06-quantize", 0), (files["int8"], 0)):
        found = record("budget", target, code=code)
        assert set(found) == REPORT_KEYS
        assert found["limits"] == {"max_param_bytes": 128_000, "max_macs": 30_000_000}
        assert set(found["layers"][0]) == {
            *("name", "kind", "param_bytes", "params", "wide_params", "macs", "elementwise")
        }


def test_a_bundle_and_its_file_are_the_same(runs, exports):
    bundle, file = record("budget", runs / "06-quantize"), record("budget", exports / "model-int8.onnx")
    assert bundle["macs"] == file["macs"] == read_bundle(runs / "06-quantize").card.budget["macs"]
    assert bundle["param_bytes"] == file["param_bytes"]
    assert bundle["dcase_macs"]
    assert file["dcase_macs"] is None, "there is no torch model to show to torchinfo"
    assert record("budget", exports / "model-fp32.onnx")["macs"] == file["macs"]


def test_nothing_of_that_name_lists_the_presets(tmp_path):
    assert "presets: aum-tiny, aum-small, aum-base, student, student-int8, " in message("budget", "cp-mobil")
    assert "not a bundle: no bundle.json in it" in message("budget", tmp_path)
    assert "no such file" in message("budget", tmp_path / "absent.onnx")


def test_a_file_that_was_cut_short_is_refused(files, tmp_path):
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(files["fp32"].read_bytes()[:-20])
    assert "cut.onnx: not an ONNX file, or one that was cut short" in message("budget", cut)


def test_help_shows_both_ways_and_check_is_the_default(files):
    text = answer("budget", "--help")
    assert "aum-compress budget MODEL..." in text
    assert "aum-compress budget plan" in text
    assert answer("budget", files["int8"]) == answer("budget", "check", files["int8"])
    assert answer("budget", "--layers", files["int8"]) == answer("budget", "check", "--layers", files["int8"])
    assert "plan: no such bundle" in message("budget", "./plan")


# --- limits


def test_over_names_the_largest_layers():
    result = command("budget", "cp-mobile")
    assert result.exit_code == 3
    assert (
        "255,424 bytes of parameters, budget is 128,000 (over by 127,424); largest: features.7.layers.2.0 49,920"
        in result.stderr
    )
    assert "OVER by 127,424" in result.stdout
    within = answer("budget", "cp-mobile", "--max-param-bytes", 255_424, "--max-macs", 29_416_448)
    assert "within, 0 left" in within
    assert command("budget", "cp-mobile", "--max-param-bytes", 255_424, "--max-macs", 29_416_447).exit_code == 3


def test_one_byte_over_is_exit_3_and_names_its_largest_layers(files):
    found = record("budget", files["int8"])
    largest = max(found["layers"], key=lambda layer: layer["param_bytes"])
    answer("budget", files["int8"], "--max-param-bytes", found["param_bytes"])
    result = command("budget", files["int8"], "--max-param-bytes", found["param_bytes"] - 1)
    assert result.exit_code == 3
    assert f"(over by 1); largest: {largest['name']} {largest['param_bytes']:,}" in result.stderr


def test_named_limits(files):
    assert set(RULES) == {"dcase2025", "dcase2024", "dcase2022"}
    for name in ("dcase2025", "dcase2024"):
        found = record("budget", files["fp32"], "--limit", name)["limits"]
        assert found == {"max_param_bytes": 128_000, "max_macs": 30_000_000}
    changed = record("budget", files["fp32"], "--limit", "dcase2024", "--max-macs", 10_000_000)["limits"]
    assert changed == {"max_param_bytes": 128_000, "max_macs": 10_000_000}
    assert "no limit is named 'dcase2021'; there are dcase2025, dcase2024, dcase2022" in message(
        "budget", files["fp32"], "--limit", "dcase2021"
    )


def test_dcase2022_limits_parameters_and_their_width(files):
    result = command("budget", files["fp32"], "--limit", "dcase2022")
    assert result.exit_code == 3
    found = record("budget", files["fp32"], "--limit", "dcase2022", code=3)
    assert found["limits"] == {"max_macs": 30_000_000, "max_params": 128_000, "int8_weights": True}
    assert f"{found['wide_params']:,} values of weights are stored in more than 8 bits, and int8" in result.stderr
    assert "param bytes: " in result.stdout
    assert "(not limited)" in result.stdout
    assert f"parameters: {found['params']:,} of 128,000" in result.stdout
    int8 = record("budget", files["int8"], "--limit", "dcase2022", code=3)
    state_matrices = convolutions = 2 * 32 * 4  # 4 taps are as small in float16 unless `layers` says int8
    assert int8["wide_params"] == state_matrices + convolutions, "biases, norms and scales may be wider"


def test_dcase2022_is_passed_by_int8_and_counts_values_not_bytes(tmp_path):
    # two million bytes would be over in any other year; biases of four bytes are what the year's own baseline has
    text = "g (float[1,6] x) => (float[1,5] y) { q = DequantizeLinear (w, s) p = MatMul (x, q) y = Add (p, b) }"
    scale, bias = np.float32(0.1).reshape(()), np.ones(5, np.float32)
    path = graph_file(tmp_path / "int8.onnx", text, w=np.ones((6, 5), np.int8), s=scale, b=bias)
    assert "weights stored in more than 8 bits: 0 values: within" in answer("budget", path, "--limit", "dcase2022")


# --- what is shown


def test_layers_are_a_table_of_all(runs):
    lines = answer("budget", runs / "06-quantize", "--layers").splitlines()
    found = record("budget", runs / "06-quantize")
    table = [line.split() for line in lines[: lines.index(next(line for line in lines if "param bytes" in line))]]
    names = [layer["name"] or "(the" for layer in found["layers"]]
    assert [row[0] for row in table] == ["layer", *names, "total"], "a line a layer where there is no terminal"
    assert {f"{found['param_bytes']:,}", f"{found['macs_per_clip']:,}"} <= set(table[-1])


def test_top_shows_the_largest_and_sums_up_the_rest(files):
    lines = answer("budget", files["fp32"], "--top", 2).splitlines()
    found = record("budget", files["fp32"])
    largest = max(found["layers"], key=lambda layer: layer["param_bytes"])["name"]
    assert largest in {line.split()[0] for line in lines[1:3]}
    assert lines[3].split()[:2] == [str(len(found["layers"]) - 2), "others"]
    assert f"{found['param_bytes']:,}" in lines[4]
    assert "%" in lines[1]
    assert "Invalid value for '--top'" in command("budget", files["fp32"], "--top", 0).stderr


def test_all_that_is_not_gated_is_shown_and_labelled(runs, files):
    text = answer("budget", runs / "06-quantize")
    assert "what DCASE's script prints: " in text
    assert "elementwise operations a clip: " in text
    for what in ("exp", "silu", "quantize"):
        assert f"{what} " in text.split("elementwise operations a clip: ")[1]
    assert "(outside the budget)" in text
    file, found = answer("budget", files["int8"]), record("budget", files["int8"])
    assert f"file: {files['int8'].stat().st_size:,} bytes (not gated)" in file
    assert f"peak activations: {found['peak_activation_bytes']:,} bytes" in file


# --- packs


def test_a_folder_of_models_is_a_pack_of_which_the_largest_decides(files):
    folder = files["fp32"].parent
    found = record("budget", folder)
    assert set(found) == {
        *("verdict", "param_bytes", "macs", "largest_by_bytes", "largest_by_macs", "models_over", "models"),
    }
    assert list(found["models"]) == [str(files[name]) for name in ("fp16", "fp32", "int8")]
    assert found["largest_by_bytes"] == str(files["fp32"])
    assert found["param_bytes"] == record("budget", files["fp32"])["param_bytes"]
    text = answer("budget", folder)
    assert "within: every model fits on its own" in text
    assert text == answer("budget", files["fp16"], files["fp32"], files["int8"])
    assert answer("budget", folder, "--layers").count("MACs counted alike by") == 3


def test_a_pack_with_one_model_over_is_exit_3_and_names_it(files):
    limit = record("budget", files["fp16"])["param_bytes"]
    result = command("budget", files["fp32"].parent, "--max-param-bytes", limit)
    assert result.exit_code == 3
    assert "1 of 3 models of the pack" in result.stderr
    assert f"{files['fp32']}: " in result.stderr
    assert f"OVER: {files['fp32']}" in result.stdout


def test_bundles_in_a_folder_are_a_pack(runs, tmp_path):
    for device in ("a", "s1"):
        shutil.copytree(runs / "06-quantize", tmp_path / device)
    assert list(record("budget", tmp_path)["models"]) == [str(tmp_path / "a"), str(tmp_path / "s1")]


# --- comparison


def test_compare_shows_what_the_second_model_costs_more(files):
    text = answer("budget", "--compare", files["fp32"], files["int8"])
    old, new = (record("budget", files[name]) for name in ("fp32", "int8"))
    total = next(line for line in text.splitlines() if line.split()[0] == "total")
    assert {f"{old['param_bytes']:,}", f"{new['param_bytes']:,}"} <= set(total.split())
    assert f"{new['param_bytes'] - old['param_bytes']:+,}" in total
    assert f"param bytes: {old['param_bytes']:,} -> {new['param_bytes']:,} (" in text
    found = record("budget", "--compare", files["fp32"], files["int8"])
    assert set(found) == {"verdict", "before", "after", "param_bytes_difference", "macs_difference", "layers"}
    assert (found["before"]["name"], found["after"]["name"]) == (str(files["fp32"]), str(files["int8"]))
    assert found["macs_difference"] == 0
    sizes = [abs(layer["param_bytes_difference"]) for layer in found["layers"]]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(layer["param_bytes_difference"] for layer in found["layers"]) == found["param_bytes_difference"]


def test_compare_holds_the_second_model_to_the_limits(files):
    limit = record("budget", files["fp16"])["param_bytes"]
    words = ("budget", "--compare", "--max-param-bytes", limit)
    answer(*words, files["fp32"], files["fp16"])
    assert command(*words, files["fp16"], files["fp32"]).exit_code == 3
    assert f"B is OVER {limit:,}" in command(*words, files["fp16"], files["fp32"]).stdout


def test_compare_names_layers_that_one_model_lacks_and_shortens(files):
    found = record("budget", "--compare", files["fp32"], "student", "--max-param-bytes", 10**7)
    assert any(layer["name"].startswith("layers.1.") for layer in found["layers"])
    lines = answer("budget", "--compare", files["fp32"], "student", "--max-param-bytes", 10**7, "--top", 2).splitlines()
    assert any(line.strip().startswith(f"total ({len(found['layers']) - 2} rows left out)") for line in lines)
    assert any(line.startswith("note: MACs by layer are for clips of 0.5 s and 1 s") for line in lines)


def test_compare_wants_two(files):
    assert "--compare: found 1 models, wanted two" in message("budget", "--compare", files["fp32"])


def test_tables_are_drawn_on_a_terminal(files):
    console = Console(width=160, force_terminal=True)
    with console.capture() as capture:
        console.print(compare_table(check_onnx(files["fp32"]), check_onnx(files["int8"])))
    assert "│" in capture.get()


# --- how a file is read


def test_open_dimensions_want_a_size(open_dims):
    error = message("budget", open_dims)
    assert "time" in error
    assert "--dim NAME=SIZE" in error
    assert record("budget", open_dims, "--dim", "time=10")["macs"] == 10 * 30
    assert record("budget", open_dims, "--dim", "time=10", "--dim", "n=2")["macs"] == 2 * 10 * 30
    assert "no input has a dimension named tim" in message("budget", open_dims, "--dim", "time=1", "--dim", "tim=1")


@pytest.mark.parametrize("word", ["time", "time=", "=3", "time=0", "time=-1", "time=1.5", "time=x"])
def test_dimensions_of_another_form_are_refused(open_dims, word):
    assert f"--dim {word}: wanted NAME=COUNT" in message("budget", open_dims, "--dim", word)
    assert f"--trips {word}: wanted NAME=COUNT" in message("budget", open_dims, "--trips", word)


def test_clip_seconds_are_of_files_and_presets(open_dims):
    assert record("budget", open_dims, "--dim", "time=10", "--clip-seconds", 10)["macs"] == 30
    preset = record("budget", "cp-mobile", "--clip-seconds", 2, "--max-param-bytes", 10**6)
    assert preset["clip_seconds"] == 2
    assert preset["macs"] <= record("budget", "cp-mobile", code=3)["macs"]


def test_a_loop_is_given_its_trips(tmp_path):
    text = """g (float[2] x, int64 n, bool go) => (float[2] y) {
        y = Loop <body = b (int64 i, bool c, float[2] h) => (bool k, float[2] o) {
            k = Identity (c)  o = Mul (h, h)
        }> (n, go, x)
    }"""
    path = graph_file(tmp_path / "loop.onnx", text)
    assert "--trips" in message("budget", path)
    assert record("budget", path, "--trips", "y=7")["macs"] == 7 * 2, "a product in a loop is a step of a recurrence"


def test_options_that_are_not_for_a_target_are_refused(runs, files):
    assert "--dim cannot be used with a preset" in message("budget", "student", "--dim", "n=1")
    assert "--classes cannot be used with an ONNX file" in message("budget", files["fp32"], "--classes", 4)
    refused = message("budget", runs / "06-quantize", "--clip-seconds", 2, "--classes", 4)
    assert "--clip-seconds, --classes cannot be used with a bundle" in refused
    assert record("budget", "student", "--classes", 4, "--max-param-bytes", 10**6)["layers"][-1]["params"] == 4 * 65


def test_where_each_byte_of_a_file_goes(finished):
    files = [finished.outcome.folder / f"model-int8{reads}.onnx" for reads in ("", "-waveform")]
    found = record("budget", *files, "--bytes")
    assert {name: sum(parts.values()) for name, parts in found.items()} == {
        str(path): path.stat().st_size for path in files
    }
    text = answer("budget", files[1], "--bytes")
    assert "function LogMel" in text
    assert f"{files[1].stat().st_size:,}" in text
    assert "--bytes: aum-small is no .onnx file" in message("budget", "aum-small", "--bytes")
