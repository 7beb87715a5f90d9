"""The verb `quantize`: the stage of that name, or what each tensor would cost."""

from pathlib import Path
from typing import Annotated

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


def quantize(
    recipe_or_bundle: RecipeOrBundle,
    sensitivity: Annotated[
        bool,
        typer.Option("--sensitivity", help="Quantise one tensor at a time and show what each costs."),
    ] = False,
    clips: Annotated[
        int | None, typer.Option(min=1, help="With --sensitivity, to judge on; never test clips. 512 when left out.")
    ] = None,
    settings: Settings = None,
    out_dir: Out = None,
    as_json: Json = False,
) -> None:
    """Run a recipe up to the quantised student; stages that are done are skipped.

    With --sensitivity: of a float bundle, or of a recipe's last model before quantisation, what each tensor costs.
    """
    if sensitivity:
        _sensitivity(recipe_or_bundle, clips or 512, settings, out_dir, as_json)
    else:
        only_with_sensitivity("quantize", {"--clips": clips})
        run_stages(recipe_or_bundle, settings, "quantize", out_dir, as_json)


def _sensitivity(
    recipe_or_bundle: str, clips: int, settings: list[str] | None, out_dir: Path | None, as_json: bool
) -> None:
    bundle = named_bundle(recipe_or_bundle)
    recipe, run_dir = named_recipe(recipe_or_bundle, settings)

    from aum_compress.quantising import measure_sensitivity
    from aum_compress.report.sensitivity_table import sensitivity_lines, sensitivity_table
    from aum_compress.workspace import Workspace

    out = out_dir or run_dir
    if bundle is None:
        bundle = last_bundle(recipe, out, ("student", "distill", "prune"), "quantize")
    found, file = measure_sensitivity(Workspace(recipe, out), bundle, clips)
    if as_json:
        print_json({"file": str(file), **found.to_dict()})
        return
    show(sensitivity_table(found.to_dict()))
    for line in (*sensitivity_lines(found.to_dict()), f"json: {file}"):
        say(line)
