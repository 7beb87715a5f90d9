"""Third witness: MACs and elementwise operations of an ONNX graph, by layer, and the bytes that it stores. Torch-free.

Works on any ONNX file. A layer is what names a node's weights have in common (`layers.0.mixer.in_proj.weight` belongs
to `layers.0.mixer.in_proj`); nodes without weights count for the graph itself, named "".
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

import onnx
from onnx import helper

from aum_compress.budget.analytic import einsum_macs
from aum_compress.budget.onnx_file import TensorType, body_model, expand, infer, settle_shapes, stored_constants
from aum_compress.budget.operators import MAC, ONNX_FREE, ONNX_POOLS, ONNX_READ, ONNX_WRITTEN
from aum_compress.budget.records import Operations, Stored, wide_values
from aum_compress.errors import AumError, ModelFileError, join_problems

SCAN_FUNCTION = ("aum_compress", "SelectiveScan")
"""Domain and name of the model-local function that `export` writes around a scan."""

STANDARD = ("", "ai.onnx")
CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv", "ConvTranspose")
PRODUCTS = (*CONVOLUTIONS, "MatMul", "MatMulInteger", "QLinearMatMul", "Gemm", "Einsum")
BIAS = {"Conv": 2, "ConvTranspose": 2, "QLinearConv": 8, "Gemm": 2}
"""Place of the bias among the inputs."""
NARROW_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
SCALES = ("QuantizeLinear", "DequantizeLinear")
PASSED = ("Cast", "DequantizeLinear", "Exp", "Identity", "Neg", "QuantizeLinear", "Reshape", "Transpose", "Unsqueeze")
"""Operators through which a weight stays recognisable as one."""
KNOWN = frozenset((*PRODUCTS, *ONNX_WRITTEN, *ONNX_READ, *ONNX_POOLS, *ONNX_FREE, "Scan"))


@dataclass(frozen=True)
class _Call:
    """A node that calls a model-local function."""

    layer: str
    is_scan: bool


class _Origins:
    """Where values of a graph come from."""

    def __init__(self, graph: onnx.GraphProto, weights: Set[str]) -> None:
        self.makers = {name: node for node in graph.node for name in node.output}
        self.weights = weights
        self.silu_gates = {
            gate for node in graph.node if node.op_type == "Mul" for gate in node.input if self._gates(gate, node)
        }
        """Outputs of a Sigmoid that its own input is multiplied by: the two nodes are one SiLU."""

    def _gates(self, gate: str, product: onnx.NodeProto) -> bool:
        maker = self.makers.get(gate)
        return maker is not None and maker.op_type == "Sigmoid" and maker.input[0] in product.input

    def layer(self, node: onnx.NodeProto) -> str:
        """By the first weight among the inputs; "" without one."""
        for name in node.input:
            if weight := self._weight_behind(name):
                return layer_name(weight)
        return ""

    def _weight_behind(self, name: str) -> str | None:
        while name not in self.weights:
            maker = self.makers.get(name)
            if maker is None or maker.op_type not in PASSED:
                return None
            name = maker.input[0]
        return name


@dataclass(frozen=True)
class _Scope:
    """A graph under count: the main one, or the body of a Scan with all that surrounds it."""

    model: onnx.ModelProto
    types: Mapping[str, TensorType]
    origins: _Origins
    source: str
    calls: Mapping[str, _Call]
    enclosing: _Call | None = None
    in_scan: bool = False
    """In the body of a Scan, where every product is a MAC and every sum belongs to one."""

    def shape(self, name: str, node: onnx.NodeProto) -> tuple[int, ...]:
        found = self.types.get(name)
        if found is not None and found.HasField("shape"):
            sizes = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in found.shape.dim)
            if min(sizes, default=0) >= 0:
                return sizes
        raise ModelFileError(
            f"{self.source}: {node.op_type} {node.name or node.output[0]}: the size of {name!r} does not follow from "
            "those of the inputs, so it cannot be counted; export the model with fixed sizes"
        )

    def size(self, name: str, node: onnx.NodeProto) -> int:
        return math.prod(self.shape(name, node))

    def call(self, node: onnx.NodeProto) -> _Call | None:
        """The function call that the node came out of."""
        return self.enclosing if self.in_scan else self.calls.get(node.doc_string)


def layer_name(weight: str) -> str:
    """The layer that a tensor belongs to: its name without the last part."""
    return weight.rpartition(".")[0] if "." in weight else weight


def onnx_operations(
    model: onnx.ModelProto, source: str, dims: Mapping[str, int] | None = None
) -> dict[str, Operations]:
    """Layer -> operations in one run of the graph. A `Scan` body counts once for every step.

    A product counts as a MAC inside a Scan and inside the function `aum_compress::SelectiveScan`, elsewhere as the
    elementwise operation `multiply`; a SiLU's own product belongs to the SiLU.

    Args:
        source: file name for messages.
        dims: size of each symbolic input dimension; a leading one not named here is a batch of one.

    Raises:
        ModelFileError: a dimension without a value, or sizes that do not follow from the inputs.
        AumError: an operator that is neither counted nor known as free.
    """
    origins = _Origins(model.graph, _weights(model))
    calls = {
        str(number): _Call(origins.layer(node), (node.domain, node.op_type) == SCAN_FUNCTION)
        for number, node in enumerate(model.graph.node)
    }
    whole = expand(model, source, dims or {})
    _refuse_unknown(whole.graph, source)
    settle_shapes(whole, source)
    scope = _Scope(whole, infer(whole, source), _Origins(whole.graph, origins.weights), source, calls)
    found: dict[str, Counter[str]] = defaultdict(Counter)
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    _count_graph(scope, 1, found, kinds)
    return {
        layer: Operations(own.pop(MAC, 0), dict(sorted(own.items())), kinds[layer].most_common(1)[0][0])
        for layer, own in found.items()
    }


def _refuse_unknown(graph: onnx.GraphProto, source: str) -> None:
    unknown: list[str] = []
    graphs = [graph]
    for inner in graphs:  # grows on the way
        for node in inner.node:
            if node.op_type not in KNOWN or node.domain not in STANDARD:
                operator = "::".join(filter(None, (node.domain, node.op_type)))
                unknown.append(f"{node.name or node.output[0]}: {operator}")
            elif node.op_type == "Scan":
                graphs.append(helper.get_node_attr_value(node, "body"))
    if unknown:
        raise AumError(
            join_problems(f"{source}: operators whose cost is unknown, and which cannot count as zero:", unknown)
            + "\nGive them a place in aum_compress/budget/operators.py, as arithmetic or as free"
        )


def _weights(model: onnx.ModelProto) -> set[str]:
    scales = _scale_names(model)
    return {
        name
        for name, tensor in stored_constants(model)
        if name in scales or (math.prod(tensor.dims) > 1 and tensor.data_type != onnx.TensorProto.INT64)
    }


def _scale_names(model: onnx.ModelProto) -> set[str]:
    """Quantisation scales and zero points."""
    return {name for node in model.graph.node if node.op_type in SCALES for name in node.input[1:]}


def _count_graph(scope: _Scope, times: int, found: dict[str, Counter[str]], kinds: dict[str, Counter[str]]) -> None:
    """Adds, layer by layer, to `found` what a graph that runs `times` times computes, to `kinds` what its MACs are."""
    for node in scope.model.graph.node:
        call = scope.call(node)
        layer = call.layer if call else scope.origins.layer(node)
        if node.op_type == "Scan":
            body, steps = _scan_body(scope, node)
            _count_graph(body, times * steps, found, kinds)
            continue
        for kind, count in _count_node(scope, node).items():
            if count:
                found[layer][kind] += count * times
                kinds[layer][_kind(scope, node)] += count * times if kind == MAC else 0


def _kind(scope: _Scope, node: onnx.NodeProto) -> str:
    call = scope.call(node)
    if scope.in_scan or (call is not None and call.is_scan):
        return "scan"
    if node.op_type in PRODUCTS:
        return "conv" if node.op_type in CONVOLUTIONS else "linear"
    return "elementwise"


def _scan_body(scope: _Scope, node: onnx.NodeProto) -> tuple[_Scope, int]:
    """The body of a Scan with the sizes of one step, and the number of steps."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    scanned = attributes["num_scan_inputs"]
    axes = attributes.get("scan_input_axes", [0] * scanned)
    states = len(node.input) - scanned
    inputs = []
    steps = 0
    for place, name in enumerate(node.input):
        shape = list(scope.shape(name, node))
        if place >= states:
            steps = shape.pop(axes[place - states])
        inputs.append(helper.make_tensor_type_proto(scope.types[name].elem_type, shape).tensor_type)
    model = body_model(attributes["body"], scope.model, inputs, scope.types)
    body = replace(
        scope,
        model=model,
        types=infer(model, scope.source),
        origins=_Origins(model.graph, scope.origins.weights),
        enclosing=scope.call(node) or _Call(scope.origins.layer(node), is_scan=False),
        in_scan=True,
    )
    return body, steps


