"""What a sweep varies: keys of a recipe, each with a list of values or a range. Torch-free."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import yaml

from aum_compress.errors import RecipeError

_RANGE = re.compile(r"([-+.\deE]+?)\.\.([-+.\deE]+?)(:log)?")
MOST_COMBINATIONS = 10_000
"""Above this, all combinations of lists are no plan but a mistake."""


@dataclass(frozen=True)
class Choices:
    """A list of values; each is named by its text, so that a study can store any YAML value."""

    values: Mapping[str, Any]
    """Text -> value."""

    def __str__(self) -> str:
        return ", ".join(self.values)


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, both included; whole ones where both are."""

    low: float
    high: float
    log: bool = False
    """Drawn evenly by factor, not by difference."""

    def __str__(self) -> str:
        return f"{self.low}..{self.high}{':log' if self.log else ''}"

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


Space = Mapping[str, Choices | Range]
"""Key -> what it may be."""


def choices(values: Sequence[Any]) -> Choices:
    """The list of `values`, each named by what a person would type for it."""
    return Choices({value if isinstance(value, str) else json.dumps(value): value for value in values})


def parse_space(texts: Sequence[str]) -> Space:
    """`--param` texts: `section.key=a,b,c` or `section.key=low..high[:log]`.

    Raises:
        RecipeError: a text of another form, a key named twice, a range that is empty or has no logarithm.
    """
    space: dict[str, Choices | Range] = {}
    for text in texts:
        key, separator, values = text.partition("=")
        if not separator or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
            raise RecipeError(
                f"--param {text}: wanted section.key=a,b,c or section.key=low..high[:log], "
                "e.g. --param student.d_model=32,48,64"
            )
        if key in space:
            raise RecipeError(f"--param {key}: named twice; give all its values at once")
        space[key] = _range(text, found) if (found := _RANGE.fullmatch(values.strip())) else _choices(text, values)
    if not space:
        raise RecipeError("--param: a sweep varies something; wanted at least one, e.g. --param student.d_model=32,48")
    return space


def combinations(space: Space) -> Iterator[dict[str, Any]] | None:
    """Every combination of texts, key by key in order; None where a range has no end of values.

    Raises:
        RecipeError: too many to try.
    """
    lists = [list(varied.values) for varied in space.values() if isinstance(varied, Choices)]
    if len(lists) < len(space):
        return None
    if (count := math.prod(map(len, lists))) > MOST_COMBINATIONS:
        raise RecipeError(f"--param: {count:,} combinations; say with --trials how many of them to try")
    return (dict(zip(space, texts)) for texts in product(*lists))


def values_of(space: Space, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's values for what a study has drawn: texts of choices, numbers of ranges."""
    found: dict[str, Any] = {}
    for key, varied in space.items():
        found[key] = varied.values[drawn[key]] if isinstance(varied, Choices) else drawn[key]
    return found


def settings_of(values: Mapping[str, Any]) -> list[str]:
    """As `--set` takes them; JSON is YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _range(text: str, found: re.Match[str]) -> Range:
    numbers = [yaml.safe_load(end) for end in found.groups()[:2]]
    try:
        low, high = (number if isinstance(number, int) else float(number) for number in numbers)
    except (TypeError, ValueError):
        raise RecipeError(f"--param {text}: {numbers[0]}..{numbers[1]} is no range of numbers") from None
    if not low < high or not math.isfinite(high - low):
        raise RecipeError(f"--param {text}: found {low}..{high}, wanted a smaller and a larger number")
    if found[3] and low <= 0:
        raise RecipeError(f"--param {text}: :log needs numbers above 0")
    return Range(low, high, bool(found[3]))


def _choices(text: str, values: str) -> Choices:
    try:
        found = yaml.safe_load(f"[{values}]")
    except yaml.YAMLError as error:
        raise RecipeError(f"--param {text}: the values are not YAML: {error}") from None
    made = choices(found)
    if not found or len(made.values) < len(found):
        raise RecipeError(f"--param {text}: wanted one value or more, each once")
    return made
