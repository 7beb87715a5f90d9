"""What the pages of docs/ show with a prompt can be typed, in their order, on the tiny run's files.

Pages about one part of the tool, such as budgets.md, are tested beside it.
"""

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from audio_trees import write_class_folders
from tiny_recipe import command, raw_recipe

from aum_compress.export.runtime import Classifier
from aum_compress.export.stream import Stream
from aum_compress.recipe_schema import Recipe
from aum_compress.report.recipe_keys import key_tables, keys_markdown
from aum_compress.sweep.trial import Result

DOCS = Path(__file__).parent.parent / "docs"
FOLLOWED = ("sweeps", "recipes", "your-own-data", "your-own-model", "add-a-mixer", "quantisation")
KEYS_OF = re.compile(r"<!-- keys -->\n\n(.*)", flags=re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    language: str
    text: str


def blocks(page: str) -> list[Block]:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    return [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)]


@pytest.fixture
def place(finished, tmp_path, monkeypatch, cache_of_finished) -> Path:
    """A folder as a reader has it: the run of `quickstart`, recordings, and the recipe of that name, all tiny."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shipped").mkdir()
    raw = {key: value for key, value in raw_recipe(finished.tree).items() if key != "name"}
    (tmp_path / "shipped" / "quickstart.yaml").write_text("# The whole road.\n" + yaml.safe_dump(raw))
    monkeypatch.setattr("aum_compress.recipe.recipes_folder", lambda: tmp_path / "shipped")
    shutil.copytree(finished.out / "runs" / "tiny", tmp_path / "runs" / "quickstart")
    shutil.copytree(finished.out / "exports" / "tiny", tmp_path / "exports" / "quickstart")
    write_class_folders(tmp_path / "recordings")
    shutil.copytree(finished.tree, tmp_path / "tau-2022-mobile")
    shutil.copy(next((finished.tree / "audio").iterdir()), tmp_path / "street.wav")
    return tmp_path


@pytest.mark.parametrize(
    "page",
    [
        "dcase",
        "export",
        "on-your-device",
        "sweeps",
        "recipes",
        "pruning",
        "your-own-data",
        "your-own-model",
        "add-a-mixer",
        "quantisation",
    ],
)
def test_a_page_can_be_followed_from_top_to_bottom(page, place, monkeypatch, capsys):
    """Files are written, code is executed and commands are run as they stand there, one behind the other."""
    # trials of sweeps train for minutes; that they do is shown in test_sweep.py
    monkeypatch.setattr("aum_compress.sweep.worker.run_shared", lambda sweep: None)
    monkeypatch.setattr("aum_compress.sweep.worker.run_trial", lambda *_: Result("complete", "", 50.0, 1000, 1000, "x"))
    done, names = 0, {"__name__": page.replace("-", "_")}
    for block in blocks(page):
        if block.language == "python":
            exec(compile(block.text, f"docs/{page}.md", "exec"), names)  # the page's own code, of this repository
            done += 1
        if block.language == "yaml" and (named := re.match(r"# (\S+\.yaml)\n", block.text)):
            (place / named[1]).write_text(block.text)
        for line in re.findall(r"^\$ aum-compress (.*)$", block.text, flags=re.MULTILINE):
            result = command(*shlex.split(line))
            assert result.exit_code == 0, f"{line}\n{result.stdout}\n{result.stderr}"
            assert result.stdout.strip(), line
            done += 1
    assert done


def test_the_loop_for_devices_hears_what_a_stream_hears(place, monkeypatch):
    """And without a line of this package."""
    command("export", "runs/quickstart/06-quantize", "--to", "device", "--input-rate", "44100")
    loop = next(block.text for block in blocks("on-your-device") if block.language == "python")
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
    measured = json.loads((DOCS.parent / "benchmarks" / "front_end.json").read_text())["one_second"]
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
        assert "mamba2" in (DOCS.parent / row).read_text().lower(), row


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.stem)
def test_what_a_page_points_to_is_there(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (path.parent / target).exists(), f"{path.name}: {target}"
    for target in re.findall(r"`((?:aum_compress|tests|benchmarks|docs)/[\w/-]+\.(?:py|md))`", text):
        assert (DOCS.parent / target).exists(), f"{path.name}: {target}"
