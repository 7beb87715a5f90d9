"""Bytes that an ONNX file stores, by layer. Torch-free."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx

from aum_compress.budget.onnx_file import (
    all_graphs,
    bits,
    function_constants,
    graph_constants,
    stored_bytes,
    stored_constants,
)
from aum_compress.budget.onnx_front_end import front_end_functions, front_end_tensors
from aum_compress.budget.onnx_values import layer_name
from aum_compress.budget.records import Stored, wide_values

MOST_STRUCTURE = 64
"""Values of the longest int64 tensor that is taken for a shape, axes or the like. A longer one may be a table or hold
weights, which a Cast makes of it, and has to be stored in either case."""
SCALES = {
    "QuantizeLinear": (1, 2),
    "DequantizeLinear": (1, 2),
    "QLinearConv": (1, 2, 4, 5, 6, 7),
    "QLinearMatMul": (1, 2, 4, 5, 6, 7),
    "ConvInteger": (2, 3),
    "MatMulInteger": (2, 3),
    "QLinearAdd": (1, 2, 4, 5, 6, 7),
    "QLinearMul": (1, 2, 4, 5, 6, 7),
    "QGemm": (1, 2, 4, 5, 7, 8),
    "QLinearSigmoid": (1, 2, 3, 4),
    "QLinearLeakyRelu": (1, 2, 3, 4),
    "QLinearSoftmax": (1, 2, 3, 4),
    "QLinearGlobalAveragePool": (1, 2, 3, 4),
    "QLinearAveragePool": (1, 2, 3, 4),
    "MatMulNBits": (2, 3),
    "DynamicQuantizeMatMul": (2, 3),
    "MatMulIntegerToFloat": (2, 3, 4, 5),
    "QAttention": (3, 4, 6, 7),
}
"""Operator, of the standard or not -> places of quantisation scales and zero points among its inputs."""


@dataclass(frozen=True)
class FileStored:
    """What a file stores, at its stored width."""

    layers: Mapping[str, Stored]
    """What counts, by layer."""
    front_end_bytes: int | None
    """Of a front-end inside the file, outside the budget; None where there is none."""
    structure_bytes: int
    """Left out: constants of structure, which no training has set."""


def onnx_stored(model: onnx.ModelProto) -> FileStored:
    """What a file stores. Structure are int64 shapes and axes, and single numbers such as an epsilon, but never a
    quantisation scale or zero point. A tensor that several nodes read is stored and counted once. Of a sparse tensor
    its values and their places count, as stored.
    """
    scales, packed = scale_names(model), _packed_weights(model)
    statistics = {
        name
        for nodes in all_graphs(model)
        for node in nodes
        if node.op_type == "BatchNormalization"
        for name in node.input[3:]
    }
    places = {f"{name}.indices" for name in _sparse_names(model)}
    layers: dict[str, Stored] = {}
    apart = left_out = 0
    for in_front_end, name, tensor in _constants(model):
        size = stored_bytes(tensor)
        if name not in places and is_structure(name, tensor, scales):
            left_out += size
            continue
        if in_front_end:
            apart += size
            continue
        own = Stored(size)
        if name not in scales | statistics | places:
            wide = wide_values(tensor.dims, bits(tensor.data_type))
            own = Stored(size, packed.get(name, math.prod(tensor.dims)), wide)
        layer = layer_name(name.removesuffix(".indices") if name in places else name)
        layers[layer] = layers.get(layer, Stored()) + own
    return FileStored(layers, apart if front_end_functions(model) else None, left_out)


def _constants(model: onnx.ModelProto) -> Iterator[tuple[bool, str, onnx.TensorProto]]:
    """All of `stored_constants`, and whether they belong to a front-end inside the file."""
    read, called = front_end_tensors(model), front_end_functions(model)
    for name, tensor in graph_constants(model.graph):
        yield name.removesuffix(".indices") in read, name, tensor
    for function in model.functions:
        for name, tensor in function_constants(function):
            yield (function.domain, function.name) in called, name, tensor


def is_structure(name: str, tensor: onnx.TensorProto, scales: set[str]) -> bool:
    """A constant that no training has set."""
    whole = tensor.data_type == onnx.TensorProto.INT64 and math.prod(tensor.dims) <= MOST_STRUCTURE
    return name not in scales and (whole or not tensor.dims)


def scale_names(model: onnx.ModelProto) -> set[str]:
    """Quantisation scales and zero points, also those that are handed to functions."""
    places = {**SCALES}
    found: set[str] = set()
    while True:
        for function in model.functions:
            inner = _scales_among(function.node, places)
            if own := tuple(place for place, name in enumerate(function.input) if name in inner):
                places[function.name] = own
        names = {name for nodes in all_graphs(model) for name in _scales_among(nodes, places)}
        if names == found:  # functions may be called by functions that stand before them
            return found
        found = names


def _scales_among(nodes: Iterable[onnx.NodeProto], places: Mapping[str, tuple[int, ...]]) -> set[str]:
    return {
        node.input[place]
        for node in nodes
        for place in places.get(node.op_type, ())
        if place < len(node.input) and node.input[place]
    }


def _packed_weights(model: onnx.ModelProto) -> dict[str, int]:
    """Name of a weight whose values share bytes -> how many it holds."""
    found = {}
    for nodes in all_graphs(model):
        for node in nodes:
            if node.op_type == "MatMulNBits":
                sizes = {attribute.name: attribute.i for attribute in node.attribute}
                found[node.input[1]] = sizes["K"] * sizes["N"]
    return found


def _sparse_names(model: onnx.ModelProto) -> list[str]:
    names = [name for name, _ in stored_constants(model) if name.endswith(".indices")]
    return [name.removesuffix(".indices") for name in names]
