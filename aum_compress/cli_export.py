"""The verb `export`: a bundle, or an exported file that is to get its front-end inside."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from aum_compress.console import say
from aum_compress.errors import AumError
from aum_compress.recipe_checks import CUMULATIVE_SUM, NO_CUMULATIVE_SUM


class Input(StrEnum):
    features = "features"
    waveform = "waveform"


class Scan(StrEnum):
    scan = "scan"
    chunked = "chunked"
    unrolled = "unrolled"


def _scan_form(word: str) -> Scan:
    """The form of that name."""
    if word in CUMULATIVE_SUM:
        raise AumError(f"--scan {word}: {NO_CUMULATIVE_SUM}")
    if word not in list(Scan):
        raise typer.BadParameter(f"{word!r} is not one of {', '.join(map(repr, map(str, Scan)))}.")
    return Scan(word)


class FilePrecision(StrEnum):
    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"
    int4 = "int4"
    mixed = "mixed"


class Format(StrEnum):
    onnx = "onnx"
    ort = "ort"


def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="BUNDLE|MODEL.onnx", help="A bundle that holds a model; or an exported file that reads features."
        ),
    ],
    folder: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="Folder to write; of a bundle's export, replaced as a whole.")
    ],
    precision: Annotated[
        list[FilePrecision] | None,
        typer.Option(help="fp32 or fp16 of a float bundle; a quantised one has its own. Repeatable."),
    ] = None,
    reads: Annotated[
        list[Input] | None,
        typer.Option("--input", help="What the files read; repeatable, both when left out."),
    ] = None,
    input_rate: Annotated[
        int | None,
        typer.Option(min=1, metavar="HZ", help="Of the samples that a waveform file reads and resamples."),
    ] = None,
    file_format: Annotated[
        Format,
        typer.Option(
            "--format",
            help="ort: onnxruntime's own format beside each .onnx file, and the operators of a reduced build.",
        ),
    ] = Format.onnx,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch", help="Leave the batch axis open; it is 1 otherwise.")
    ] = False,
    scan: Annotated[
        Scan,
        typer.Option(
            parser=_scan_form,
            metavar=f"<{'|'.join(Scan)}>",
            help="How a recurrence is written; chunked and unrolled need no control flow.",
        ),
    ] = Scan.scan,
) -> None:
    """Export the model of one bundle to ONNX, with and without its front-end, and verify it."""
    inputs = tuple(dict.fromkeys(kind.value for kind in reads or Input))
    if input_rate and "waveform" not in inputs:
        raise AumError("--input-rate: is of files that read waveforms; leave it out, or add --input waveform")
    ort = file_format is Format.ort
    if source.suffix == ".onnx":
        if precision or dynamic_batch or scan != Scan.scan or inputs == ("features",):
            raise AumError(
                f"{source}: an exported file only gets its front-end inside, or another format; --precision, "
                "--dynamic-batch, --scan and --input features are for the export of a bundle"
            )
        as_it_is = ort and reads is None and input_rate is None
        _convert(source if as_it_is else _with_front_end(source, folder, input_rate), folder, ort)
        return

    from aum_compress.bundle import read_bundle
    from aum_compress.exporting import ExportOptions, export_bundle
    from aum_compress.models.storage import QUANTISED
    from aum_compress.publish import file_name

    bundle = read_bundle(source)
    default = (bundle.card.precision,) if bundle.card.precision in QUANTISED else ("fp32", "fp16")
    precisions = tuple(p.value for p in precision) if precision else default
    export_bundle(bundle, folder, ExportOptions(precisions, inputs, input_rate, dynamic_batch, scan.value, ort))
    for name in precisions:
        for kind in inputs:
            say(f"{folder / file_name(name, kind)}  verified")
            if ort:
                say(f"{(folder / file_name(name, kind)).with_suffix('.ort')}  equal to it")
    if ort:
        _say_operators(folder)


def _with_front_end(source: Path, folder: Path, input_rate: int | None) -> Path:
    from aum_compress.exporting import add_front_end

    target, held = add_front_end(source, folder, input_rate)
    unknown = f"; no golden.npz beside {source.name} says whether its model is right"
    say(f"{target}  {'verified' if held else 'front-end verified' + unknown}")
    return target


def _convert(source: Path, folder: Path, ort: bool) -> None:
    from aum_compress.export.onnx_file import make_plain_folder
    from aum_compress.export.ort_format import CONFIG, required_operators, write_ort

    if ort:
        make_plain_folder(folder)
        target = (folder / source.name).with_suffix(".ort")
        write_ort(source, target)
        # one build serves all files there: those of earlier calls stay in its list of operators
        (folder / CONFIG).write_text(required_operators(sorted(folder.glob("*.ort"))), encoding="utf-8")
        say(f"{target}  equal to {source.name}")
        _say_operators(folder)


def _say_operators(folder: Path) -> None:
    from aum_compress.export.ort_format import CONFIG, operator_names

    names = operator_names((folder / CONFIG).read_text(encoding="utf-8"))
    say(f"{folder / CONFIG}  {len(names)} operators: {', '.join(names)}")
