"""What the pages of docs/ show can be typed, in their order, on the tiny run's files; what no test runs can be parsed.

A new page is followed like the others. What cannot be run stands in `doc_pages.UNRUN`, with the reason.
"""

import contextlib
import importlib.util
import io
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile
import yaml
from audio_trees import write_class_folders
from doc_pages import DOCS, PAGES, PROMPT, SHOWN, UNRUN, parts, verbs_named
from exported import metadata
from onnx_text import graph, ones
from packaging.requirements import Requirement
from tiny_recipe import command, raw_recipe
from typer.core import TyperCommand
from typer.testing import CliRunner

import aum_compress.budget.plan
from aum_compress.audio.reading import read_audio
from aum_compress.cli import app
from aum_compress.export.runtime import Classifier
from aum_compress.export.stream import Stream
from aum_compress.recipe import recipes_folder, validate_recipe
from aum_compress.recipe_schema import Recipe
from aum_compress.report.recipe_keys import key_tables, keys_markdown
from aum_compress.sweep.trial import Result

ROOT = DOCS.parent
KEYS_OF = re.compile(r"<!-- keys -->\n\n(.*)", flags=re.DOTALL)
ANSWERED_ON_THE_PAGE = (
    "aum-compress budget plan --tokens 64..400 --precision int8 --mixer mamba --top 8",
    "python benchmarks/esc10_mobile.py --summary",
    "python benchmarks/student_choices.py --summary",
    "aum-compress recipes keys --markdown",
)
"""Commands of which the page has the very answer."""


