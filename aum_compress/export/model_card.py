"""What people want to know of exported files, in Markdown, from what the files say of themselves. Torch-free."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import onnx

from aum_compress.export.metadata import FEATURES, OnnxMetadata
from aum_compress.export.onnx_file import load_onnx

MODEL_CARD = "MODEL_CARD.md"
_LEGEND = (
    "Accuracy: % of test clips, mean over classes, of that very file in onnxruntime; - where it was not measured. What",
    "reads a waveform is the file that reads features with the front-end inside; parameters and MACs are those of",
    "the model alone, as DCASE counts.",
)
_METADATA = (
    "All that a runtime needs stands in the files' `metadata_props`, as JSON: labels, rates, clip length, front-end,",
    "normalisation, budget, accuracy, recipe.",
)


def model_card(files: Sequence[Path], accuracy: Mapping[str, float] | None = None) -> str:
    """The card of files that were exported together.

    Args:
        files: at least one; .onnx files.
        accuracy: name of a file -> % of test clips, mean over classes, measured on that file in onnxruntime.

    Raises:
        ModelFileError: a file that is not an exported one.
    """
    protos = {path: load_onnx(path) for path in files}
    known = {
        path: OnnxMetadata.from_props({entry.key: entry.value for entry in proto.metadata_props}, str(path))
        for path, proto in protos.items()
    }
    first = next(iter(known.values()))
    lines = [f"# {first.recipe or 'Exported model'}", "", *_purpose(first), "", "## Files", ""]
    lines += ["| file | reads | bytes | parameters, bytes | MACs a second | accuracy | operators |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|"]
    for path, metadata in known.items():
        lines.append(_file_row(path, metadata, (accuracy or {}).get(path.name), len(operators(protos[path]))))
    lines += ["", *_LEGEND, "", "## Input", ""]
    lines += [*_input(known.values()), "", "## Use", "", *_use(next(iter(known))), "", "## Operators", ""]
    for path, proto in protos.items():
        lines.append(f"- `{path.name}`: {', '.join(operators(proto))}")
    lines += ["", "## Origin", ""]
    recipe = f"recipe `{first.recipe or '-'}`, sha256 `{first.recipe_sha256 or '-'}`"
    lines += [f"- aum-compress {first.tool_version}, {recipe}"]
    lines += [f"- IR {_versions(protos)}, onnxruntime 1.20 or newer"]
    return "\n".join(lines) + "\n"


def operators(proto: onnx.ModelProto) -> list[str]:
    """ONNX operators that a file needs, those inside its own functions and bodies included; sorted."""
    own = {function.name for function in proto.functions}
    nodes = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    found = set()
    for node in nodes:  # grows on the way
        found.add(node.op_type)
        nodes += [inner for attribute in node.attribute for inner in attribute.g.node]
    return sorted(found - own)


def _versions(protos: Mapping[Path, onnx.ModelProto]) -> str:
    """IR and opset of files that were exported together."""
    proto = next(iter(protos.values()))
    opset = next(entry.version for entry in proto.opset_import if not entry.domain)
    return f"{proto.ir_version}, opset {opset}"


def _purpose(metadata: OnnxMetadata) -> Iterator[str]:
    yield f"Tells {len(metadata.labels)} classes of sound apart in clips of {metadata.clip_seconds:g} s:"
    yield f"{', '.join(metadata.labels)}."


def _file_row(path: Path, metadata: OnnxMetadata, accuracy: float | None, n_operators: int) -> str:
    budget = metadata.budget or {}
    numbers = [path.stat().st_size, budget.get("param_bytes"), budget.get("macs")]
    cells = ["-" if number is None else f"{number:,}" for number in numbers]
    cells += ["-" if accuracy is None else f"{accuracy:.1f}", str(n_operators)]
    return f"| `{path.name}` | {metadata.reads} | {' | '.join(cells)} |"


def _input(files: Iterable[OnnxMetadata]) -> Iterator[str]:
    for reads, metadata in {metadata.reads: metadata for metadata in files}.items():
        shape = ", ".join(map(str, metadata.input_shape))
        if reads == FEATURES:
            values = ", ".join(f"{key} {value}" for key, value in metadata.front_end.items() if value is not None)
            yield f"- `features` (1, {shape}) float32: ({values}) less {metadata.mean:g}, divided by {metadata.std:g}."
        else:
            yield (
                f"- `waveform` (1, {shape}) float32: mono samples at {metadata.waveform_rate_hz:,} Hz, full scale 1; "
                "16-bit integers are divided by 32768."
            )
    yield "- `logits` (1, classes) float32: softmax gives probabilities, in the order of the labels above."


def _use(path: Path) -> Iterator[str]:
    yield "```"
    yield f"aum-compress predict {path.name} recording.wav"
    yield "```"
    yield ""
    yield from _METADATA