def _count_node(scope: _Scope, node: onnx.NodeProto) -> Counter[str]:
    """Operations of one node that stands for itself."""
    operator = node.op_type
    if operator in ONNX_FREE:
        return Counter()
    if operator in PRODUCTS:
        return _product(scope, node)
    if operator in ONNX_READ:
        return Counter({ONNX_READ[operator]: scope.size(node.input[0], node)})
    if operator in ONNX_POOLS:
        window = next(attribute.ints for attribute in node.attribute if attribute.name == "kernel_shape")
        return Counter({"pool": scope.size(node.output[0], node) * math.prod(window)})
    found = scope.types.get(node.output[0])
    integer = found is not None and found.elem_type == onnx.TensorProto.INT64
    if integer or node.output[0] in scope.origins.silu_gates:
        return Counter()  # arithmetic on shapes; or counted with the product that makes it a SiLU
    written = scope.size(node.output[0], node)
    if operator == "Mul" and scope.origins.silu_gates.intersection(node.input):
        return Counter({"silu": written})
    call = scope.call(node)
    if scope.in_scan or (call is not None and call.is_scan):
        if operator == "Mul":
            return Counter({MAC: written})
        if operator == "Add":
            return Counter()  # follows a product, and so belongs to its MAC
    return Counter({ONNX_WRITTEN[operator]: written})


