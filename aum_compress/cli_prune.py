"""The verb `prune`: the stage of that name, or what each dimension would cost."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from aum_compress.cli_options import Json, Out, Settings, print_json
from aum_compress.console import say, show
from aum_compress.errors import AumError

RunStage = Callable[[str, list[str] | None, str | None, Path | None, bool], None]
"""Runs a recipe, or that of a bundle, up to a stage: recipe or bundle, settings, stage, folder, JSON."""


class Importance(StrEnum):
    taylor = "taylor"
    activation = "activation"
    magnitude = "magnitude"


def add_prune(app: typer.Typer, run_stage: RunStage) -> None:
    """Adds the verb to `app`."""

    @app.command("prune")
    def prune(
        recipe_or_bundle: Annotated[
            str, typer.Argument(metavar="RECIPE|BUNDLE", help="Recipe, or a bundle of its run.")
        ],
        sensitivity: Annotated[
            bool,
            typer.Option("--sensitivity", help="Leave out a part of one dimension at a time and show what it costs."),
        ] = False,
        ratio: Annotated[
            list[float] | None,
            typer.Option(help="With --sensitivity, share to leave out; repeatable. 0.125, 0.25 and 0.5 when left out."),
        ] = None,
        importance: Annotated[
            Importance, typer.Option(help="With --sensitivity, what decides which members go.")
        ] = Importance.taylor,
        clips: Annotated[int, typer.Option(min=1, help="With --sensitivity, to judge on; never test clips.")] = 256,
        settings: Settings = None,
        out_dir: Out = None,
        as_json: Json = False,
    ) -> None:
        """Run a recipe up to the pruned student; stages that are done are skipped.

        With --sensitivity: of a bundle's model, or of the one that a recipe's pruning would start from, what each
        dimension of each block costs.
        """
        if sensitivity:
            chosen = {"importance": importance.value, "clips": clips} | ({"ratios": ratio} if ratio else {})
            _sensitivity(recipe_or_bundle, chosen, settings, out_dir, as_json)
        else:
            run_stage(recipe_or_bundle, settings, "prune", out_dir, as_json)


def _sensitivity(
    recipe_or_bundle: str, chosen: dict[str, Any], settings: list[str] | None, out_dir: Path | None, as_json: bool
) -> None:
    from aum_compress.bundle import CARD, read_bundle, run_of_bundle
    from aum_compress.recipe import find_recipe, load_recipe

    named = Path(recipe_or_bundle)
    bundle = read_bundle(named) if (named / CARD).is_file() else None
    path, run_dir = run_of_bundle(named) if bundle else (find_recipe(recipe_or_bundle), Path())
    recipe = load_recipe(path, settings or [])

    from aum_compress.prune_sensitivity import prune_sensitivity
    from aum_compress.report.prune_sensitivity import sensitivity_lines, sensitivity_table
    from aum_compress.workspace import Workspace

    out = out_dir or run_dir
    if bundle is None:
        bundle = _start_of_pruning(recipe, out)
    if recipe.prune:
        chosen |= {"round_to": recipe.prune.round_to}
    found, files = prune_sensitivity(Workspace(recipe, out), bundle, **chosen)
    if as_json:
        print_json({**found, "files": [str(file) for file in files]})
        return
    show(sensitivity_table(found))
    for line in (*sensitivity_lines(found), *map(str, files)):
        say(line)


def _start_of_pruning(recipe: Any, out: Path) -> Any:
    """The bundle that pruning this recipe starts from; stages before it are run where they have not been."""
    from aum_compress.pipeline import run

    names = ("teacher",) if recipe.prune and recipe.prune.start == "teacher" else ("student", "distill")
    stages = [name for name in names if getattr(recipe, name) is not None]
    if not stages:
        raise AumError(f"{recipe.name}: has no student, so there is nothing to prune; add the section")
    # how the recipe would prune, and whether it could, does not matter here
    outcome = run(recipe.model_copy(update={"prune": None}), out, stages[-1])
    if outcome is None:
        raise AumError("prune --sensitivity: runs on one process; set devices: 1 and nodes: 1")
    return outcome.bundles[stages[-1]]
