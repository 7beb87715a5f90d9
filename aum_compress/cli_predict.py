"""The verb `predict`: recordings, or sound while it comes in. Torch-free."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aum_compress.cli_options import Json, print_json
from aum_compress.console import say
from aum_compress.errors import AumError

if TYPE_CHECKING:
    from aum_compress.export.runtime import Classifier

STDIN = "-"
_BYTES_A_SAMPLE = 2


def predict(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="An exported file: .onnx or .ort.")],
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="WAV...",
            help="Recordings of any rate, channels, length; or - for 16-bit samples from standard input, as arecord "
            "-f S16_LE -t raw gives them.",
        ),
    ],
    hop: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="From one window to the next; a window's length when left out."),
    ] = None,
    rate: Annotated[int | None, typer.Option(min=1, metavar="HZ", help="Of standard input.")] = None,
    channels: Annotated[int, typer.Option(min=1, help="Of standard input.")] = 1,
    threads: Annotated[int, typer.Option(min=0, help="0: as onnxruntime chooses.")] = 0,
    as_json: Json = False,
) -> None:
    """What is heard: a line for each window, and the vote of each recording. Works without torch.

    From standard input a line comes as soon as its window is full; with --json, one JSON value a line.
    """
    from aum_compress.export.runtime import Classifier

    if STDIN in files and (len(files) > 1 or rate is None):
        raise AumError("-: standard input is heard alone and does not say its rate: predict MODEL - --rate 48000")
    if STDIN not in files and (rate is not None or channels != 1):
        raise AumError("--rate and --channels: are of standard input (-); a recording says them itself")
    classifier = Classifier(model, intra_op_num_threads=threads)
    if STDIN in files:
        _hear(classifier, rate, channels, hop, as_json)
        return
    failed, records = [], []
    for file in files:
        try:
            prediction = classifier.classify_file(Path(file), hop_seconds=hop)
        except AumError as error:  # the other recordings are answered all the same
            failed.append(str(error))
            continue
        if as_json:
            records.append({"file": file, **prediction.to_dict()})
        else:
            for line in prediction.lines(file):
                say(line)
    if as_json:
        print_json(records)
    if failed:
        raise AumError("\n".join(failed))


def _hear(classifier: "Classifier", rate: int, channels: int, hop: float | None, as_json: bool) -> None:
    import numpy as np

    from aum_compress.export.stream import Stream

    stream = Stream(classifier, rate, hop_seconds=hop)
    frame = _BYTES_A_SAMPLE * channels
    rest, ended = b"", False
    while not ended:
        content = sys.stdin.buffer.read1(frame * max(1, rate // 10))
        ended = not content
        whole = len(rest + content) // frame * frame
        taken, rest = (rest + content)[:whole], (rest + content)[whole:]
        samples = np.frombuffer(taken, dtype="<i2").reshape(-1, channels) / np.float32(32768)
        for heard in [*stream.feed(samples), *(stream.finish() if ended else [])]:
            line = json.dumps(heard.to_dict()["windows"][0]) if as_json else heard.lines("")[1]
            print(line, flush=True)  # now, not when a buffer is full
    if not stream.seconds:
        raise AumError("-: no samples came from standard input")
