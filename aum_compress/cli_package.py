"""The verb `package`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from aum_compress.cli_options import Json, Settings, print_json
from aum_compress.console import say
from aum_compress.errors import AumError


def package(
    bundle: Annotated[
        Path,
        typer.Argument(
            metavar="BUNDLE|PACK", help="The model for devices without one of their own, or a pack with all models."
        ),
    ],
    label: Annotated[str, typer.Option(metavar="NAME_INST_task1", help="The submission's label, without index.")],
    index: Annotated[int, typer.Option(min=1, max=4, help="Which of a team's submissions.")] = 1,
    folder: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Folder to write; one named like the label by default.")
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=BUNDLE", help="A model of its own for a recording device; repeatable."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="DIR|RECIPE", help="Labelled audio to measure the test accuracy on.")
    ] = None,
    settings: Settings = None,
    evaluation_set: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The challenge's evaluation set: its predictions are written.")
    ] = None,
    meta: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Authors, name, ...: keys of the meta file to fill in.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the inference package of DCASE 2025 Task 1, run and checked. Exit codes 3 over budget, 4 wrong answers."""
    from aum_compress.device_names import GENERAL
    from aum_compress.packs import is_pack, read_pack
    from aum_compress.submission.package import Packing, write_package

    devices = dict(_named_bundle(word) for word in device or [])
    if len(devices) < len(device or []):
        raise AumError("--device: one device has two models; wanted one for each")
    if is_pack(bundle):
        pack = read_pack(bundle)
        own = {name: pack.path / name for name in pack.card.models if name != GENERAL}
        bundle, devices = pack.path / GENERAL, own | devices
    packing = Packing(label, bundle, devices, index, data, settings or [], evaluation_set, meta)
    found = write_package(packing, folder or Path(label)).to_dict()
    if as_json:
        print_json(found)
        return
    for line in _lines(found):
        say(line)


def _named_bundle(word: str) -> tuple[str, Path]:
    name, separator, path = word.partition("=")
    if not separator or not name or not path:
        raise AumError(f"--device {word}: wanted NAME=BUNDLE, such as a=runs/NAME/08-devices/a")
    return name, Path(path)


def _lines(found: dict[str, Any]) -> list[str]:
    budget, complexity = found["budget"], found["complexity"]
    lines = [
        f"wrote {found['folder']}: run as the organisers do, it answers as its {len(budget['models'])} model(s) do",
        f"bytes: {budget['param_bytes']:,} stored; their script counts {complexity['max_Params']:,}",
        f"MACs: {budget['macs']:,} in all; their script, which sees no scan, counts {complexity['max_MACs']:,}",
    ]
    if found["test_accuracy"] is not None:
        lines.append(f"test accuracy, over all clips: {found['test_accuracy']:.2f} %")
    if found["predictions"] is not None:
        lines.append(f"output.csv: {found['predictions']:,} files")
    return lines