@pytest.fixture
def place(finished, tmp_path, monkeypatch, cache_of_finished) -> Path:
    """A folder as a reader has it: the run of `quickstart`, recordings, and the recipe of that name, all tiny."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(recipes_folder(), tmp_path / "shipped")
    raw = {key: value for key, value in raw_recipe(finished.tree).items() if key != "name"}
    (tmp_path / "shipped" / "quickstart.yaml").write_text("# The whole road.\n" + yaml.safe_dump(raw))
    shutil.copy(tmp_path / "shipped" / "quickstart.yaml", tmp_path / "my-recipe.yaml")
    monkeypatch.setattr("aum_compress.recipe.recipes_folder", lambda: tmp_path / "shipped")
    shutil.copytree(finished.out / "runs" / "tiny", tmp_path / "runs" / "quickstart")
    for name in ("quickstart", "mine"):
        shutil.copytree(finished.out / "exports" / "tiny", tmp_path / "exports" / name)
    write_class_folders(tmp_path / "recordings")
    shutil.copytree(finished.tree, tmp_path / "tau-2022-mobile")
    shutil.copy(next((finished.tree / "audio").iterdir()), tmp_path / "street.wav")
    write_models(tmp_path)
    return tmp_path


def write_models(folder: Path) -> None:
    """Files for the page on budgets: exported ones, one that every limit lets pass, and others of open sizes."""
    for name, precision in (("a", "int8"), ("b", "int8"), ("old", "fp16"), ("new", "int8")):
        shutil.copy(folder / "exports" / "quickstart" / f"model-{precision}.onnx", folder / f"{name}.onnx")
    product = "g (float[1,{mels},{frames}] x) => (float[1,{mels},4] y) {{ {read} y = MatMul (x, {weight}) }}"
    read = "w = DequantizeLinear (head_weight, head_scale)"
    one = np.float32(0.1)
    model = graph(product.format(mels=32, frames=17, read=read, weight="w"), head_weight=ones(17, 4), head_scale=one)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.ones((17, 4), np.int8), "head_weight"))
    for key, value in metadata("int8").to_props().items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, folder / "model.onnx")
    for name, mels in (("open", "time"), ("other", "9")):
        text = product.format(mels=mels, frames=17, read="", weight="head_weight")
        onnx.save(graph(text, head_weight=ones(17, 4)), folder / f"{name}.onnx")
    onnx.save(graph(LOOP, layers_w=ones(4, 4)), folder / "loop.onnx")


LOOP = """g (float[2,4] x, bool go, int64 n) => (float[2,4] y) {
    [loop_1] y = Loop <body = b (int64 i, bool c, float[2,4] h) => (bool k, float[2,4] o) {
        k = Identity (c)  p = MatMul (h, layers_w)  o = Relu (p)
    }> (n, go, x)
}"""


@pytest.mark.parametrize("page", PAGES)
def test_a_page_can_be_followed_from_top_to_bottom(page, place, monkeypatch):
    """Files are written, code is executed and commands are run as they stand there, one behind the other."""
    # trials of sweeps train for minutes; that they do is shown in test_sweep.py
    monkeypatch.setattr("aum_compress.sweep.worker.run_shared", lambda sweep: None)
    monkeypatch.setattr("aum_compress.sweep.worker.run_trial", lambda *_: Result("complete", "", 50.0, 1000, 1000, "x"))
    keep_plans(monkeypatch)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(microphone("arecord -r 44100"))))
    names = {"__name__": page.replace("-", "_"), "my_teacher": lambda path, start_seconds: np.zeros(3)}
    for part in parts(page):
        if named := re.match(r"# (\S+\.(?:yaml|py))\n", part.text):
            with (place / named[1]).open("a") as file:  # a second block of that name goes on with it
                file.write(part.text)
        if part.language == "python":
            exec(compile(part.text, f"docs/{page}.md", "exec"), names)  # the page's own code, of this repository
        elif part.language == "yaml":
            validate_recipe(raw_recipe(place) | yaml.safe_load(part.text), f"docs/{page}.md")
        for line in part.commands():
            if line not in UNRUN.get(page, {}):
                answer = typed(line)
                if line in ANSWERED_ON_THE_PAGE:
                    wanted = "\n".join(row.rstrip() for row in answer.splitlines())
                    assert wanted.strip() in (DOCS / f"{page}.md").read_text(encoding="utf-8"), line


def keep_plans(monkeypatch) -> None:
    """`budget plan` of the same values is made once."""
    made, make_plan = {}, aum_compress.budget.plan.make_plan
    monkeypatch.setattr(
        "aum_compress.budget.plan.make_plan",
        lambda *words: made[words] if words in made else made.setdefault(words, make_plan(*words)),
    )


def typed(line: str) -> str:
    """What a command answers. Its `>` writes a file, and `arecord |` hears street.wav in place of a microphone."""
    source, _, line = line.rpartition(" | ")
    line, _, file = line.partition(" > ")
    heard = microphone(source) if source else b""
    program, *words = shlex.split(line)
    if program == "python":
        answer = executed(words, heard)
    elif program == "aum-compress":
        result = CliRunner().invoke(app, words, input=heard, prog_name=program)
        assert result.exit_code == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        answer = result.stdout
    else:
        pytest.fail(f"{line}: no test can run {program}; give the reason in doc_pages.UNRUN")
    if file:
        Path(file).write_text(answer, encoding="utf-8")
    assert answer.strip(), line
    return answer


def microphone(source: str) -> bytes:
    """Some 16-bit samples of street.wav, as `arecord` would give them."""
    program, *words = shlex.split(source)
    assert program == "arecord", source
    samples = np.tile(read_audio("street.wav", int(words[words.index("-r") + 1])), 4)
    return (samples * 32767).astype("<i2").tobytes()


def executed(words: Sequence[str], heard: bytes) -> str:
    """What a script prints, its own folder among those that it imports from."""
    script = (ROOT if words[0].startswith("benchmarks/") else Path()) / words[0]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(sys, "argv", [*words])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(heard)))
        patch.syspath_prepend(str(script.parent))
        runpy.run_path(str(script), run_name="__main__")
    return said.getvalue()


# --- what no test runs


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_read_or_listed(page):
    """Commands that are not listed are run above; a block of another kind is listed by its language or beginning."""
    listed = SHOWN.get(page, {})
    for part in parts(page):
        if part.language not in (PROMPT, "bash", "python", "yaml"):
            assert part.language in listed or (not part.language and part.text.startswith((*listed, "\0"))), part.text
    found = [line for part in parts(page) for line in part.commands()]
    assert UNRUN.get(page, {}).keys() <= {*found}, "these have left the page"
    assert {*UNRUN, *SHOWN} <= {*PAGES}


def test_commands_are_found_wherever_a_page_has_them(tmp_path, monkeypatch):
    monkeypatch.setattr("doc_pages.DOCS", tmp_path)
    (tmp_path / "new.md").write_text(
        "Say `aum-compress run\nNAME`; `aum-compress budget` names a verb, as "
        "`aum-compress budget plan` does, `srun` a program.\n\n"
        "```\n$ aum-compress budget x \\\n    --json > y  # why\nanswer\n$ sox a b\n```\n\n"
        "    python benchmarks/a.py\n\n```bash\nexport A=b\nsrun aum-compress train x\n```\n"
        "```\naum-compress budget y\n```\n"
    )
    found = [*parts("new")]
    assert [part.commands() for part in found] == [
        ["aum-compress run NAME"],
        ["aum-compress budget x --json > y", "sox a b"],
        ["python benchmarks/a.py"],
        ["srun aum-compress train x"],
        [],
    ]
    assert verbs_named("new") == {"budget", "budget plan"}
    with pytest.raises(AssertionError, match="aum-compress budget y"):
        test_every_block_is_run_or_read_or_listed("new")
    with pytest.raises(pytest.fail.Exception, match=r"no test can run sox; give the reason in doc_pages\.UNRUN"):
        typed("sox a b")


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_run_can_be_parsed(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TyperCommand, "invoke", lambda command, context: None, raising=False)
    for verb in verbs_named(page):
        assert command(*verb.split(), "--help").exit_code == 0, f"aum-compress {verb}"
    for line, unrun in UNRUN.get(page, {}).items():
        assert unrun.why
        for part in re.split(r" && | \| ", unrun.filled_in or line):
            program, *words = shlex.split(part.replace("$(which aum-compress)", "aum-compress"))
            while "=" in program or program == "srun":
                program, *words = words
            require_parsed(Path(program).name, words)


def require_parsed(program: str, words: list[str]) -> None:
    """Fails where the program would not take these words."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(words)
        program, words = given.training_script, given.training_script_args
    if program == "aum-compress":
        result = command(*words)
        assert result.exit_code == 0, result.stderr
    elif words[:1] == ["-c"]:
        compile(words[1], "command", "exec")
    elif words[:1] == ["-m"] and program == "python3":
        assert importlib.util.find_spec(words[1]), words
    elif program == "python":
        source = (ROOT / words[0]).read_text(encoding="utf-8")
        missing = [word for word in words[1:] if word.startswith("--") and f'"{word}"' not in source]
        assert not missing, f"{words[0]} has no {', '.join(missing)}"
    elif program == "pip":
        extras = project["project"]["optional-dependencies"]
        for word in (word for word in words[1:] if not word.startswith("-")):
            if word.startswith("."):
                assert not word[1:] or word[2:-1] in extras, word
            elif Requirement(word).specifier:
                assert word in extras["cuda"], f"{word}: the extra has {extras['cuda']}"
    elif program == "pytest":
        names = [marker.partition(":")[0] for marker in project["tool"]["pytest"]["ini_options"]["markers"]]
        assert words[0] != "-m" or words[1] in names
        assert words[0] == "-m" or (ROOT / words[0]).is_file()
    else:
        assert program == "build.sh", f"{program}: nothing here knows its options"


