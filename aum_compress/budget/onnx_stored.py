"""Bytes that an ONNX file stores, by layer. Torch-free."""

import math
from collections.abc import Iterable, Mapping

import onnx

from aum_compress.budget.onnx_file import all_graphs, bits, stored_bytes, stored_constants
from aum_compress.budget.onnx_values import layer_name
from aum_compress.budget.records import Stored, wide_values

FRONT_END = "front_end"
"""Layer of a file's own front-end, which is outside every budget."""
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


def onnx_stored(model: onnx.ModelProto) -> tuple[dict[str, Stored], int]:
    """Layer -> what the file stores of it, at its stored width, and the bytes left out.

    Left out are constants of structure, which no training has set: int64 shapes and axes, and single numbers such as an
    epsilon, but never a quantisation scale or zero point. A tensor that several nodes read is stored and counted once.
    Of a sparse tensor its values and their places count, as stored.
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
    left_out = 0
    for name, tensor in stored_constants(model):
        size = stored_bytes(tensor)
        if name not in places and is_structure(name, tensor, scales):
            left_out += size
            continue
        own = Stored(size)
        if name not in scales | statistics | places:
            wide = wide_values(tensor.dims, bits(tensor.data_type))
            own = Stored(size, packed.get(name, math.prod(tensor.dims)), wide)
        layer = layer_name(name.removesuffix(".indices") if name in places else name)
        layers[layer] = layers.get(layer, Stored()) + own
    return layers, left_out


def is_structure(name: str, tensor: onnx.TensorProto, scales: set[str]) -> bool:
    """A constant that no training has set."""
    return name not in scales and (tensor.data_type == onnx.TensorProto.INT64 or not tensor.dims)


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
