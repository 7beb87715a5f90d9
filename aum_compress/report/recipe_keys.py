"""Every section and key of a recipe, read from the schema: what it may be, its default, its meaning. Torch-free."""

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, get_args

from pydantic import BaseModel

from aum_compress.recipe_schema import Recipe

NEEDED = "needed"


@dataclass(frozen=True)
class Key:
    name: str
    values: str
    default: str
    """As YAML has it; `needed` where there is none, empty where leaving it out means something of its own."""
    meaning: str


@dataclass(frozen=True)
class KeyTable:
    """The keys of one kind of section."""

    name: str
    """Of its class."""
    places: tuple[str, ...]
    """Keys under which it may stand."""
    meaning: str
    keys: tuple[Key, ...]


def key_tables() -> list[KeyTable]:
    """The recipe itself first, then its sections in the order in which they are met."""
    schema = Recipe.model_json_schema(by_alias=True)
    definitions = schema["$defs"] | {"Recipe": schema}
    classes = {one.__name__: one for one in _classes(Recipe)}
    places: dict[str, list[str]] = {"Recipe": []}
    for name in _in_order(definitions, places):
        for key, node in definitions[name]["properties"].items():
            for target in _targets(node):
                places.setdefault(target, [])
                if key not in places[target]:
                    places[target].append(key)
    return [_table(name, places[name], definitions[name], classes[name]) for name in places]


def _in_order(definitions: dict[str, Any], found: dict[str, list[str]]) -> Iterator[str]:
    """Names of sections, each once, parents before what stands in them; `found` grows while this goes on."""
    done: set[str] = set()
    while waiting := [name for name in found if name not in done]:
        done.add(waiting[0])
        yield waiting[0]


def keys_markdown() -> str:
    """All tables, a heading each."""
    lines: list[str] = []
    for table in key_tables():
        lines += ["", f"### {_title(table)}", "", _prose(table.meaning)]
        lines += ["", "| key | values | default | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{key.name}` | {key.values} | {_code(key.default)} | {_prose(key.meaning)} |" for key in table.keys
        ]
    return "\n".join([*lines, ""]).lstrip("\n")


def keys_lines(section: str | None) -> list[str]:
    """The same for a screen; of one section, by the key under which it stands, or of all.

    Raises:
        KeyError: no such section; its argument lists them.
    """
    tables = key_tables()
    chosen = [table for table in tables if section in (None, *table.places)]
    if not chosen:
        raise KeyError(", ".join(dict.fromkeys(place for table in tables for place in table.places)))
    lines: list[str] = []
    for table in chosen:
        lines += [_title(table).replace("`", ""), *_wrapped(table.meaning, 2)]
        for key in table.keys:
            default = {NEEDED: f", {NEEDED}", "": ""}.get(key.default, f", default {key.default}")
            lines += [f"  {key.name}: {key.values}{default}", *_wrapped(key.meaning, 6)]
        lines.append("")
    return lines[:-1]


def _title(table: KeyTable) -> str:
    if not table.places:
        return "The recipe"
    kind = next((key.values for key in table.keys if key.name in ("kind", "mixer") and " " not in key.values), "")
    places = ", ".join(f"`{place}`" for place in table.places)
    return f"{places} ({kind})" if kind else places


def _table(name: str, places: list[str], node: dict[str, Any], model: type[BaseModel]) -> KeyTable:
    meanings = _meanings(model)
    wanted = set(node.get("required", ()))
    names = {field.alias or key: key for key, field in model.model_fields.items()}
    keys = tuple(
        Key(key, _values(one), _default(one, key in wanted), meanings.get(names[key], ""))
        for key, one in node["properties"].items()
    )
    return KeyTable(name, tuple(places), _flat(model.__doc__ or ""), keys)


def _targets(node: Any) -> list[str]:
    """Definitions that a property leads to."""
    if isinstance(node, list):
        return [name for one in node for name in _targets(one)]
    if not isinstance(node, dict):
        return []
    own = [node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else []
    return own + [name for key in ("anyOf", "oneOf", "items", "prefixItems") for name in _targets(node.get(key))]


def _values(node: dict[str, Any]) -> str:
    """What a key may be, in a few words."""
    options = [one for one in (*node.get("anyOf", ()), *node.get("oneOf", ())) if one.get("type") != "null"]
    if options:
        return " or ".join(dict.fromkeys(_values(one) for one in options))
    if "$ref" in node:
        return "section"
    if "const" in node:
        return str(node["const"])
    if "enum" in node:
        return ", ".join(map(str, node["enum"]))
    if node.get("type") == "array":
        return f"list: {_values(node['items'])}" if "items" in node else "list"
    if isinstance(node.get("additionalProperties"), dict):
        return f"names, each with {_values(node['additionalProperties'])}"
    if node.get("type") in ("integer", "number"):
        return {"integer": "whole number", "number": "number"}[node["type"]] + _bounds(node)
    if node.get("type") == "string":
        return "path" if node.get("format") == "path" else "text"
    return {"boolean": "true, false"}.get(node.get("type", ""), "section")


def _bounds(node: dict[str, Any]) -> str:
    words = (("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to"), ("exclusiveMaximum", "below"))
    return "".join(f" {word} {node[key]:g}" for key, word in words if key in node)


def _default(node: dict[str, Any], needed: bool) -> str:
    default = node.get("default")
    if needed:
        return NEEDED
    return "" if default is None or isinstance(default, dict) or default == "" else json.dumps(default).strip('"')


@cache
def _meanings(model: type[BaseModel]) -> dict[str, str]:
    """The string below each field of a class and of those that it builds on."""
    found: dict[str, str] = {}
    for one in reversed(model.__mro__):
        if not issubclass(one, BaseModel) or one is BaseModel:
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0].body
        for field, text in pairwise(body):
            is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if is_text and isinstance(field, ast.AnnAssign) and isinstance(text.value.value, str):
                found[field.target.id] = _flat(text.value.value)
    return found


def _classes(model: type[BaseModel]) -> list[type[BaseModel]]:
    """A section's class and those of all that may stand in it."""
    found, waiting = [], [model]
    while waiting:
        one = waiting.pop(0)
        if one not in found:
            found.append(one)
            waiting += [inner for field in one.model_fields.values() for inner in _models(field.annotation)]
    return found


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _flat(text: str) -> str:
    return " ".join(text.split())


def _wrapped(text: str, indent: int) -> list[str]:
    space = " " * indent
    return textwrap.wrap(text, 110, initial_indent=space, subsequent_indent=space)


def _prose(text: str) -> str:
    """Backticks stay what they are in Markdown too."""
    return text.replace("|", "\\|").replace("*", "\\*")


def _code(text: str) -> str:
    return text if text in (NEEDED, "") else f"`{text}`"
