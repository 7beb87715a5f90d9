"""The verb `evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from aum_compress.cli_options import Json, Settings, print_json
from aum_compress.console import say
from aum_compress.errors import AumError


def evaluate(
    target: Annotated[Path, typer.Argument(metavar="BUNDLE|MODEL.onnx")],
    data: Annotated[str, typer.Option(metavar="DIR|RECIPE", help="Labelled audio, or a recipe's test part.")],
    compare: Annotated[
        Path | None,
        typer.Option(metavar="BUNDLE|MODEL.onnx", help="A second model, tested against the first on the same clips."),
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Write the answers in the format of DCASE Task 1.")
    ] = None,
    seen_devices: Annotated[
        str, typer.Option(metavar="a,b,c", help="Devices of training, where --data is a folder, which cannot say.")
    ] = "",
    draws: Annotated[int, typer.Option(min=0, help="Of the bootstrap over recordings; 0: no intervals.")] = 1000,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Accuracy by class, device and group of devices, with intervals; or whether two models differ."""
    from aum_compress.evaluate import measure
    from aum_compress.report.evaluation import comparison_lines, evaluation_lines

    if compare and predictions:
        raise AumError("--predictions: are those of one model; leave --compare out")
    devices = [name.strip() for name in seen_devices.split(",") if name.strip()]
    request = measure.Request(data, settings or [], devices, draws)
    if compare:
        found, lines = measure.compare(target, compare, request).to_dict(), comparison_lines
    else:
        found, lines = measure.evaluate(target, request, predictions).to_dict(), evaluation_lines
    if as_json:
        print_json(found)
        return
    if not compare:
        say(f"{found['model']} on {found['data']}, in {found['measured_with']}")
    for line in lines(found):
        say(line)
