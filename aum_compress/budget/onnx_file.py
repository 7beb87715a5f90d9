"""Opening an ONNX file for counting: whole, with every dimension known, functions inlined. Torch-free."""

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import inliner, shape_inference
from onnxscript.optimizer import fold_constants

from aum_compress.errors import ModelFileError, join_problems

TensorType = onnx.TypeProto.Tensor

INPUT_KEY = "input"
"""Key in `metadata_props` of files that aum-compress exports: the input specification as JSON."""


def read_onnx(path: Path) -> onnx.ModelProto:
    """The model, weights that lie outside the file not loaded but known to be whole.

    Raises:
        ModelFileError: no such file, not ONNX, cut short, or external data absent or too short.
    """
    if not path.is_file():
        raise ModelFileError(f"{path}: no such file")
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
        raise ModelFileError(f"{path}: not an ONNX file, or one that was cut short ({error})") from None
    if not model.ir_version or not model.graph.node:
        raise ModelFileError(f"{path}: not an ONNX file: found no graph in it")
    if model.graph.sparse_initializer:
        raise ModelFileError(f"{path}: holds sparse weights, whose bytes cannot be counted; save it with dense ones")
    problems = [
        problem for name, tensor in stored_constants(model) if (problem := _external_problem(name, tensor, path.parent))
    ]
    if problems:
        raise ModelFileError(
            join_problems(f"{path}: weights are stored in files beside it that are not whole:", problems)
            + "\nCopy these files together with the model, or save it with its weights inside"
        )
    return model


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


def open_batch(model: onnx.ModelProto, dims: Mapping[str, int]) -> list[str]:
    """Names of the inputs whose first axis has no size, and so is taken to be a batch of one."""
    shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    return [name for name, dim in shapes.items() if dim and not dim[0].dim_value > 0 and dim[0].dim_param not in dims]


def stored_constants(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Name and tensor of all that is stored: initialisers and constants of the graph, its bodies and functions."""
    yield from _graph_constants(model.graph)
    for function in model.functions:
        yield from _node_constants(function.node)


def _graph_constants(graph: onnx.GraphProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    yield from ((tensor.name, tensor) for tensor in graph.initializer)
    yield from _node_constants(graph.node)


def _node_constants(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[str, onnx.TensorProto]]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graph_constants(attribute.g)
            elif node.op_type == "Constant" and attribute.name == "value":
                yield node.output[0], attribute.t
            elif node.op_type == "Constant" and attribute.name == "value_floats":
                floats = attribute.floats
                yield node.output[0], onnx.helper.make_tensor("", onnx.TensorProto.FLOAT, [len(floats)], floats)


def _external_problem(name: str, tensor: onnx.TensorProto, folder: Path) -> str | None:
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    entries = {entry.key: entry.value for entry in tensor.external_data}
    file = folder / entries.get("location", "")
    if not file.is_file():
        return f"{name}: {entries.get('location', 'no file named')}: absent"
    end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
    if (size := file.stat().st_size) < end:
        return f"{name}: {file.name} has {size:,} bytes, wanted at least {end:,}"
    return None


def expand(model: onnx.ModelProto, source: str, dims: Mapping[str, int]) -> onnx.ModelProto:
    """A copy with fixed input sizes and its functions inlined.

    The `doc_string` of a node that came out of a function is the number of the node in `model.graph` that called it;
    that of every other node is empty.

    Args:
        source: file name for messages.
        dims: size of each symbolic dimension; a symbolic leading axis that is not named here is a batch of one.

    Raises:
        ModelFileError: a dimension without a value.
    """
    model = _without_weights(model)
    _fix_inputs(model, source, dims)
    functions = {(function.domain, function.name): function for function in model.functions}
    for node in (*model.graph.node, *(inner for function in model.functions for inner in function.node)):
        node.doc_string = ""
    for number, node in enumerate(model.graph.node):
        function = functions.get((node.domain, node.op_type))
        if function is None:
            continue
        # a function of its own for each call, so that its nodes can say whose they are
        own = onnx.FunctionProto()
        own.CopyFrom(function)
        own.name = node.op_type = f"{function.name}__{number}"
        for inner in own.node:
            inner.doc_string = str(number)
        model.functions.append(own)
    try:
        return inliner.inline_local_functions(model)
    except (RuntimeError, ValueError) as error:
        raise ModelFileError(f"{source}: functions cannot be inlined: {error}") from None


def settle_shapes(model: onnx.ModelProto, source: str) -> None:
    """Puts numbers in place of what the graph computes from sizes of its inputs, in place.

    onnx's own inference does not follow such arithmetic everywhere, and an open batch axis brings it in.

    Raises:
        ModelFileError: the graph contradicts itself.
    """
    try:
        fold_constants(model, onnx_shape_inference=True)
    except Exception as error:  # whatever the operator that is evaluated raises
        raise ModelFileError(f"{source}: sizes cannot be computed: {error}") from None


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose weights are inputs: sizes follow from theirs alone, copies stay small, and none is folded away."""
    light = onnx.ModelProto()
    light.CopyFrom(model)
    shapes = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT64]
    del light.graph.initializer[:]
    light.graph.initializer.extend(shapes)
    kept = {value.name for value in light.graph.input} | {tensor.name for tensor in shapes}
    for tensor in model.graph.initializer:
        if tensor.name not in kept:
            light.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return light


