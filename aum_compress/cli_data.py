"""The verbs `recipes ...` and `data ...`."""

from pathlib import Path
from typing import Annotated

import typer

from aum_compress.cli_options import Json, RecipeArgument, Settings, print_json
from aum_compress.console import progress, say
from aum_compress.errors import AumError

recipes_app = typer.Typer(help="List, show and check recipes.", no_args_is_help=True, rich_markup_mode=None)
data_app = typer.Typer(help="Check, generate and split data.", no_args_is_help=True, rich_markup_mode=None)


@recipes_app.command("ls")
def recipes_ls() -> None:
    """The shipped recipes, a line each."""
    from aum_compress.recipe import recipe_head, recipes_folder

    for path in sorted(recipes_folder().glob("*.yaml")):
        head = recipe_head(path)
        say(f"{path.stem:24} {head[0] if head else ''}")


@recipes_app.command("show")
def recipes_show(recipe: RecipeArgument) -> None:
    """Print a recipe as it is written."""
    from aum_compress.recipe import find_recipe

    say(find_recipe(recipe).read_text(encoding="utf-8").rstrip())


@recipes_app.command("check")
def recipes_check(recipe: RecipeArgument, settings: Settings = None) -> None:
    """Validate a recipe and print it with all defaults filled in."""
    from aum_compress.recipe import dump_recipe, find_recipe, load_recipe

    say(dump_recipe(load_recipe(find_recipe(recipe), settings or [])).rstrip())


@recipes_app.command("keys")
def recipes_keys(
    section: Annotated[
        str | None, typer.Argument(metavar="SECTION", help="One section, such as train; all when left out.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="All as the tables of docs/recipes.md.")] = False,
) -> None:
    """Every key of a recipe: what it may be, its default, what it means."""
    from aum_compress.report.recipe_keys import keys_lines, keys_markdown

    if markdown:
        say(keys_markdown().rstrip())
        return
    try:
        lines = keys_lines(section)
    except KeyError as error:
        raise AumError(f"recipes keys {section}: no such section; there are {error.args[0]}") from None
    for line in lines:
        say(line)


@data_app.command("check")
def data_check(
    folder: Annotated[Path, typer.Argument(metavar="ROOT", help="A TAU tree, or one folder a class.")],
    sample_rate_hz: Annotated[int | None, typer.Option(min=1, help="Refuse files of any other rate.")] = None,
    clip_seconds: Annotated[float, typer.Option(min=0.01)] = 1.0,
    to: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the two lists go; ROOT when left out.")] = None,
    as_json: Json = False,
) -> None:
    """Read every file; write meta_clean.csv and rejected.csv with reasons. Exit code 2 when files were rejected."""
    from aum_compress.data.check import check_data, write_reports
    from aum_compress.report.tables import data_lines

    with progress("data check") as reporter:
        found = check_data(folder, sample_rate_hz=sample_rate_hz, clip_seconds=clip_seconds, progress=reporter.advance)
    clean, rejected = write_reports(found, to or folder)
    if as_json:
        print_json(found.summary())
    else:
        for line in data_lines(found.summary()):
            say(line)
        say(f"wrote {clean} and {rejected}")
    if found.bad:
        raise AumError(f"{folder}: {len(found.bad)} files cannot be used; {rejected} says why")


@data_app.command("synth")
def data_synth(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder; gets the TAU 2022 mobile layout.")],
    train_clips_per_class: Annotated[int, typer.Option(min=1)] = 160,
    test_clips_per_class: Annotated[int, typer.Option(min=1)] = 60,
    clip_seconds: Annotated[float, typer.Option(min=0.1)] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Generate synthetic soundscapes: ten scenes, nine devices, the same bytes for the same seed."""
    from aum_compress.data.config import SynthData
    from aum_compress.data.index import load_index

    config = SynthData(
        kind="synth",
        root=folder,
        seed=seed,
        clip_seconds=clip_seconds,
        train_clips_per_class=train_clips_per_class,
        test_clips_per_class=test_clips_per_class,
        validation_fraction=0,  # a recipe cuts that part; of one clip a class there is none to cut
    )
    with progress("soundscapes") as reporter:
        index = load_index(config, 0, reporter.advance)
    say(f"{folder}: {len(index.train) + len(index.validation)} training and {len(index.test)} test clips")


@data_app.command("split")
def data_split(
    recipe: RecipeArgument,
    to: Annotated[Path, typer.Option(metavar="DIR", help="Where train.csv, validation.csv and test.csv go.")],
    settings: Settings = None,
) -> None:
    """Write down how a recipe cuts its data: which clip is in which part."""
    from aum_compress.data.index import load_index
    from aum_compress.data.split_files import write_split
    from aum_compress.recipe import find_recipe, load_recipe

    loaded = load_recipe(find_recipe(recipe), settings or [])
    with progress("data") as reporter:
        index = load_index(loaded.data, loaded.seed, reporter.advance)
    for path, count in write_split(index, to):
        say(f"{path}  {count} clips")
