"""Arguments and options that several verbs share."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Precision(StrEnum):
    """Of a whole model."""

    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"
    int4 = "int4"


class StageName(StrEnum):
    data = "data"
    reference = "reference"
    teacher = "teacher"
    student = "student"
    distill = "distill"
    prune = "prune"
    quantize = "quantize"
    devices = "devices"
    budget = "budget"
    export = "export"
    verify = "verify"


RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or a path.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a recipe value; repeatable.")
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Folder that gets runs/ and exports/: here, or where a bundle's run is."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def print_json(value: Any) -> None:
    """JSON to stdout."""
    print(json.dumps(value, indent=1, default=str))
