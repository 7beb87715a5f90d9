"""Opening an ONNX file for counting: whole, with its external data in place, and what it stores. Torch-free."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import helper

from aum_compress.bundle import Bundle
from aum_compress.errors import BundleError, ModelFileError, join_problems

INPUT_KEY = "input"
"""Key in `metadata_props` of files that aum-compress exports: the input specification as JSON."""
NARROW_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
GRAPH, GRAPHS = onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS


def read_onnx(path: Path) -> onnx.ModelProto:
    """The model, weights that lie outside the file not loaded but known to be whole.

    Raises:
        ModelFileError: no such file, not ONNX, cut short, or weights that are absent, too short, or outside the folder.
    """
    if not path.is_file():
        raise ModelFileError(f"{path}: no such file")
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
        raise ModelFileError(f"{path}: not an ONNX file, or one that was cut short ({error})") from None
    if not model.ir_version or not model.graph.node:
        raise ModelFileError(f"{path}: not an ONNX file: found no graph in it")
    if not model.opset_import:
        raise ModelFileError(
            f"{path}: not an ONNX file, or one that was cut short: it names no version of its operators"
        )
    imports = [*model.opset_import, *(entry for function in model.functions for entry in function.opset_import)]
    if wrong := [f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in imports if not 0 < entry.version < 2**31]:
        raise ModelFileError(f"{path}: names versions of operators that do not exist: {', '.join(wrong)}")
    tensors = list(stored_constants(model))
    external = [found for name, tensor in tensors if (found := _external_problem(name, tensor, path.parent))]
    if external:
        raise ModelFileError(
            join_problems(f"{path}: weights are stored in files beside it that are not whole:", external)
            + "\nCopy these files together with the model, or save it with its weights inside"
        )
    short = [problem for name, tensor in tensors if (problem := _inner_problem(name, tensor))]
    if short:
        raise ModelFileError(
            join_problems(f"{path}: weights are not whole:", short) + "\nExport or copy the file again"
        )
    return model


def exported_file(bundle: Bundle) -> Path:
    """The ONNX file that an exported bundle is measured by: the one that reads features or, where it was exported
    without, the one that reads a waveform.

    Raises:
        BundleError: neither is there.
    """
    names = [f"model-{bundle.card.precision}{reads}.onnx" for reads in ("", "-waveform")]
    if held := [name for name in names if name in bundle.card.files]:
        return bundle.path / held[0]
    raise BundleError(f"{bundle.path}: has neither {' nor '.join(names)}; export the model again")


def file_bytes(path: Path, model: onnx.ModelProto) -> int:
    """Size of the file and of the files beside it that hold its weights; `model` is what `read_onnx` made of it."""
    beside = {_external(tensor)["location"] for _, tensor in stored_constants(model) if _is_external(tensor)}
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in beside)


def input_record(model: onnx.ModelProto) -> dict | None:
    """The input specification in the file's metadata, or None in files of other makers."""
    for entry in model.metadata_props:
        if entry.key == INPUT_KEY:
            try:
                found = json.loads(entry.value)
            except ValueError:
                return None
            return found if isinstance(found, dict) else None
    return None


def input_sizes(
    model: onnx.ModelProto, source: str, dims: Mapping[str, int]
) -> tuple[dict[str, onnx.TypeProto], list[str]]:
    """Name of an input -> its type, every axis with a size; and the names of those whose batch is taken to be one.

    Inputs that are stored in the file, as files before IR 4 list them, are left out.

    Args:
        source: file name for messages.
        dims: size of each symbolic dimension; a leading axis that is open and not named here is a batch of one.

    Raises:
        ModelFileError: a dimension without a size, or one in `dims` that no input has.
    """
    stored = {tensor.name for tensor in model.graph.initializer}
    types: dict[str, onnx.TypeProto] = {}
    batches, problems, names = [], [], []
    for value in model.graph.input:
        if value.name in stored:
            continue
        types[value.name] = onnx.TypeProto()
        types[value.name].CopyFrom(value.type)
        if not value.type.HasField("tensor_type"):
            continue
        if not value.type.tensor_type.HasField("shape"):
            problems.append(f"input {value.name}: has no shape at all")
            continue
        for axis, dim in enumerate(types[value.name].tensor_type.shape.dim):
            names.append(dim.dim_param)
            if dim.HasField("dim_value") and dim.dim_value > 0:
                continue
            if dim.dim_param in dims:
                dim.dim_value = dims[dim.dim_param]
            elif axis == 0:
                dim.dim_value = 1
                batches.append(value.name)
            else:
                problems.append(f"input {value.name}, axis {axis}: {dim.dim_param or 'nameless'}")
    if problems:
        raise ModelFileError(
            join_problems(f"{source}: dynamic dimensions without a value, so MACs cannot be counted:", problems)
            + "\nGive each a size (--dim NAME=SIZE on the command line), or export the model with fixed sizes"
        )
    if foreign := [name for name in dims if name not in names]:
        known = ", ".join(sorted({name for name in names if name})) or "none"
        raise ModelFileError(f"{source}: no input has a dimension named {', '.join(foreign)}; named are: {known}")
    return types, batches


def all_graphs(model: onnx.ModelProto) -> Iterator[Iterable[onnx.NodeProto]]:
    """The nodes of the main graph, of each function, and of each body inside them."""
    lists = [model.graph.node, *(function.node for function in model.functions)]
    for nodes in lists:  # grows on the way
        yield nodes
        lists += [body.node for node in nodes for body in bodies(node)]


def bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs among the attributes of a node."""
    single = [attribute.g for attribute in node.attribute if attribute.type == GRAPH]
    return single + [graph for attribute in node.attribute if attribute.type == GRAPHS for graph in attribute.graphs]


Held = onnx.TensorProto | onnx.SparseTensorProto


def stored_constants(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Name and tensor of all that is stored: initialisers and constants of the graph, its bodies and functions.

    Of a sparse tensor these are its values and, under the same name with `.indices` behind it, their places.
    """
    yield from graph_constants(model.graph)
    for function in model.functions:
        yield from function_constants(function)


def graph_constants(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Those of a graph and its bodies."""
    yield from ((tensor.name, tensor) for tensor in graph.initializer)
    for tensor in graph.sparse_initializer:
        yield from _sparse_parts(tensor.values.name, tensor)
    yield from _node_constants(graph.node)


def function_constants(function: onnx.FunctionProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Those of a function, under the names that they have in it."""
    yield from _node_constants(function.node)


def _node_constants(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[str, onnx.TensorProto]]:
    for node in nodes:
        for body in bodies(node):
            yield from graph_constants(body)
        if node.op_type == "Constant":
            held = constant_of(node)
            if isinstance(held, onnx.SparseTensorProto):
                yield from _sparse_parts(node.output[0], held)
            elif held is not None:
                yield node.output[0], held


def _sparse_parts(name: str, tensor: onnx.SparseTensorProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    yield name, tensor.values
    yield f"{name}.indices", tensor.indices


def constant_of(node: onnx.NodeProto) -> Held | None:
    """What a Constant holds; None for text, and for what the call of a function fills in.

    Raises:
        ModelFileError: nothing, or something of another type than its name says.
    """
    kinds = onnx.AttributeProto
    for attribute in node.attribute if len(node.attribute) == 1 else ():
        if attribute.ref_attr_name:
            return None
        held = (attribute.name, attribute.type)
        if held == ("value", kinds.TENSOR):
            return attribute.t
        if held == ("sparse_value", kinds.SPARSE_TENSOR):
            return attribute.sparse_tensor
        if held == ("value_float", kinds.FLOAT):
            return helper.make_tensor("", onnx.TensorProto.FLOAT, [], [attribute.f])
        if held == ("value_int", kinds.INT):
            return helper.make_tensor("", onnx.TensorProto.INT64, [], [attribute.i])
        if held == ("value_floats", kinds.FLOATS):
            return helper.make_tensor("", onnx.TensorProto.FLOAT, [len(attribute.floats)], attribute.floats)
        if held == ("value_ints", kinds.INTS):
            return helper.make_tensor("", onnx.TensorProto.INT64, [len(attribute.ints)], attribute.ints)
        if held in (("value_string", kinds.STRING), ("value_strings", kinds.STRINGS)):
            return None
    found = ", ".join(str(attribute.name) for attribute in node.attribute) or "nothing"
    raise ModelFileError(f"Constant {node.output[:1]}: holds {found}, wanted one value; the file is damaged")


def stored_bytes(tensor: onnx.TensorProto) -> int:
    """Of the values of a tensor at its stored width; two of 4 bits share a byte."""
    return math.ceil(math.prod(tensor.dims) * bits(tensor.data_type) / 8)


def bits(data_type: int) -> int:
    """Width of a value; 0 for text, which has none, and for types that this version of onnx does not know."""
    if data_type not in onnx.TensorProto.DataType.values():
        return 0
    name = onnx.TensorProto.DataType.Name(data_type)
    if name in ("STRING", "UNDEFINED"):
        return 0
    return NARROW_BITS.get(name) or helper.tensor_dtype_to_np_dtype(data_type).itemsize * 8


def _is_external(tensor: onnx.TensorProto) -> bool:
    return tensor.data_location == onnx.TensorProto.EXTERNAL


def _external(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _external_problem(name: str, tensor: onnx.TensorProto, folder: Path) -> str | None:
    if not _is_external(tensor):
        return None
    entries = _external(tensor)
    location = entries.get("location", "")
    if not location:
        return f"{name}: no file named"
    file = folder / location
    # a model must not be able to name any other file of the machine that checks it
    if Path(location).is_absolute() or not file.resolve().is_relative_to(folder.resolve()):
        return f"{name}: {location}: outside the model's folder, wanted a file in {folder}"
    if not file.is_file():
        return f"{name}: {location}: absent"
    needed = stored_bytes(tensor)
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", needed))
    except ValueError:
        return f"{name}: {location}: offset or length is not a number"
    if offset < 0 or length != needed:
        return f"{name}: {location}: {length:,} bytes at {offset:,}, its shape {list(tensor.dims)} takes {needed:,}"
    if (size := file.stat().st_size) < offset + length:
        return f"{name}: {file.name} has {size:,} bytes, wanted at least {offset + length:,}"
    return None


def _inner_problem(name: str, tensor: onnx.TensorProto) -> str | None:
    if tensor.data_type not in onnx.TensorProto.DataType.values() or min(tensor.dims, default=0) < 0:
        return f"{name}: has type {tensor.data_type} and shape {list(tensor.dims)}, which do not exist"
    # a message is longer than its data; asking for the data itself would copy all weights
    if _is_external(tensor) or not bits(tensor.data_type) or not tensor.HasField("raw_data"):
        return None
    if tensor.ByteSize() < (needed := stored_bytes(tensor)):
        return f"{name}: shape {list(tensor.dims)} takes {needed:,} bytes, found {len(tensor.raw_data):,}"
    return None
