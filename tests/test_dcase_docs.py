"""What docs/dcase.md says can be typed can be typed."""

import re
import shlex
from pathlib import Path

import pytest
from tiny_recipe import command, write_recipe

PAGE = (Path(__file__).parent.parent / "docs" / "dcase.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ aum-compress (.*)$", PAGE, flags=re.MULTILINE)


def test_the_page_shows_every_verb_that_it_is_about():
    assert {line.split()[0] for line in COMMANDS} == {"evaluate"}


@pytest.mark.usefixtures("cache_of_finished")
@pytest.mark.parametrize("line", COMMANDS)
def test_shown_commands_run(line, finished, exports, runs, tmp_path, monkeypatch):
    """On the tiny run's files and data in place of the quickstart's and TAU's."""
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, finished.tree)
    places = {"exports/quickstart": exports, "runs/quickstart": runs, "tau-2022-mobile": finished.tree}
    words = []
    for word in shlex.split(line):
        for place, tiny in places.items():
            word = word.replace(place, str(tiny))
        words.append(str(recipe) if word == "quickstart" else word)
    result = command(*words)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip()
