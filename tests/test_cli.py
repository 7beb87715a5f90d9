"""Every verb of the command line: results on stdout, logs on stderr, exit codes, JSON keys."""

import json
import shutil
from pathlib import Path

import pytest
import soundfile
import typer
import yaml
from answers import answer, message, record
from audio_trees import noise
from tiny_recipe import command, raw_recipe, tiny_process

import aum_compress
from aum_compress.bundle import read_bundle
from aum_compress.cli import app
from aum_compress.recipe import recipes_folder

STAGES = ("01-reference", "02-teacher", "04-distill", "05-prune", "06-quantize", "07-export")


pytestmark = pytest.mark.usefixtures("cache_of_finished")


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
