"""Finding, reading and writing recipes: one typed YAML file from audio to a verified model. Torch-free."""

import difflib
import math
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from aum_compress.errors import RecipeError, join_problems
from aum_compress.recipe_schema import Recipe

_KINDS = ("tau", "folders", "synth", "patch", "conv", "log_mel", "kaldi")
"""Values of `kind`: pydantic names the alternative that it tried as if it were a key."""
_MOST_VALUES = 100_000
"""In a YAML file, each `&anchor` written out: nine lines of ten anchors each would be a billion."""
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)
"""PyYAML's own, and those that its constructors of dates and of tags such as `!!int` let through."""


def recipes_folder() -> Path:
    """Where the shipped recipes lie: in the installed package, or beside it in a source checkout."""
    installed = Path(str(resources.files("aum_compress"))) / "shipped_recipes"
    return installed if installed.is_dir() else Path(__file__).resolve().parent.parent / "recipes"


def find_recipe(name_or_path: str) -> Path:
    """The file of a shipped recipe (by name) or of the user's own (by path).

    Raises:
        RecipeError: neither; the message lists the shipped names.
    """
    shipped = {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}
    if name_or_path in shipped:
        return shipped[name_or_path]
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    close = difflib.get_close_matches(name_or_path, shipped, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise RecipeError(
        f"{name_or_path}: no such recipe: neither a file nor one of the shipped ones ({', '.join(shipped)}).{hint}"
    )


def recipe_head(path: Path) -> list[str]:
    """The comment at the head of a recipe: what it makes, how long it takes, what it measured."""
    head = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        head.append(line.lstrip("#").strip())
    return head


def read_yaml(path: Path) -> Any:
    """What a YAML file holds: plain values alone.

    Raises:
        RecipeError: not readable, not YAML, or with anchors that name themselves or are too many when written out.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        count = _values_in(found, {})
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except _YAML_ERRORS as error:
        raise RecipeError(f"{path}: is not YAML: {error}") from None
    if count > _MOST_VALUES:
        how = f"hold {count:,} values when written out" if count < math.inf else "hold themselves"
        raise RecipeError(f"{path}: its &anchors {how}; wanted at most {_MOST_VALUES:,} values")
    return found


def _values_in(value: Any, known: dict[int, float]) -> float:
    """How many values there are in one, shared ones counted each time; infinite where it is in itself."""
    if not isinstance(value, dict | list | tuple | set):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        inside = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_values_in(each, known) for each in inside)
    return known[id(value)]


def load_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Reads and validates a recipe with `section.key=value` settings applied.

    Raises:
        RecipeError: not readable, not YAML, or not valid; all problems at once, each with its place.
    """
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: wanted sections (data:, student:, ...), found {type(raw).__name__}")
    raw = _unshared(raw)
    for setting in settings:
        _apply_setting(raw, setting)
    raw["name"] = raw.get("name") or path.stem
    return validate_recipe(raw, str(path))


def validate_recipe(raw: dict[str, Any], where: str) -> Recipe:
    """As `load_recipe`, from a mapping; `where` heads the message."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(join_problems(f"{where}: not a valid recipe:", _problems(error))) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, defaults filled in; reading it back gives an equal recipe."""
    return yaml.safe_dump(_without_absent(recipe, recipe.model_dump(mode="json", by_alias=True)), sort_keys=False)


def _without_absent(value: Any, dumped: Any) -> Any:
    """`dumped`, which is `value` for JSON, without what is null by default; a null that switches off stays."""
    if isinstance(value, BaseModel):
        fields = {field.serialization_alias or name: (name, field) for name, field in type(value).model_fields.items()}
        return {
            key: _without_absent(getattr(value, fields[key][0]), each)
            for key, each in dumped.items()
            if each is not None or fields[key][1].get_default(call_default_factory=True) is not None
        }
    if isinstance(value, list | tuple):
        return [_without_absent(*pair) for pair in zip(value, dumped, strict=True)]
    return dumped


def _unshared(value: Any) -> Any:
    """A copy in which what YAML's `*anchor` names is there each time by itself, so that one of them can be changed."""
    if isinstance(value, dict):
        return {key: _unshared(each) for key, each in value.items()}
    return [_unshared(each) for each in value] if isinstance(value, list) else value


def _apply_setting(raw: dict[str, Any], setting: str) -> None:
    key, separator, text = setting.partition("=")
    if not separator or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
        raise RecipeError(f"--set {setting}: wanted section.key=value, e.g. --set distill.train.epochs=10")
    try:
        value = yaml.safe_load(text)
    except _YAML_ERRORS as error:
        raise RecipeError(f"--set {setting}: the value is not YAML: {error}") from None
    *sections, last = key.split(".")
    place: Any = raw
    for section in sections:
        if place.get(section) is None:
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            raise RecipeError(f"--set {setting}: {section} is not a section but {place!r}")
    place[last] = value


def _problems(error: ValidationError) -> list[str]:
    """One line a problem: place, what was found, what was wanted."""
    lines = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"] if part not in _KINDS)
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            known = _known_keys(item["loc"][:-1])
            close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            message = "unknown key" + (f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(known)}")
        elif item["type"] == "missing":
            message = "missing"
        elif item["type"] != "value_error":
            message += f", got {item['input']!r}"
        lines.append(f"{place}: {message}" if place else message)
    return lines


def _known_keys(place: tuple[Any, ...]) -> list[str]:
    """Keys that the section at `place` of a recipe takes, read from the JSON schema."""
    schema = Recipe.model_json_schema()
    candidates = [schema]
    for part in place:
        step: list[dict[str, Any]] = []
        for candidate in candidates:
            for option in _options(candidate, schema):
                if part in option.get("properties", {}):
                    step += _options(option["properties"][part], schema)
                elif option.get("properties", {}).get("kind", {}).get("const") == part:
                    step.append(option)
                elif isinstance(part, int) and "items" in option:
                    step += _options(option["items"], schema)
        candidates = step
    return sorted({key for candidate in candidates for key in candidate.get("properties", {})})


def _options(node: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    if "$ref" in node:
        return _options(schema["$defs"][node["$ref"].rsplit("/", 1)[1]], schema)
    alternatives = node.get("anyOf", []) + node.get("oneOf", [])
    return [option for alternative in alternatives for option in _options(alternative, schema)] or [node]