@pytest.mark.parametrize("line", [line for line in UNRUN["distributed"] if " run my-recipe.yaml" in line])
def test_recipes_of_several_processes_are_valid(line, place):
    words = shlex.split(line)
    settings = [f"--set={value}" for option, value in itertools.pairwise(words) if option == "--set"]
    result = command("recipes", "check", "my-recipe.yaml", *settings)
    assert result.exit_code == 0, result.stderr
    assert "devices: 4" in result.stdout


# --- what the pages say


def test_the_loop_for_devices_hears_what_a_stream_hears(place, monkeypatch):
    """And without a line of this package."""
    command("export", "runs/quickstart/06-quantize", "--to", "device", "--input-rate", "44100")
    loop = next(part.text for part in parts("on-your-device") if part.language == "python")
    assert "aum_compress" not in loop
    names = {"__name__": "listen"}
    exec(compile(loop, "docs/on-your-device.md", "exec"), names)
    samples, rate_hz = soundfile.read("street.wav", dtype="int16")
    samples = np.tile(samples, 4)
    assert (names["rate_hz"], samples.ndim) == (rate_hz, 1)
    sent = samples.astype("<i2").tobytes()
    chunks = [sent[place : place + 882] for place in range(0, len(sent), 882)]
    found = list(names["listen"](chunks, hop=names["window"] // 2))
    stream = Stream(Classifier("device/model-int8-waveform.onnx"), rate_hz, hop_seconds=0.05)
    wanted = stream.feed(samples / np.float32(32768))
    assert [label for label, _ in found] == [heard.label for heard in wanted]
    assert [share for _, share in found] == pytest.approx([float(heard.vote.max()) for heard in wanted], abs=1e-4)
    assert len(found) == 7


def test_the_loop_in_cpp_hears_what_a_stream_hears(tmp_path, monkeypatch):
    """Compiled and started as its own first lines say."""
    release = Path(os.environ.get("AUM_ORT_CPP", "absent"))
    if not (release / "include" / "onnxruntime_cxx_api.h").is_file() or shutil.which("g++") is None:
        pytest.skip("AUM_ORT_CPP: no g++, or no unpacked release of onnxruntime there")
    monkeypatch.chdir(tmp_path)
    Path("ort").symlink_to(release.resolve())
    (program,) = (part.text for part in parts("on-your-device") if part.language == "cpp")
    Path("listen.cpp").write_text(program)
    compiled, started = (line.removeprefix("// ") for line in program.splitlines()[:2])
    done = subprocess.run(shlex.split(compiled), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = ROOT / "exports" / "esc10-edge" / "model-int8-waveform.onnx"
    place = np.arange(96_000) / 32_000
    tone = 0.3 * np.sin(2 * np.pi * (200 + 900 * place) * place) + 0.05 * np.random.default_rng(0).normal(size=96_000)
    samples = (tone * 32767).astype("<i2")
    words = [model if word.endswith(".onnx") else word for word in shlex.split(started.partition(" | ")[2])]
    found = subprocess.run(words, input=samples.tobytes(), capture_output=True, check=True).stdout.decode().split()
    wanted = Stream(Classifier(model), 32_000, hop_seconds=0.5).feed(samples / np.float32(32768))
    assert found == [heard.label for heard in wanted]
    assert len(found) == 5
    assert len({*found}) > 1


def test_the_page_of_recipes_has_every_key_as_the_schema_has_it():
    (found,) = KEYS_OF.findall((DOCS / "recipes.md").read_text(encoding="utf-8"))
    assert found == keys_markdown(), "put the output of `aum-compress recipes keys --markdown` below <!-- keys -->"


def test_every_section_and_key_is_among_them():
    tables = key_tables()
    assert [key.name for key in tables[0].keys] == list(Recipe.model_fields)
    assert {place for table in tables for place in table.places} >= {
        *("data", "features", "train", "augment", "stem", "stages", "blocks", "finetune")
    }
    train = next(table for table in tables if "train" in table.places)
    assert {key.name: key.default for key in train.keys}["epochs"] == "needed"
    result = command("recipes", "keys", "distill")
    assert "lambda: number from 0 to 1, default 0.17" in result.stdout
    result = command("recipes", "keys", "distil")
    assert result.exit_code == 2
    assert "no such section; there are data, features" in result.stderr


def test_the_page_of_exports_has_the_measured_times_of_the_front_end():
    measured = json.loads((ROOT / "benchmarks" / "front_end.json").read_text())["one_second"]
    dcase, edge = measured.values()
    rows = [
        f"| {name} | {row['median_ms']:.2f} ms | {edge[name]['median_ms']:.2f} ms | {row['file_bytes']:,} |"
        for name, row in dcase.items()
    ]
    assert "\n".join(rows) in (DOCS / "export.md").read_text(encoding="utf-8")
    assert dcase["two steps, bands (shipped)"]["median_share_of_stft"] < 0.5


def test_places_of_a_mixer_are_there_and_know_the_two_that_were_added():
    rows = re.findall(r"^\| `(aum_compress/[^`]+)`", (DOCS / "add-a-mixer.md").read_text(), flags=re.MULTILINE)
    assert len(rows) == 7
    for row in rows:
        assert "mamba2" in (ROOT / row).read_text().lower(), row


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.stem)
def test_what_a_page_points_to_is_there(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (path.parent / target).exists(), f"{path.name}: {target}"
    for target in re.findall(r"`((?:aum_compress|tests|benchmarks|docs)/[\w/-]+\.(?:py|md))`", text):
        assert (ROOT / target).exists(), f"{path.name}: {target}"