def _product(scope: _Scope, node: onnx.NodeProto) -> Counter[str]:
    """MACs of a node that multiplies matrices or convolves, and the additions of its bias."""
    operator = node.op_type
    written = scope.size(node.output[0], node)
    if operator in CONVOLUTIONS:
        taps = math.prod(scope.shape(node.input[3 if operator == "QLinearConv" else 1], node)[1:])
        # every value of the input of a transposed convolution meets every tap, every one of the output of the others
        macs = taps * (scope.size(node.input[0], node) if operator == "ConvTranspose" else written)
    elif operator == "Einsum":
        equation = helper.get_node_attr_value(node, "equation").decode()
        macs = einsum_macs(equation, [scope.shape(name, node) for name in node.input])
    elif operator == "Gemm":
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        macs = written * scope.shape(node.input[0], node)[0 if transposed else 1]
    else:
        macs = written * scope.shape(node.input[0], node)[-1]
    found = Counter({MAC: macs})
    if len(node.input) > BIAS.get(operator, len(node.input)) and node.input[BIAS[operator]]:
        found["add"] = written
    return found


def onnx_stored(model: onnx.ModelProto) -> tuple[dict[str, Stored], int]:
    """Layer -> what the file stores of it, at its stored width, and the bytes left out.

    Left out are constants of structure, which no training has set: int64 shapes and axes, and single numbers such as an
    epsilon, but never a quantisation scale or zero point. A tensor that several nodes read is stored and counted once.
    """
    scales = _scale_names(model)
    statistics = {name for node in model.graph.node if node.op_type == "BatchNormalization" for name in node.input[3:]}
    layers: dict[str, Stored] = {}
    left_out = 0
    for name, tensor in stored_constants(model):
        values = math.prod(tensor.dims)
        size = math.ceil(values * _bits(tensor.data_type) / 8)
        if name not in scales and (tensor.data_type == onnx.TensorProto.INT64 or not tensor.dims):
            left_out += size
            continue
        own = Stored(size)
        if name not in scales | statistics:
            own = Stored(size, values, wide_values(tensor.dims, _bits(tensor.data_type)))
        layers[layer_name(name)] = layers.get(layer_name(name), Stored()) + own
    return layers, left_out


def _bits(data_type: int) -> int:
    """Width of a stored value."""
    name = onnx.TensorProto.DataType.Name(data_type)
    if name in NARROW_BITS:
        return NARROW_BITS[name]
    return helper.tensor_dtype_to_np_dtype(data_type).itemsize * 8
