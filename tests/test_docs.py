"""What the pages of docs/ show with a prompt can be typed, in their order, on the tiny run's files.

Pages about one part of the tool, such as budgets.md, are tested beside it.
"""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from audio_trees import write_class_folders
from tiny_recipe import command, raw_recipe

from aum_compress.sweep.trial import Result

DOCS = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
PAGES = ("sweeps",)
COMMANDS = {path.stem: re.findall(r"^\$ aum-compress (.*)$", path.read_text(), flags=re.MULTILINE) for path in DOCS}


@pytest.fixture
def place(finished, tmp_path, monkeypatch, cache_of_finished) -> Path:
    """A folder as a reader has it: the run of `quickstart`, recordings, and the recipe of that name, all tiny."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shipped").mkdir()
    raw = {key: value for key, value in raw_recipe(finished.tree).items() if key != "name"}
    (tmp_path / "shipped" / "quickstart.yaml").write_text("# The whole road.\n" + yaml.safe_dump(raw))
    monkeypatch.setattr("aum_compress.recipe.recipes_folder", lambda: tmp_path / "shipped")
    monkeypatch.setattr("aum_compress.cli_data.recipes_folder", lambda: tmp_path / "shipped", raising=False)
    shutil.copytree(finished.out / "runs" / "tiny", tmp_path / "runs" / "quickstart")
    shutil.copytree(finished.out / "exports" / "tiny", tmp_path / "exports" / "quickstart")
    write_class_folders(tmp_path / "recordings")
    shutil.copy(next((finished.tree / "audio").iterdir()), tmp_path / "street.wav")
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_shown_commands_run(page, place, monkeypatch):
    # sweeps train for minutes; that they do is shown in test_sweep.py
    monkeypatch.setattr("aum_compress.sweep.worker.run_shared", lambda sweep: None)
    monkeypatch.setattr("aum_compress.sweep.worker.run_trial", lambda *_: Result("complete", "", 50.0, 1000, 1000, "x"))
    for line in COMMANDS[page]:
        result = command(*shlex.split(line))
        assert result.exit_code == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        assert result.stdout.strip(), line


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_links_to_other_files_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name}: {target}"
