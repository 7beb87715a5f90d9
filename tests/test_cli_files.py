"""Verbs that make, prove and use files: verify, predict, evaluate, export, report."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile
from answers import answer, message, record
from audio_trees import noise
from onnx import numpy_helper
from tiny_recipe import command

from aum_compress.bundle import file_sha256, read_bundle
from aum_compress.export.ort_format import operator_names
from aum_compress.export.runtime import open_session, read_metadata

STAGES = ("01-reference", "02-teacher", "04-distill", "05-prune", "06-quantize", "07-export")


pytestmark = pytest.mark.usefixtures("cache_of_finished")


# --- verify


def altered(path: Path, target: Path) -> Path:
    """A copy of an ONNX file in which the sign of its largest weight is the other one."""
    model = onnx.load(path)
    weight = max(model.graph.initializer, key=lambda tensor: numpy_helper.to_array(tensor).size)
    values = numpy_helper.to_array(weight).copy()
    place = np.unravel_index(np.abs(values.astype(np.float32)).argmax(), values.shape)
    values[place] = -values[place]
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    target.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, target)
    return target


def test_verify_the_whole_export(exports):
    text = answer("verify", exports)
    assert text.count("PASSED") == 6
    found = record("verify", exports)
    assert [(item["file"], item["passed"]) for item in found] == [
        (f"model-{precision}{reads}.onnx", True)
        for precision in ("fp16", "fp32", "int8")
        for reads in ("-waveform", "")
    ]


@pytest.mark.parametrize(("precision", "bundle"), [("int8", "06-quantize"), ("fp16", "05-prune"), ("fp32", "05-prune")])
def test_verify_against_the_bundle_and_recordings(runs, exports, finished, precision, bundle):
    wavs = sorted((finished.tree / "audio").iterdir())[:2]
    (found,) = record(
        *("verify", exports / f"model-{precision}.onnx", "--reference", runs / bundle),
        *(word for wav in wavs for word in ("--wav", wav)),
    )
    assert found["passed"]
    assert [check["n_inputs"] for check in found["checks"] if check["name"].startswith("clips")] == [2, 2]
    assert "torch model" in found["reference"]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_one_flipped_weight_is_exit_4(runs, exports, tmp_path, precision):
    reference = runs / ("06-quantize" if precision == "int8" else "05-prune")
    path = altered(exports / f"model-{precision}.onnx", tmp_path / "model.onnx")
    result = command("verify", path, "--reference", reference)
    assert result.exit_code == 4, result.stdout
    assert "FAILED in" in result.stdout
    assert f"error: {path}: is not what" in result.stderr
    assert not record("verify", path, "--reference", reference, code=4)[0]["passed"]


def test_flipped_weight_is_found_by_golden_logits_alone(exports, tmp_path):
    path = altered(exports / "model-fp32.onnx", tmp_path / "model-fp32.onnx")
    shutil.copy(exports / "golden.npz", tmp_path)
    assert "golden" in command("verify", path).stderr
    assert command("verify", path).exit_code == 4


def test_verify_holds_the_accuracy_on_labelled_clips(runs, exports, recipe, tmp_path):
    path, reference = exports / "model-fp32.onnx", runs / "05-prune"
    (found,) = record("verify", path, "--reference", reference, "--data", recipe)
    check = found["checks"][-1]
    assert check["name"] == "accuracy on tiny.yaml"
    assert check["passed"]
    assert check["accuracy"] == check["reference_accuracy"]
    wrong = onnx.load(path)
    (head,) = (tensor for tensor in wrong.graph.initializer if tensor.name == "head.weight")
    head.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(head), head.name))
    onnx.save(wrong, tmp_path / "wrong.onnx")
    (found,) = record("verify", tmp_path / "wrong.onnx", "--reference", reference, "--data", recipe, code=4)
    assert found["checks"][-1]["accuracy"] != check["accuracy"]
    assert "--data" in message("verify", path, "--data", recipe)


def test_a_reference_judges_the_files_of_a_folder_that_it_can(runs, exports):
    words = ("verify", exports, "--reference", runs / "05-prune")
    found = record(*words)
    float_files = [f"model-{precision}{reads}.onnx" for precision in ("fp16", "fp32") for reads in ("-waveform", "")]
    assert [item["file"] for item in found if item["verdict"] == "passed"] == float_files
    assert all(item["reference"] == "the torch model and golden logits" for item in found if item["passed"])
    others = [item for item in found if item["verdict"] == "not judged"]
    assert [item["file"] for item in others] == ["model-int8-waveform.onnx", "model-int8.onnx"]
    assert all(item.keys() == found[0].keys() and item["passed"] is None for item in others)
    text = answer(*words)
    assert text.count("PASSED") == 4
    assert "model-int8.onnx (int8): not judged: no reference holds int8; give the bundle" in text


def test_references_of_each_kind_judge_a_whole_folder_on_clips_too(runs, exports, finished):
    references = ("--reference", runs / "06-quantize", "--reference", runs / "05-prune")
    found = record("verify", exports, *references, "--data", finished.tree)
    assert [item["verdict"] for item in found] == ["passed"] * 6
    accuracies = [item["checks"][-1] for item in found]
    assert {check["name"] for check in accuracies} == {f"accuracy on {finished.tree.name}"}
    assert len({check["reference_accuracy"] for check in accuracies[:4]}) == 1
    assert len({check["reference_accuracy"] for check in accuracies[4:]}) == 1
    twice = message("verify", exports, "--reference", runs / "05-prune", "--reference", runs / "04-distill")
    assert f"04-distill: holds fp32, and files of it are judged by {runs / '05-prune'} already" in twice


def test_a_wrong_file_of_a_folder_is_exit_4_whatever_is_not_judged(runs, copied):
    exports = copied / "exports" / "tiny"
    altered(exports / "model-fp32.onnx", exports / "model-fp32.onnx")
    card = json.loads((exports / "bundle.json").read_text())
    card["files"]["model-fp32.onnx"] = file_sha256(exports / "model-fp32.onnx")
    (exports / "bundle.json").write_text(json.dumps(card))
    found = record("verify", exports, "--reference", runs / "05-prune", code=4)
    assert [(item["file"], item["verdict"]) for item in found if item["verdict"] != "passed"] == [
        ("model-fp32.onnx", "failed"),
        ("model-int8-waveform.onnx", "not judged"),
        ("model-int8.onnx", "not judged"),
    ]


def test_verify_says_what_it_cannot_judge(runs, exports):
    assert "holds no ONNX file; aum-compress export" in message("verify", runs / "05-prune")
    wrong = message("verify", exports / "model-int8.onnx", "--reference", runs / "05-prune")
    assert "holds fp32: no reference for a file of int8" in wrong
    assert "none.wav" in message("verify", exports / "model-int8.onnx", "--wav", "none.wav")


# --- predict, evaluate


def test_predict_answers_all_but_the_missing_file(exports, tmp_path):
    soundfile.write(tmp_path / "long.wav", noise(0, 0.35, channels=2), 44_100, subtype="PCM_24")
    soundfile.write(tmp_path / "short.flac", noise(1, 0.05, 8000), 8000)
    words = (
        "predict",
        exports / "model-int8.onnx",
        tmp_path / "long.wav",
        tmp_path / "no.wav",
        tmp_path / "short.flac",
    )
    text = answer(*words, code=2).splitlines()
    assert text[0] == str(tmp_path / "long.wav")
    assert [line.split()[:2] for line in text[1:5]] == [["0.00", "s"], ["0.10", "s"], ["0.20", "s"], ["0.25", "s"]]
    assert text[5].split()[0] == "vote"
    assert text[6] == str(tmp_path / "short.flac")
    assert len(text) == 8
    assert f"error: {tmp_path / 'no.wav'}: an audio file was wanted, there is no such file" in command(*words).stderr
    found = record(*words, code=2)
    assert [Path(item["file"]).name for item in found] == ["long.wav", "short.flac"]
    assert sum(found[0]["vote"].values()) == pytest.approx(1, abs=1e-5)
    assert len(found[0]["windows"]) == 4


def test_evaluate_bundle_and_file_agree_with_the_report(runs, exports, recipe, finished):
    rows = {row["stage"]: row["test"] for row in finished.outcome.report["road"]}
    torch = record("evaluate", runs / "05-prune", "--data", recipe)
    file = record("evaluate", exports / "model-fp32.onnx", "--data", recipe)
    shipped = record("evaluate", exports, "--data", recipe)
    assert (torch["measured_with"], file["measured_with"]) == ("torch", "onnxruntime")
    assert torch["accuracy"] == file["accuracy"] == rows["prune"]["accuracy"]
    assert torch["log_loss"] == pytest.approx(file["log_loss"], abs=1e-4)
    assert shipped["log_loss"] == pytest.approx(rows["int8"]["log_loss"], abs=1e-6)
    assert set(file["by_device"]) == {"a", "s1", "s4"}
    assert {"seen", "unseen"} <= file.keys()


def test_evaluate_on_a_folder_of_audio(runs, exports, finished):
    bundle = record("evaluate", runs / "06-quantize", "--data", finished.tree)
    file = record("evaluate", exports / "model-int8.onnx", "--data", finished.tree)
    assert bundle["clips"] == file["clips"] == 90
    assert bundle["log_loss"] == pytest.approx(file["log_loss"], abs=0.05)
    assert abs(bundle["overall_accuracy"] - file["overall_accuracy"]) <= 100 * 5 / 90
    assert "unseen" not in file, "which devices training has heard is not known from a folder"
    text = answer("evaluate", exports / "model-int8.onnx", "--data", finished.tree)
    assert "90 clips" in text
    assert "street_traffic" in text


def test_evaluate_says_what_it_cannot_measure(exports, tmp_path):
    model = exports / "model-int8.onnx"
    assert "--data: no folder of audio there, and" in message("evaluate", model, "--data", tmp_path / "none")
    for seed, name in enumerate(("cat", "dog")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        soundfile.write(tmp_path / "pets" / name / "1.wav", noise(seed), 44_100)
    text = message("evaluate", model, "--data", tmp_path / "pets")
    assert "has labels that" in text
    assert "  - cat\n  - dog" in text


# --- export, report


def test_export_of_a_float_bundle(runs, tmp_path):
    to = tmp_path / "new"
    text = answer("export", runs / "05-prune", "--to", to, "--precision", "fp16")
    assert text == f"{to / 'model-fp16.onnx'}  verified\n{to / 'model-fp16-waveform.onnx'}  verified\n"
    assert read_bundle(to).card.parent.sha256 == read_bundle(runs / "05-prune").sha256
    assert record("verify", to, "--reference", runs / "05-prune")[0]["passed"]
    source, card, path = read_bundle(runs / "05-prune").card, read_bundle(to).card, to / "model-fp16.onnx"
    measured = record("budget", path)
    assert card.budget["param_bytes"] == measured["param_bytes"] < source.budget["param_bytes"]
    assert card.budget["limits"] == source.budget["limits"]
    metadata = read_metadata(open_session(path), path)
    assert metadata.metrics == {"stage": "prune", "accuracy": source.metrics["test"]["accuracy"]}
    assert metadata.recipe_sha256 == file_sha256(to / "recipe.yaml") == source.files["recipe.yaml"]
    compared = record("report", to, runs / "05-prune")["models"]
    assert [model["step"]["param_bytes"] for model in compared] == [
        card.budget["param_bytes"],
        source.budget["param_bytes"],
    ]


def test_export_of_an_int8_bundle_is_the_file_that_shipped(runs, exports, finished, tmp_path):
    to = tmp_path / "new"
    text = answer("export", runs / "06-quantize", "--to", to, "--input", "features")
    assert text == f"{to / 'model-int8.onnx'}  verified\n"
    wav = sorted((finished.tree / "audio").iterdir())[0]
    again, shipped = (record("predict", folder / "model-int8.onnx", wav)[0]["vote"] for folder in (to, exports))
    assert again == pytest.approx(shipped, abs=1e-6)


def test_export_refuses_what_would_be_wrong(runs, tmp_path, monkeypatch):
    to = tmp_path / "new"
    assert "holds fp32 and exports as fp32 and fp16, not int8" in message(
        *("export", runs / "05-prune", "--to", to, "--precision", "int8")
    )
    assert "holds int8 and exports as int8, not fp16" in message(
        *("export", runs / "06-quantize", "--to", to, "--precision", "fp16")
    )
    rate_of_nothing = message("export", runs / "05-prune", "--to", to, "--input", "features", "--input-rate", "48000")
    assert "--input-rate: is of files that read waveforms" in rate_of_nothing
    assert not to.exists()


def test_front_end_is_put_into_an_exported_file(exports, tmp_path):
    to = tmp_path / "new"
    source = exports / "model-int8.onnx"
    text = answer("export", source, "--to", to, "--input", "waveform", "--input-rate", "48000")
    assert text == f"{to / 'model-int8-waveform.onnx'}  verified\n"
    assert onnx.load(to / "model-int8-waveform.onnx").graph.input[0].name == "waveform"
    assert "| `model-int8-waveform.onnx` | waveform |" in (to / "MODEL_CARD.md").read_text()
    proof = answer("verify", to / "model-int8-waveform.onnx")
    assert "PASSED" in proof
    assert "note golden logits alone: labels, values of the front-end and each weight by itself" in proof
    assert "only gets its front-end inside" in message("export", source, "--to", to, "--precision", "int8")
    assert "reads waveform already" in message("export", exports / "model-int8-waveform.onnx", "--to", to)


def test_a_wrong_file_gets_no_front_end(exports, tmp_path):
    """Golden arrays are beside the source, not beside what is made of it."""
    to, source = tmp_path / "new", altered(exports / "model-fp32.onnx", tmp_path / "model-fp32.onnx")
    words = ("export", source, "--to", to, "--input", "waveform")
    assert answer(*words).endswith(
        "-waveform.onnx  front-end verified; no golden.npz beside model-fp32.onnx says whether its model is right\n"
    )
    assert {path.name for path in to.iterdir()} == {"model-fp32-waveform.onnx", "MODEL_CARD.md"}
    shutil.rmtree(to)
    shutil.copy(exports / "golden.npz", tmp_path)
    assert f"{source}: is not what golden logits says" in message(*words, code=4)
    assert list(to.iterdir()) == []


def test_a_front_end_that_fails_leaves_no_file(exports, tmp_path, monkeypatch):
    def write(source, target, rate):
        target.write_bytes((exports / "model-fp16-waveform.onnx").read_bytes())

    monkeypatch.setattr("aum_compress.exporting.write_waveform_file", write)
    to = tmp_path / "new"
    text = message("export", exports / "model-fp32.onnx", "--to", to, "--input", "waveform", code=4)
    assert f"{to / 'model-fp32-waveform.onnx'}: is not what golden logits says" in text
    assert list(to.iterdir()) == []


def test_single_files_are_never_written_into_a_bundle(exports):
    for words in (("--input", "waveform"), ("--format", "ort")):
        text = message("export", exports / "model-int8.onnx", "--to", exports, *words)
        assert "is a bundle, whose files never change" in text
    taken = message("export", exports / "model-int8.onnx", "--to", exports / "report.json", "--format", "ort")
    assert "no folder can be made there" in taken


def test_operators_of_files_in_one_folder_come_together(exports, tmp_path):
    to, listed = tmp_path / "new", []
    for name in ("model-int8-waveform.onnx", "model-fp32.onnx"):
        answer("export", exports / name, "--to", to, "--format", "ort")
        listed.append(operator_names((to / "required_operators.config").read_text()))
    assert set(listed[0]) < set(listed[1]), "the second file does not drop what the first one runs"


def test_export_in_the_format_of_onnxruntime(runs, exports, tmp_path):
    to = tmp_path / "new"
    text = answer("export", runs / "06-quantize", "--to", to, "--format", "ort")
    assert f"{to / 'model-int8-waveform.ort'}  equal to it\n" in text
    assert re.search(r"required_operators\.config  \d\d operators: A", text)
    card = read_bundle(to).card
    assert {"model-int8.ort", "model-int8-waveform.ort", "required_operators.config", "MODEL_CARD.md"} <= set(
        card.files
    )
    alone = tmp_path / "alone"
    text = answer("export", exports / "model-int8.onnx", "--to", alone, "--format", "ort")
    assert text.startswith(f"{alone / 'model-int8.ort'}  equal to model-int8.onnx\n")
    assert sorted(path.name for path in alone.iterdir()) == ["model-int8.ort", "required_operators.config"]


def test_export_never_replaces_a_folder_of_other_things(runs, tmp_path, monkeypatch):
    (tmp_path / "thesis.txt").write_text("three years")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("aum_compress.exporting.export_onnx", _write_nothing)
    monkeypatch.setattr("aum_compress.exporting.write_waveform_file", _write_nothing)
    monkeypatch.setattr("aum_compress.exporting.model_card", lambda files: "")
    monkeypatch.setattr("aum_compress.exporting.verify_onnx", lambda path, reference: _Passed())
    for to in (".", tmp_path, tmp_path / "thesis.txt"):
        assert "holds something other than a bundle" in message("export", runs / "06-quantize", "--to", to)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_export_never_replaces_a_model(copied, tmp_path):
    runs = copied / "runs" / "tiny"
    source, other = runs / "06-quantize", runs / "05-prune"
    before = {path: path.read_bytes() for path in (*source.iterdir(), *other.iterdir())}
    words = ("export", source, "--input", "features", "--to")
    shutil.copytree(copied / "exports" / "tiny", tmp_path / "new")
    assert "is the bundle to be exported, which would be lost" in message(*words, source / ".." / "06-quantize")
    assert "holds the model of stage prune of recipe tiny, which would be lost" in message(*words, other)
    assert {path: path.read_bytes() for path in before} == before
    answer(*words, tmp_path / "new")  # an earlier export is replaced
    assert read_bundle(tmp_path / "new").card.inputs_sha256 == "", "no recipe takes it for its own stage's result"


def _write_nothing(source, target, *_, **__) -> None:
    target.write_bytes(b"")


class _Passed:
    def enforce(self) -> None:
        pass


def test_report_again(exports, runs, finished):
    assert record("report", exports) == json.loads((exports / "report.json").read_text())
    text = answer("report", exports)
    for row in finished.outcome.report["road"]:
        assert f"{row['param_bytes']:,}" in text
        assert row["title"] in text
    assert "Within budget, every exported file verified" in text
    assert record("report", runs)["gated"] == "model-int8.onnx", "the run's own folder has it as well"


def test_report_that_is_not_there(tmp_path):
    assert "such as exports/quickstart" in message("report", tmp_path)
