"""What the verbs that run stages share: the recipe, or the bundle of its run, that they are given."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aum_compress.cli_options import print_json
from aum_compress.errors import AumError

if TYPE_CHECKING:
    from aum_compress.bundle import Bundle
    from aum_compress.recipe_schema import Recipe

RecipeOrBundle = Annotated[str, typer.Argument(metavar="RECIPE|BUNDLE", help="Recipe, or a bundle of its run.")]


def run_stages(
    recipe_or_bundle: str, settings: list[str] | None, until: str | None, out_dir: Path | None, as_json: bool
) -> None:
    """Runs a recipe up to a stage, all of them when `until` is None, and shows the report."""
    recipe, run_dir = named_recipe(recipe_or_bundle, settings)

    from aum_compress.pipeline import run
    from aum_compress.report.tables import print_report

    outcome = run(recipe, out_dir or run_dir, until)
    if outcome is None:  # one of several processes: the first one shows what came of it
        return
    if as_json:
        print_json(outcome.report)
    else:
        print_report(outcome.report, outcome.folder)


def only_with_sensitivity(verb: str, options: Mapping[str, object]) -> None:
    """Raises AumError where one of `options` (name -> value, None where it was not given) would change nothing."""
    if given := [option for option, value in options.items() if value is not None]:
        raise AumError(
            f"{verb}: {', '.join(given)} was given, which belongs to --sensitivity. Add --sensitivity, or say in the "
            f"recipe how to {verb}: --set {verb}.KEY=VALUE"
        )


def named_recipe(recipe_or_bundle: str, settings: list[str] | None) -> tuple["Recipe", Path]:
    """The recipe, that of a bundle's run where it is one, and the folder that has its runs/."""
    from aum_compress.bundle import run_of_bundle
    from aum_compress.recipe import find_recipe, load_recipe

    if _is_bundle(recipe_or_bundle):
        path, run_dir = run_of_bundle(Path(recipe_or_bundle))
    else:
        path, run_dir = find_recipe(recipe_or_bundle), Path()
    return load_recipe(path, settings or []), run_dir


def named_bundle(recipe_or_bundle: str) -> "Bundle | None":
    """The bundle; None where a recipe is named."""
    from aum_compress.bundle import read_bundle

    return read_bundle(Path(recipe_or_bundle)) if _is_bundle(recipe_or_bundle) else None


def last_bundle(recipe: "Recipe", out: Path, names: tuple[str, ...], verb: str) -> "Bundle":
    """Of the last of the stages `names` that the recipe has; stages up to it are run where they have not been.

    Args: verb: that wants it, for messages.
    """
    from aum_compress.pipeline import run

    stages = [name for name in names if getattr(recipe, name) is not None]
    if not stages:
        raise AumError(f"{recipe.name}: has no student, so there is nothing to {verb}; add the section")
    outcome = run(recipe, out, stages[-1])
    if outcome is None:
        raise AumError(f"{verb} --sensitivity: runs on one process; set devices: 1 and nodes: 1")
    return outcome.bundles[stages[-1]]


def _is_bundle(recipe_or_bundle: str) -> bool:
    from aum_compress.bundle import CARD

    return (Path(recipe_or_bundle) / CARD).is_file()
