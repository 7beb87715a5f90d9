"""Two witnesses for bytes: what an ONNX file stores, and the tensors of the bundle that it was made from. Torch-free.

Tensors are matched by name. Each difference has one of the reasons that are listed here, or is an error.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from safetensors import safe_open

from aum_compress.budget.onnx_file import read_onnx, stored_bytes, stored_constants
from aum_compress.budget.onnx_front_end import front_end_tensors
from aum_compress.budget.onnx_stored import is_structure, scale_names
from aum_compress.errors import AumError, ModelFileError, join_problems

WIDTHS = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1}
"""Bytes of a value, by numpy's names of types (and bfloat16)."""
SAFETENSORS_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I8": "int8",
    "U8": "uint8",
}
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
QUANTISATION = ("weight_scale", "input_scale", "input_zero_point")
INTEGERS = ("int8", "int4")

SAME = "the same"
STRUCTURE = "structure of the graph, outside the budget: shapes, axes, single constants"
NEVER_READ = "count of training batches, which inference never reads"
FOLDED = "batch normalisation folded into the convolution before it"
FOLDED_BIAS = "bias that a folded batch normalisation gives its convolution"
QUANTISED = "quantised to int8 or int4"
SMOOTHED = "factors that smooth the inputs of a layer"
SCALES = "scale or zero point of quantisation"
NARROWED = "float32 in the bundle, stored as float16"
FRONT_END_TENSOR = "of the front-end inside the file, outside the budget"
KEPT_WIDE = "float16 in the bundle, kept in float32"


@dataclass(frozen=True)
class TensorBytes:
    """One tensor as file and bundle store it; 0 bytes where it is absent."""

    name: str
    onnx_bytes: int
    bundle_bytes: int
    reason: str
    """Why they differ, or that they do not."""


@dataclass(frozen=True)
class BytesExplained:
    """Every tensor of an ONNX file and of its bundle."""

    rows: tuple[TensorBytes, ...]

    @property
    def onnx_bytes(self) -> int:
        """Of all that the file stores, structure included."""
        return sum(row.onnx_bytes for row in self.rows)

    @property
    def bundle_bytes(self) -> int:
        return sum(row.bundle_bytes for row in self.rows)

    @property
    def by_reason(self) -> dict[str, int]:
        """Reason -> bytes that the file has more; together the difference of the two totals, to the byte."""
        found: dict[str, int] = {}
        for row in self.rows:
            if row.reason != SAME:
                found[row.reason] = found.get(row.reason, 0) + row.onnx_bytes - row.bundle_bytes
        return found

    @property
    def summary(self) -> str:
        """One line for a report."""
        parts = [f"{count:+,} {reason}" for reason, count in self.by_reason.items()]
        heading = f"bytes follow from the bundle's tensors: {self.bundle_bytes:,}"
        return f"{'; '.join((heading, *parts))}; {self.onnx_bytes:,} in the file"


