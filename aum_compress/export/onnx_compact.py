"""The same computation in fewer bytes and nodes: an int8 layer is one node, what passes between nodes has short names,
and nothing is said that is so by default.

Written out, an int8 layer is five nodes: QuantizeLinear and DequantizeLinear of its input, DequantizeLinear of its
weight, Cast of its bias, and the layer; a convolution has four more, which round its bias. Their names and those of the
values between them are a sixth of a student's file. Here they stand once, in a model-local function; runtimes inline
it, and fuse what they fused before.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import onnx
from onnx import defs, helper

from aum_compress.export.scan_function import SCAN_DOMAIN, SCAN_VERSION

_CONV_ATTRIBUTES = ("strides", "pads", "group", "dilations")


@dataclass(frozen=True)
class _Layer:
    """One kind of int8 layer."""

    operator: str
    """Of its product."""
    has_bias: bool
    weight_axis: int = 0
    """Axis of the weight's outputs, along which its scales run."""
    attributes: tuple[str, ...] = ()
    """Those that calls give."""
    fixed: Mapping[str, int] = field(default_factory=dict)
    """Those that stand in the function."""
    adds_bias: bool = False
    """By an Add behind the product."""
    rounds_bias: bool = False
    """To whole steps of the sums, as integer kernels have it."""

    @property
    def may_become_gemm(self) -> bool:
        """onnxruntime 1.21 makes QGemm of it, which fails where zero points of the weight are not as many as scales."""
        return self.operator == "Gemm" or self.adds_bias


_LAYERS = {
    "Int8Conv": _Layer("Conv", has_bias=True, attributes=_CONV_ATTRIBUTES, rounds_bias=True),
    "Int8Gemm": _Layer("Gemm", has_bias=True, fixed={"transB": 1}),
    "Int8Linear": _Layer("MatMul", has_bias=True, weight_axis=1, adds_bias=True),
    "Int8MatMul": _Layer("MatMul", has_bias=False, weight_axis=1),
}
"""Name of a function -> what it stands for; of two with the same operator the first that fits is taken."""
_ZERO_POINTS = (
    "n_scales = Shape (weight_scale)",
    "weight_zero_point = ConstantOfShape <value = int8[1] {0}> (n_scales)",
)
"""As many as scales, made when a session opens, so that none is stored."""
_ROUNDING = (
    "step = Mul (input_scale, weight_scale)",
    "bias_steps = Div (wide_bias, step)",
    "whole_steps = Round (bias_steps)",
    "whole_bias = Mul (whole_steps, step)",
)


def int8_function(name: str, opset: int) -> onnx.FunctionProto:
    """One of `aum_compress::Int8Conv`, `Int8Gemm`, `Int8Linear` and `Int8MatMul`: a layer of int8 weights on an input
    that is rounded to uint8.

    (x, input_scale, input_zero_point, weight, weight_scale[, bias]) to y; a bias may be float16.
    """
    layer = _LAYERS[name]
    formals = "x, input_scale, input_zero_point, weight, weight_scale" + ", bias" * layer.has_bias
    given = [f"{key}: {'int' if key == 'group' else 'ints'} = @{key}" for key in layer.attributes]
    given += [f"{key} = {value}" for key, value in layer.fixed.items()]
    product, attributes = "product" if layer.adds_bias else "y", f"<{', '.join(given)}>" if given else ""
    bias = (", whole_bias" if layer.rounds_bias else ", wide_bias") * (layer.has_bias and not layer.adds_bias)
    zero_points = ", weight_zero_point" * layer.may_become_gemm
    lines = (
        "levels = QuantizeLinear (x, input_scale, input_zero_point)",
        "rounded = DequantizeLinear (levels, input_scale, input_zero_point)",
        *(_ZERO_POINTS * layer.may_become_gemm),
        f"wide_weight = DequantizeLinear <axis = {layer.weight_axis}> (weight, weight_scale{zero_points})",
        *(["wide_bias = Cast <to = 1> (bias)"] * layer.has_bias),
        *(_ROUNDING * layer.rounds_bias),
        f"{product} = {layer.operator} {attributes} (rounded, wide_weight{bias})",
        *(["y = Add (product, wide_bias)"] * layer.adds_bias),
    )
    head = f'<domain: "{SCAN_DOMAIN}", opset_import: ["": {opset}]>'
    declared = f"<{', '.join(layer.attributes)}>" if layer.attributes else ""
    signature = f"{name} {declared} ({formals}) => (y)"
    return onnx.parser.parse_function("\n".join((head, signature, "{", *lines, "}")))


def compact(proto: onnx.ModelProto) -> None:
    """Makes a finished graph smaller, in place; each stored tensor keeps its name and value."""
    opset = next(entry.version for entry in proto.opset_import if not entry.domain)
    for node in proto.graph.node:
        _drop_defaults(node, opset)
    wrapped = _wrap_int8_layers(proto)
    proto.functions.extend(int8_function(name, opset) for name in sorted(wrapped))
    for function in proto.functions:
        for node in function.node:
            _drop_defaults(node, opset)
    _shorten(proto.graph)


def put_calls(proto: onnx.ModelProto, replaced: Sequence[tuple[Sequence[onnx.NodeProto], onnx.NodeProto]]) -> None:
    """Puts each call of one of our functions where the last of the nodes stands that it is to replace."""
    calls = {id(nodes[-1]): call for nodes, call in replaced}
    gone = {id(node) for nodes, _ in replaced for node in nodes}
    nodes = [calls.get(id(node), node) for node in proto.graph.node if id(node) in calls or id(node) not in gone]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    if replaced and SCAN_DOMAIN not in {entry.domain for entry in proto.opset_import}:
        proto.opset_import.append(helper.make_opsetid(SCAN_DOMAIN, SCAN_VERSION))