def _fix_inputs(model: onnx.ModelProto, source: str, dims: Mapping[str, int]) -> None:
    stored = {tensor.name for tensor in model.graph.initializer}
    problems = []
    for value in model.graph.input:
        if value.name in stored:  # files before IR 4 list weights among the inputs
            continue
        if not value.type.tensor_type.HasField("shape"):
            problems.append(f"input {value.name}: has no shape at all")
            continue
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_value") and dim.dim_value > 0:
                continue
            if dim.dim_param in dims:
                dim.dim_value = dims[dim.dim_param]
            elif axis == 0:
                dim.dim_value = 1
            else:
                problems.append(f"input {value.name}, axis {axis}: {dim.dim_param or 'nameless'}")
    if problems:
        raise ModelFileError(
            join_problems(f"{source}: dynamic dimensions without a value, so MACs cannot be counted:", problems)
            + "\nGive each a size, or export the model with fixed sizes"
        )


def infer(model: onnx.ModelProto, source: str) -> dict[str, TensorType]:
    """Name of a value in the main graph -> its type, as onnx's shape inference finds it.

    Raises:
        ModelFileError: the graph contradicts itself.
    """
    bare = copy.deepcopy(model)
    for (
        graph_output
    ) in bare.graph.output:  # declared symbolic names would win over the sizes that follow from the input
        graph_output.type.tensor_type.ClearField("shape")
    del bare.graph.value_info[:]
    try:
        inferred = shape_inference.infer_shapes(bare, strict_mode=True, data_prop=True)
    except (shape_inference.InferenceError, ValueError, RuntimeError) as error:
        raise ModelFileError(f"{source}: shapes do not fit together: {error}") from None
    graph = inferred.graph
    types = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info, *graph.output)}
    for tensor in graph.initializer:
        types[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims).tensor_type
    return types


def body_model(
    body: onnx.GraphProto, outer: onnx.ModelProto, inputs: Sequence[TensorType], types: Mapping[str, TensorType]
) -> onnx.ModelProto:
    """The body of a control-flow node as a model of its own, with the sizes that it is run with.

    Args:
        inputs: type of each body input.
        types: of the values around it, some of which the body may read.
    """
    body = copy.deepcopy(body)
    for value, found in zip(body.input, inputs):
        value.type.tensor_type.CopyFrom(found)
    made = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
    made |= {name for node in body.node for name in node.output}
    for name in {name for node in body.node for name in node.input} - made:
        if name in types:
            captured = body.input.add(name=name)
            captured.type.tensor_type.CopyFrom(types[name])
    return onnx.helper.make_model(body, opset_imports=outer.opset_import, ir_version=outer.ir_version)
