"""The verb `prune`: the stage of that name, or what each dimension would cost."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from aum_compress.cli_options import Json, Out, Settings, print_json
from aum_compress.cli_stages import (
    RecipeOrBundle,
    last_bundle,
    named_bundle,
    named_recipe,
    only_with_sensitivity,
    run_stages,
)
from aum_compress.console import say, show


class Importance(StrEnum):
    taylor = "taylor"
    activation = "activation"
    magnitude = "magnitude"


def prune(
    recipe_or_bundle: RecipeOrBundle,
    sensitivity: Annotated[
        bool,
        typer.Option("--sensitivity", help="Leave out a part of one dimension at a time and show what it costs."),
    ] = False,
    ratio: Annotated[
        list[float] | None,
        typer.Option(help="With --sensitivity, share to leave out; repeatable. 0.125, 0.25 and 0.5 when left out."),
    ] = None,
    importance: Annotated[
        Importance | None,
        typer.Option(help="With --sensitivity, what decides which members go; taylor when left out."),
    ] = None,
    clips: Annotated[
        int | None, typer.Option(min=1, help="With --sensitivity, to judge on; never test clips. 256 when left out.")
    ] = None,
    settings: Settings = None,
    out_dir: Out = None,
    as_json: Json = False,
) -> None:
    """Run a recipe up to the pruned student; stages that are done are skipped.

    With --sensitivity: of a bundle's model, or of the one that a recipe's pruning would start from, what each dimension
    of each block costs.
    """
    if sensitivity:
        given = {"importance": importance and importance.value, "clips": clips, "ratios": ratio}
        chosen = {name: value for name, value in given.items() if value is not None}
        _sensitivity(recipe_or_bundle, chosen, settings, out_dir, as_json)
    else:
        only_with_sensitivity("prune", {"--ratio": ratio, "--importance": importance, "--clips": clips})
        run_stages(recipe_or_bundle, settings, "prune", out_dir, as_json)


def _sensitivity(
    recipe_or_bundle: str, chosen: dict[str, Any], settings: list[str] | None, out_dir: Path | None, as_json: bool
) -> None:
    bundle = named_bundle(recipe_or_bundle)
    recipe, run_dir = named_recipe(recipe_or_bundle, settings)

    from aum_compress.prune_sensitivity import prune_sensitivity
    from aum_compress.report.prune_sensitivity import sensitivity_lines, sensitivity_table
    from aum_compress.workspace import Workspace

    out = out_dir or run_dir
    if bundle is None:
        from_teacher = recipe.prune is not None and recipe.prune.start == "teacher"
        # how the recipe would prune, and whether it could, does not matter here
        unpruned = recipe.model_copy(update={"prune": None})
        bundle = last_bundle(unpruned, out, ("teacher",) if from_teacher else ("student", "distill"), "prune")
    if recipe.prune:
        chosen |= {"round_to": recipe.prune.round_to}
    found, files = prune_sensitivity(Workspace(recipe, out), bundle, **chosen)
    if as_json:
        print_json({**found, "files": [str(file) for file in files]})
        return
    show(sensitivity_table(found))
    for line in (*sensitivity_lines(found), *map(str, files)):
        say(line)