def _drop_defaults(node: onnx.NodeProto, opset: int) -> None:
    if node.domain:
        return
    schema = defs.get_schema(node.op_type, opset)
    defaults = {name: attribute.default_value for name, attribute in schema.attributes.items()}
    kept = [attribute for attribute in node.attribute if not _is_default(node, attribute, defaults)]
    if len(kept) < len(node.attribute):
        del node.attribute[:]
        node.attribute.extend(kept)


def _is_default(node: onnx.NodeProto, attribute: onnx.AttributeProto, defaults: dict[str, onnx.AttributeProto]) -> bool:
    if attribute.ref_attr_name:
        return False
    value, default = helper.get_attribute_value(attribute), defaults[attribute.name]
    if default.name:
        return value == helper.get_attribute_value(default)
    # those of a convolution have no fixed default, since their length is that of the kernel, which the weight tells
    ones = attribute.name in ("strides", "dilations") and set(value) == {1}
    zeros = attribute.name == "pads" and set(value) == {0}
    return node.op_type == "Conv" and (ones or zeros or attribute.name == "kernel_shape")


def _shorten(graph: onnx.GraphProto) -> None:
    """Numbers for the values between nodes, and no name for what only widens a stored tensor: with a name a tensor, it
    would be said three times. Nodes, tensors, inputs and outputs keep their names."""
    kept = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    numbers = (name for number in count() if (name := f"v{number}") not in kept)
    short = {name: next(numbers) for node in graph.node for name in node.output if name and name not in kept}
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [short.get(name, name) for name in names]
        if node.op_type == "Cast":
            node.ClearField("name")


def _wrap_int8_layers(proto: onnx.ModelProto) -> set[str]:
    """Calls in place of the nodes of int8 layers; returns the names of the functions."""
    found = _Int8Layers(proto.graph)
    calls: list[tuple[list[onnx.NodeProto], onnx.NodeProto]] = []
    for node in proto.graph.node:
        for name, layer in _LAYERS.items():
            if node.op_type == layer.operator and not node.domain and (parts := found.parts(node, layer)):
                inputs, replaced = parts
                attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
                given = {key: value for key, value in attributes.items() if key in layer.attributes}
                call = helper.make_node(name, inputs, replaced[-1].output, node.name, domain=SCAN_DOMAIN, **given)
                calls.append((replaced, call))
                break
    put_calls(proto, calls)
    return {call.op_type for _, call in calls}


class _Int8Layers:
    """Finds the nodes of int8 layers in a graph."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.makers = {name: node for node in graph.node for name in node.output}
        self.readers = {name: node for node in graph.node for name in node.input}
        self.uses = Counter(name for node in graph.node for name in node.input)
        self.uses.update(output.name for output in graph.output)
        self.stored = {tensor.name for tensor in graph.initializer}

    def parts(self, product: onnx.NodeProto, layer: _Layer) -> tuple[list[str], list[onnx.NodeProto]] | None:
        """Inputs of the call, and the nodes that it stands for, the last one at the end; None for any other form."""
        rest = {a.name: helper.get_attribute_value(a) for a in product.attribute if a.name not in layer.attributes}
        n_inputs = 2 + (layer.has_bias and not layer.adds_bias)
        if rest != layer.fixed or len(product.input) != n_inputs:
            return None
        rounded = self._made_by(product.input[0], "DequantizeLinear")
        levels = rounded and self._made_by(rounded.input[0], "QuantizeLinear")
        weight = self._made_by(product.input[1], "DequantizeLinear")
        if not levels or not weight or len(levels.input) != 3 or levels.input[1:] != rounded.input[1:]:
            return None
        axis = next((attribute.i for attribute in weight.attribute if attribute.name == "axis"), 1)
        if axis != layer.weight_axis or len(weight.input) != 2 or not self.stored.issuperset(weight.input):
            return None
        inputs, replaced = [*levels.input, *weight.input], [levels, rounded, weight, product]
        if not layer.has_bias:
            return inputs, replaced
        bias = product.input[2] if not layer.adds_bias else ""
        if layer.adds_bias:
            addition = self.readers.get(product.output[0])
            if addition is None or addition.op_type != "Add" or self.uses[product.output[0]] != 1:
                return None
            (bias,) = (name for name in addition.input if name != product.output[0])
            replaced.append(addition)
        if layer.rounds_bias:
            rounding = self._rounding(bias, levels.input[1], weight.input[1])
            if rounding is None:
                return None
            replaced[:0] = rounding
            bias = rounding[1].input[0]
        cast = self._made_by(bias, "Cast")
        inputs.append(cast.input[0] if cast else bias)
        if inputs[-1] not in self.stored:
            return None
        return inputs, [cast, *replaced] if cast else replaced

    def _rounding(self, bias: str, input_scale: str, weight_scale: str) -> list[onnx.NodeProto] | None:
        """The nodes of `_ROUNDING`, in its order, that make `bias`; None where other nodes do."""
        whole = self._made_by(bias, "Mul")
        rounded = whole and self._made_by(whole.input[0], "Round")
        steps = rounded and self._made_by(rounded.input[0], "Div")
        if not steps or steps.input[1] != whole.input[1] or self.uses[step := steps.input[1]] != 2:
            return None
        made = self.makers.get(step)
        if made is None or made.op_type != "Mul" or list(made.input) != [input_scale, weight_scale]:
            return None
        return [made, steps, rounded, whole]

    def _made_by(self, name: str, operator: str) -> onnx.NodeProto | None:
        """The node that makes `name`, for one reader alone."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type == operator and self.uses[name] == 1 else None