def bundle_sizes(tensors: Path) -> dict[str, tuple[int, str]]:
    """Name of a tensor in a safetensors file -> its bytes and numpy's name of its type; values are not read.

    Raises:
        ModelFileError: the file cannot be read, or holds a type that no bundle has.
    """
    found: dict[str, tuple[int, str]] = {}
    try:
        with safe_open(tensors, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                entry = file.get_slice(name)
                kind = SAFETENSORS_TYPES.get(entry.get_dtype())
                if kind is None:
                    wanted = ", ".join(SAFETENSORS_TYPES)
                    raise ModelFileError(f"{tensors}: {name} is of type {entry.get_dtype()}, wanted one of {wanted}")
                found[name] = (math.prod(entry.get_shape()) * WIDTHS[kind], kind)
    except Exception as error:  # safetensors has a class of its own, which its stubs do not name
        if isinstance(error, ModelFileError):
            raise
        raise ModelFileError(f"{tensors}: cannot be read as safetensors: {error}; make the bundle again") from None
    return found


def explain_bytes(
    model: onnx.ModelProto | Path, stored: Mapping[str, tuple[int, str]], source: str = "model"
) -> BytesExplained:
    """Compares what an ONNX file stores with the bundle's tensors, name by name. A transposed weight is the same.

    Args:
        model: as `read_onnx` gives it, or the path of the file.
        stored: name of a tensor in the bundle -> its bytes and numpy's name of its type, such as "float16".
        source: of `model`, for messages.

    Raises:
        AumError: tensors that differ for no reason that is known here, each named with both sizes.
    """
    if isinstance(model, Path):
        source, model = str(model), read_onnx(model)
    in_file = dict(stored_constants(model))
    scales, front_end = scale_names(model), front_end_tensors(model)
    folded = {name.rpartition(".")[0] for name in stored if name.endswith(".running_mean") and name not in in_file}
    rows, problems = [], []
    for name in dict.fromkeys((*stored, *in_file)):
        own, (bundle_bytes, bundle_type) = in_file.get(name), stored.get(name, (0, ""))
        onnx_bytes = 0 if own is None else stored_bytes(own)
        if own is None:
            reason = _only_in_bundle(name, folded)
        elif name not in stored and name in front_end:
            reason = FRONT_END_TENSOR
        elif name not in stored:
            reason = _only_in_file(name, own, in_file, stored, scales, bool(folded))
        else:
            reason = _in_both(own, bundle_bytes, bundle_type)
        if reason:
            rows.append(TensorBytes(name, onnx_bytes, bundle_bytes, reason))
        else:
            kinds = "absent" if own is None else f"{onnx_bytes:,} bytes {_type(own)}"
            problems.append(
                f"{name}: {kinds} in the file, {bundle_bytes:,} bytes {bundle_type or '(absent)'} in the bundle"
            )
    if problems:
        raise AumError(
            join_problems(f"{source}: stored bytes do not follow from the bundle's tensors:", problems)
            + "\nExport the bundle again; if that does not help, the file was made from another one"
        )
    return BytesExplained(tuple(rows))


def _only_in_bundle(name: str, folded: set[str]) -> str:
    module, _, own = name.rpartition(".")
    if own == "num_batches_tracked":
        return NEVER_READ
    return FOLDED if module in folded and own in BATCH_NORM else ""


def _only_in_file(
    name: str,
    tensor: onnx.TensorProto,
    in_file: Mapping[str, onnx.TensorProto],
    stored: Mapping[str, tuple[int, str]],
    scales: set[str],
    some_folded: bool,
) -> str:
    module, _, own = name.rpartition(".")
    weight = f"{module}.weight"
    quantised = _type(in_file[weight]) in INTEGERS if weight in in_file else True  # scan inputs have no weight
    if own in QUANTISATION and name in scales and quantised:
        return SCALES
    if own == "input_factor" and f"{module}.input_scale" in in_file:
        return SMOOTHED
    if own == "bias" and some_folded and weight in stored and weight in in_file:
        return FOLDED_BIAS
    return STRUCTURE if is_structure(name, tensor, scales) else ""


def _in_both(tensor: onnx.TensorProto, bundle_bytes: int, bundle_type: str) -> str:
    file_type = _type(tensor)
    values = math.prod(tensor.dims)
    if file_type == "int4" and bundle_type == "uint8" and bundle_bytes == stored_bytes(tensor):
        return SAME  # two a byte in both
    if bundle_type not in WIDTHS or values * WIDTHS[bundle_type] != bundle_bytes:
        return ""
    if file_type == bundle_type:
        return SAME
    changes = {
        ("float32", "float16"): NARROWED,
        ("float16", "float32"): KEPT_WIDE,
        **{(wide, integer): QUANTISED for wide in ("float32", "float16") for integer in INTEGERS},
    }
    return changes.get((bundle_type, file_type), "")


def _type(tensor: onnx.TensorProto) -> str:
    """Numpy's name of a type; ONNX's own are those of C."""
    name = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)
