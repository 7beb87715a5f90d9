"""What a command of `aum-compress` answers, checked on the way."""

import json

from tiny_recipe import command


def answer(*words: object, code: int = 0) -> str:
    """stdout of a command that ended with `code`; only one that failed says so on stderr."""
    result = command(*words)
    assert result.exit_code == code, result.stderr
    assert ("error: " in result.stderr) == (code != 0), result.stderr
    return result.stdout


def record(*words: object, code: int = 0) -> dict | list:
    """What `--json` prints: all of stdout is one JSON value."""
    return json.loads(answer(*words, "--json", code=code))


def message(*words: object, code: int = 2) -> str:
    """The error message of a command that fails, without a word on stdout."""
    result = command(*words)
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr
    return result.stderr
