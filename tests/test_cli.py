"""Every verb of the command line: results on stdout, logs on stderr, exit codes, JSON keys."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile
import typer
import yaml
from answers import answer, message, record
from audio_trees import noise
from onnx import numpy_helper
from tiny_recipe import command, raw_recipe, tiny_process, write_recipe

import aum_compress
from aum_compress.bundle import read_bundle
from aum_compress.cli import app
from aum_compress.recipe import recipes_folder

STAGES = ("01-reference", "02-teacher", "04-distill", "05-prune", "06-quantize", "07-export")


pytestmark = pytest.mark.usefixtures("cache_of_finished")


@pytest.fixture
def recipe(finished, tmp_path) -> Path:
    return write_recipe(tmp_path, finished.tree)


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished.out, tmp_path / "copy"))


def verbs(group=None, path: tuple[str, ...] = ()):
    """Every command and group of commands with its path."""
    group = group or typer.main.get_command(app)
    yield path, group
    for name, inner in getattr(group, "commands", {}).items():
        yield from verbs(inner, (*path, name))


# --- help, version, recipes


@pytest.mark.parametrize("path", [path for path, _ in verbs()], ids=" ".join)
def test_help_names_every_argument_option_and_verb(path):
    verb = dict(verbs())[path]
    text = answer(*path, "--help")
    assert text.startswith(f"Usage: {' '.join(('aum-compress', *path))}")
    for parameter in verb.params:
        wanted = parameter.opts if parameter.param_type_name == "option" else [parameter.metavar]
        assert all(word in text for word in wanted), parameter.name
        if parameter.param_type_name == "argument":
            assert parameter.metavar.isupper() or parameter.metavar == "MODEL.onnx" or "|" in parameter.metavar
    assert all(f"\n  {name} " in text for name in getattr(verb, "commands", {}))


def test_version():
    assert answer("--version") == f"{aum_compress.__version__}\n"


def test_no_verb_shows_help():
    result = command()
    assert result.exit_code == 2
    assert "Usage: aum-compress" in result.stderr


def test_recipes_ls_names_each_with_its_head():
    lines = answer("recipes", "ls").splitlines()
    shipped = sorted(recipes_folder().glob("*.yaml"))
    assert [line.split()[0] for line in lines] == [path.stem for path in shipped]
    for line, path in zip(lines, shipped, strict=True):
        assert line.split(maxsplit=1)[1] == path.read_text().splitlines()[0].removeprefix("# ")


def test_recipes_show_prints_the_file():
    assert answer("recipes", "show", "quickstart") == (recipes_folder() / "quickstart.yaml").read_text()


def test_recipes_check_fills_in_defaults_and_settings(recipe, tmp_path):
    text = answer("recipes", "check", recipe, "--set", "distill.train.learning_rate=2e-3", "--set", "prune=null")
    resolved = yaml.safe_load(text)
    assert resolved["distill"]["train"]["learning_rate"] == 2e-3
    assert resolved["distill"]["temperature"] == 2.0
    assert "prune" not in resolved
    (tmp_path / "resolved.yaml").write_text(text)
    assert answer("recipes", "check", tmp_path / "resolved.yaml") == text


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("seed", "wanted section.key=value"),
        ("distill.train.epoch=3", "distill.train.epoch: unknown key; did you mean epochs?"),
        ("seed=abc", "seed: Input should be a valid integer"),
        ("distill.train.epochs=0", "distill.train.epochs: Input should be greater than 0, got 0"),
        ("seed.more=1", "seed"),
        ("prune.ratio={", "the value is not YAML"),
        ("export.name=../elsewhere", "cannot begin with a dot or hold a slash"),
        ("teacher=null", "distill.teachers: names teacher, but the recipe has no section teacher"),
    ],
)
def test_settings_that_do_not_fit_name_their_place(recipe, setting, wanted):
    for verb in (("recipes", "check"), ("run",), ("prune",)):
        assert wanted in message(*verb, recipe, "--set", setting)


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
    assert "only gets its front-end inside" in message("export", source, "--to", to, "--precision", "int8")
    assert "reads waveform already" in message("export", exports / "model-int8-waveform.onnx", "--to", to)


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
    monkeypatch.setattr("aum_compress.publish.export_onnx", _write_nothing)
    monkeypatch.setattr("aum_compress.publish.write_waveform_file", _write_nothing)
    monkeypatch.setattr("aum_compress.publish.model_card", lambda files: "")
    monkeypatch.setattr("aum_compress.publish.verify_onnx", lambda path, reference: _Passed())
    for to in (".", tmp_path, tmp_path / "thesis.txt"):
        assert "holds something other than a bundle" in message("export", runs / "06-quantize", "--to", to)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


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


# --- data


def test_data_check_writes_both_lists(finished, tmp_path):
    tree = Path(shutil.copytree(finished.tree, tmp_path / "tree"))
    assert "usable           90" in answer("data", "check", tree, "--clip-seconds", 0.1)
    first, second, third = sorted((tree / "audio").iterdir())[:3]
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes()[:60])
    soundfile.write(third, noise(0, rate=8000), 8000)
    words = ("data", "check", tree, "--clip-seconds", 0.1, "--to", tmp_path / "lists")
    found = record(*words, code=2)
    assert (found["files"], found["usable"], found["rejected"]) == (90, 87, 3)
    rejected = (tmp_path / "lists" / "rejected.csv").read_text().splitlines()
    assert [line.split("\t")[0] for line in rejected[1:]] == [f"audio/{p.name}" for p in (first, second, third)]
    assert rejected[3].split("\t")[1:] == ["wrong_rate", "8000 Hz, wanted 44100 Hz"]
    assert len((tmp_path / "lists" / "meta_clean.csv").read_text().splitlines()) == 1 + 87
    result = command(*words)
    assert "wrote " in result.stdout
    assert "3 files cannot be used" in result.stderr
    assert "no such folder" in message("data", "check", tmp_path / "none")


def test_data_synth_then_split(tmp_path):
    words = ("data", "synth", tmp_path / "scenes", "--clip-seconds", 0.1, "--test-clips-per-class", 1)
    assert "40 training and 10 test clips" in answer(*words, "--train-clips-per-class", 4)
    assert len(list((tmp_path / "scenes" / "audio").iterdir())) == 50
    assert "wanted soundscapes of" in message(*words, "--train-clips-per-class", 5)
    data = {"kind": "tau", "root": str(tmp_path / "scenes"), "clip_seconds": 0.1, "train_split": "100"}
    (tmp_path / "scenes.yaml").write_text(yaml.safe_dump({"data": data}))
    text = answer("data", "split", tmp_path / "scenes.yaml", "--to", tmp_path / "lists")
    rows = {
        name: (tmp_path / "lists" / f"{name}.csv").read_text().splitlines() for name in ("train", "validation", "test")
    }
    assert {name: len(lines) - 1 for name, lines in rows.items()}["test"] == 10
    assert sum(map(len, rows.values())) == 50 + 3
    assert rows["train"][0] == "filename\tscene_label"
    assert text.splitlines()[2] == f"{tmp_path / 'lists' / 'test.csv'}  10 clips"


# --- run and its stages


def stamps(out: Path) -> dict[str, str]:
    return {name: read_bundle(out / "runs" / "tiny" / name).card.created for name in STAGES}


def test_run_until_a_stage_as_json(copied, recipe):
    result = command("run", recipe, "--out", copied, "--until", "teacher", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [row["stage"] for row in found["road"]] == ["reference", "teacher"]
    assert "teacher: nothing has changed, kept" in result.stderr


def test_run_to_the_end_as_text(copied, recipe, finished):
    text = answer("run", recipe, "--out", copied)
    assert "model-int8.onnx" in text
    assert f"next: aum-compress predict {finished.out}" in text, "the report of the run that was copied"
    assert text.splitlines()[-1] == f"report: {copied / 'exports' / 'tiny' / 'report.html'}"


@pytest.mark.parametrize("verb", ["train", "distill", "prune", "quantize"])
def test_stage_verbs_on_recipe_and_bundle(verb, copied, recipe):
    before = stamps(copied)
    last = {"train": "teacher"}.get(verb, verb)
    from_recipe = record(verb, recipe, "--out", copied)
    from_bundle = record(verb, copied / "runs" / "tiny" / "01-reference")
    from_export = record(verb, copied / "exports" / "tiny")
    roads = [[row["stage"] for row in found["road"]] for found in (from_recipe, from_bundle, from_export)]
    assert roads[0][-1] == last
    assert roads[0] == roads[1] == roads[2]
    assert stamps(copied) == before, "nothing was made anew"


def test_stage_verb_on_a_bundle_takes_settings(copied):
    found = record("quantize", copied / "runs" / "tiny" / "05-prune", "--set", "quantize.calibration_clips=8")
    assert found["road"][-1]["stage"] == "quantize"
    assert read_bundle(copied / "runs" / "tiny" / "06-quantize").card.notes == {
        "calibration_clips": 8,
        "saturating_pairs": 0,
    }


def test_bundle_that_lies_in_no_run(copied, tmp_path):
    alone = Path(shutil.copytree(copied / "runs" / "tiny" / "05-prune", tmp_path / "alone"))
    assert "is no bundle of a run: wanted runs/<recipe>/<stage> or exports/<name>" in message("quantize", alone)


def test_stage_without_its_section(finished, tmp_path):
    path = tmp_path / "short.yaml"
    short = {key: value for key, value in raw_recipe(finished.tree).items() if key != "prune"}
    path.write_text(yaml.safe_dump(short))
    assert "has no section prune" in message("prune", path, "--out", tmp_path)
    assert "has no section prune" in message("run", path, "--until", "prune", "--out", tmp_path)


# --- in a process of its own


def test_a_pipe_gets_the_result_alone(exports, finished):
    wav = sorted((finished.tree / "audio").iterdir())[0]
    process = tiny_process("", "predict", exports / "model-int8.onnx", wav, "none.wav", "--json")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert [item["file"] for item in json.loads(stdout)] == [str(wav)]
    assert stderr == "error: none.wav: an audio file was wanted, there is no such file\n"


def test_a_reader_that_has_gone_is_no_success(exports):
    """`... | head -0`: the gate may not have been reached, so it must not look passed; nor is it worth a traceback."""
    process = tiny_process("", "report", exports)
    process.stdout.close()
    process.stdout = None
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (141, "")
