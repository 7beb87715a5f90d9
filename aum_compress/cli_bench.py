"""The verb `bench`."""

from typing import Annotated

import typer

from aum_compress.cli_options import Json, print_json
from aum_compress.console import say


def bench(
    target: Annotated[
        str, typer.Argument(metavar="BUNDLE|MODEL.onnx|PRESET", help="What to time; a file may be a .ort too.")
    ],
    against: Annotated[
        str | None, typer.Option(metavar="BUNDLE|MODEL.onnx|PRESET", help="To compare with, in the same run.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Each file runs once a round.")] = 200,
    dim: Annotated[
        list[str] | None,
        typer.Option("--dim", metavar="NAME=SIZE", help="Size of an open dimension of an input; repeatable."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Time, memory and load time of ONNX files in onnxruntime. Bundles of a model and presets are exported first."""
    from aum_compress.benching import bench as measure
    from aum_compress.benching import bench_lines
    from aum_compress.budget.targets import named_counts

    found = measure(target, against, rounds, named_counts("--dim", dim or []))
    if as_json:
        print_json(found)
    else:
        for line in bench_lines(found):
            say(line)
