"""The command line: verbs without logic of their own. Results go to stdout, progress and logs to stderr.

Heavy packages are imported inside the verbs, so that `--help` answers at once.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from aum_compress import __version__
from aum_compress.cli_bench import bench
from aum_compress.cli_budget import budget_app
from aum_compress.cli_data import data_app, recipes_app
from aum_compress.cli_doctor import doctor
from aum_compress.cli_evaluate import evaluate
from aum_compress.cli_export import export
from aum_compress.cli_options import Json, Out, RecipeArgument, Settings, StageName, print_json
from aum_compress.cli_package import package
from aum_compress.cli_predict import predict
from aum_compress.cli_prune import prune
from aum_compress.cli_quantize import quantize
from aum_compress.cli_report import report
from aum_compress.cli_stages import RecipeOrBundle, run_stages
from aum_compress.cli_sweep import sweep
from aum_compress.console import log, log_error, say
from aum_compress.errors import AumError

INTERRUPTED, BROKEN_PIPE = 130, 141
"""Exit codes of Ctrl-C and of a reader that has gone, as shells have them: a gate may not have been reached."""


class _Guard(TyperGroup):
    """Turns expected errors into a message and their exit code; anything else is a bug and shows its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except AumError as error:
            log_error(str(error))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            log("interrupted. Finished stages are kept; the same command goes on from there")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # the reader has gone; what is still buffered for it must not fail once more at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE) from None
        except OSError as error:
            log_error(f"{error.filename or 'output'}: {error.strerror or error}. Free space or mend its permissions")
            raise typer.Exit(AumError.exit_code) from None


app = typer.Typer(
    cls=_Guard,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(budget_app, name="budget")
app.add_typer(recipes_app, name="recipes")
app.add_typer(data_app, name="data")


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Audio Mamba within 128 kB and 30 MMAC/s: run a compression recipe, check a budget, export and prove a model."""
    if version:
        say(__version__)
        raise typer.Exit


@app.command()
def run(
    recipe: RecipeArgument,
    settings: Settings = None,
    until: Annotated[StageName | None, typer.Option(help="Last stage to run; all of them when left out.")] = None,
    out_dir: Out = None,
    as_json: Json = False,
) -> None:
    """Run a recipe: from audio to verified ONNX files. Finished stages are kept and skipped the next time."""
    run_stages(recipe, settings, until and until.value, out_dir, as_json)


def _stage_verb(stages: str, until: str) -> Any:
    """A verb that runs a recipe, or the recipe of a bundle, up to one stage."""

    def verb(
        recipe_or_bundle: RecipeOrBundle,
        settings: Settings = None,
        out_dir: Out = None,
        as_json: Json = False,
    ) -> None:
        run_stages(recipe_or_bundle, settings, until, out_dir, as_json)

    verb.__doc__ = f"Run a recipe up to {stages}; stages that are done are skipped."
    return verb


app.command("train")(_stage_verb("the models that learn from labels alone: reference, teacher, student", "student"))
app.command("distill")(_stage_verb("the distilled student", "distill"))
app.command("sweep")(sweep)
app.command("doctor")(doctor)


app.command()(prune)
app.command()(quantize)
app.command()(export)


@app.command()
def verify(
    target: Annotated[Path, typer.Argument(metavar="BUNDLE|MODEL.onnx", help="An exported bundle or one file.")],
    reference: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="BUNDLE", help="The model that files must be equal to; once for float and once for quantised ones."
        ),
    ] = None,
    wav: Annotated[list[Path] | None, typer.Option(help="Recordings to compare on as well; repeatable.")] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="DIR|RECIPE", help="Labelled audio, on which it must be as accurate as the reference."),
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Prove that an ONNX file computes what it should. Exit code 4 when it does not."""
    from aum_compress.verifying import verify_target

    results, not_judged = verify_target(target, reference or [], wav or [], data, settings or [])
    if as_json:
        print_json([result.to_dict() for result in (*results, *not_judged)])
    else:
        for line in (line for result in (*results, *not_judged) for line in result.lines()):
            say(line)
    for result in results:
        result.enforce()


app.command()(evaluate)
app.command()(package)


app.command()(predict)


app.command()(bench)


app.command("report")(report)


def main() -> None:
    """Entry point of `aum-compress`."""
    app(prog_name="aum-compress")
