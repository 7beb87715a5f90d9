"""What README says can be typed can be typed."""

import re
import shlex
from pathlib import Path

import pytest
from tiny_recipe import command, finished_run

from aum_compress.recipe import recipes_folder

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_two_set_up_commands_stand_on_lines_of_their_own():
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert lines == [
        "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/aum-compress run quickstart",
        'python3 -m venv .venv && .venv/bin/pip install ".[test]" && .venv/bin/pytest',
    ]


def test_every_shipped_recipe_is_in_the_table_and_nothing_else():
    rows = re.findall(r"^\| `([\w-]+)` \|", README, flags=re.MULTILINE)
    assert sorted(rows) == sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def test_every_verb_is_listed():
    listed = README.split("## Commands")[1].split("```")[1]
    for verb in re.findall(r"^  ([a-z]+) ", command("--help").stdout.split("Commands:")[1], flags=re.MULTILINE):
        assert re.search(rf"\b{verb}\b", listed), f"{verb} is not in README's list of commands"


@pytest.mark.parametrize("line", re.findall(r"^\$ aum-compress (.*)$", README, flags=re.MULTILINE))
def test_shown_commands_run(line, tmp_path_factory, tmp_path):
    """On the tiny run's files in place of the quickstart's."""
    finished = finished_run(tmp_path_factory.getbasetemp())
    recording = next((finished.tree / "audio").iterdir())
    words = [
        word.replace("exports/quickstart", str(finished.outcome.folder)).replace("street.wav", str(recording))
        for word in shlex.split(line)
    ]
    result = command(*words)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip()


def test_no_place_is_left_to_fill_in():
    assert not re.search(r"@[A-Z]+@", README)
