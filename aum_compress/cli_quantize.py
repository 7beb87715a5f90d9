"""The verb `quantize`: the stage of that name, or what each tensor would cost."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from aum_compress.cli_options import Json, Out, Settings, print_json
from aum_compress.console import say, show
from aum_compress.errors import AumError

RunStage = Callable[[str, list[str] | None, str | None, Path | None, bool], None]
"""Runs a recipe, or that of a bundle, up to a stage: recipe or bundle, settings, stage, folder, JSON."""


def add_quantize(app: typer.Typer, run_stage: RunStage) -> None:
    """Adds the verb to `app`."""

    @app.command("quantize")
    def quantize(
        recipe_or_bundle: Annotated[
            str, typer.Argument(metavar="RECIPE|BUNDLE", help="Recipe, or a bundle of its run.")
        ],
        sensitivity: Annotated[
            bool,
            typer.Option(
                "--sensitivity", help="Quantise one tensor at a time and show what each costs; no stage runs."
            ),
        ] = False,
        clips: Annotated[int, typer.Option(min=1, help="To judge sensitivity on; never test clips.")] = 512,
        settings: Settings = None,
        out_dir: Out = None,
        as_json: Json = False,
    ) -> None:
        """Run a recipe up to the quantised student; stages that are done are skipped.

        With --sensitivity: of a float bundle, or of a recipe's last model before quantisation, what each tensor costs.
        """
        if sensitivity:
            _sensitivity(recipe_or_bundle, clips, settings, out_dir, as_json)
        else:
            run_stage(recipe_or_bundle, settings, "quantize", out_dir, as_json)


def _sensitivity(
    recipe_or_bundle: str, clips: int, settings: list[str] | None, out_dir: Path | None, as_json: bool
) -> None:
    from aum_compress.bundle import CARD, read_bundle, run_of_bundle
    from aum_compress.recipe import find_recipe, load_recipe

    named = Path(recipe_or_bundle)
    bundle = read_bundle(named) if (named / CARD).is_file() else None
    path, run_dir = run_of_bundle(named) if bundle else (find_recipe(recipe_or_bundle), Path())
    recipe = load_recipe(path, settings or [])

    from aum_compress.quantising import measure_sensitivity
    from aum_compress.report.sensitivity_table import sensitivity_lines, sensitivity_table
    from aum_compress.workspace import Workspace

    out = out_dir or run_dir
    if bundle is None:
        bundle = _last_float(recipe, out)
    found, file = measure_sensitivity(Workspace(recipe, out), bundle, clips)
    if as_json:
        print_json({"file": str(file), **found.to_dict()})
        return
    show(sensitivity_table(found.to_dict()))
    for line in (*sensitivity_lines(found.to_dict()), f"json: {file}"):
        say(line)


def _last_float(recipe: Any, out: Path) -> Any:
    """The bundle that quantisation of this recipe starts from; stages before it are run where they have not been."""
    from aum_compress.pipeline import run

    stages = [name for name in ("student", "distill", "prune") if getattr(recipe, name) is not None]
    if not stages:
        raise AumError(f"{recipe.name}: has no student, so there is nothing to quantise; add the section")
    outcome = run(recipe, out, stages[-1])
    if outcome is None:
        raise AumError("quantize --sensitivity: runs on one process; set devices: 1 and nodes: 1")
    return outcome.bundles[stages[-1]]
