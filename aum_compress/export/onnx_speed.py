"""Rewrites of an onnx_ir model that change no result: the same maths in nodes that onnxruntime has fast kernels for.

Measured by `benchmarks/student_latency.py`. Other runtimes gain too, or lose nothing.
"""

import numpy as np
import onnx_ir as ir

_BY_TOKEN, _CHANNELS_FIRST, _CHANNELS_LAST = [0, 2, 1], [0, 3, 1, 2], [0, 2, 3, 1]


def divide_by_root(model: ir.Model) -> None:
    """x * (1 / sqrt(v)) becomes x / sqrt(v), the form in which onnxruntime knows an RMSNorm and runs it as one node."""
    for node in list(model.graph):
        if node.op_type != "Reciprocal" or len(node.outputs[0].uses()) != 1:
            continue
        (use,) = node.outputs[0].uses()
        root = node.inputs[0].producer()
        if use.node.op_type != "Mul" or root is None or root.op_type != "Sqrt":
            continue
        other = use.node.inputs[1 - use.idx]
        _replace(model, use.node, ir.node("Div", [other, node.inputs[0]]), use.node)
        model.graph.remove(node, safe=True)


def activate_by_token(model: ir.Model) -> None:
    """transpose(x * sigmoid(x)) becomes t * sigmoid(t) with t = transpose(x): both transposes around a convolution then
    stand next to it, where onnxruntime makes them part of it."""
    for node in list(model.graph):
        product = node.inputs[0].producer() if node.op_type == "Transpose" else None
        if product is None or product.op_type != "Mul" or len(product.outputs[0].uses()) != 1:
            continue
        source, gate = product.inputs
        sigmoid = gate.producer()
        if sigmoid is None or sigmoid.op_type != "Sigmoid" or sigmoid.inputs[0] is not source:
            continue
        if len(source.uses()) != 2 or len(gate.uses()) != 1:
            continue
        moved = ir.node("Transpose", [source], attributes={"perm": node.attributes["perm"]})
        again = ir.node("Sigmoid", [moved.outputs[0]])
        made = ir.node("Mul", [moved.outputs[0], again.outputs[0]])
        for new, old in ((moved, node), (again, sigmoid), (made, product)):
            new.metadata_props.update(old.metadata_props)
        model.graph.insert_before(node, [moved, again])
        _replace(model, node, made, product)
        for old in (product, sigmoid):
            model.graph.remove(old, safe=True)


def convolve_in_two_dimensions(model: ir.Model) -> None:
    """A convolution along a sequence becomes one over an image of one row: onnxruntime runs a depthwise one of those by
    one kernel, ten times faster than channel by channel, and takes tokens (B,L,D) without turning them round first.

    Weights stay stored as they are; an int8 convolution has a kernel of its own and is left alone.
    """
    for node in list(model.graph):
        if node.op_type != "Conv" or node.inputs[1].const_value is None or len(node.inputs[1].const_value.shape) != 3:
            continue
        before, uses = node.inputs[0].producer(), node.outputs[0].uses()
        after = uses[0].node if len(uses) == 1 else None
        if not (_turns(before, _BY_TOKEN) and len(node.inputs[0].uses()) == 1 and _turns(after, _BY_TOKEN)):
            continue
        name = node.name or node.outputs[0].name
        row, flat = _axes(model, f"{name}_row", 1), _axes(model, f"{name}_flat", 2)
        image = ir.node("Unsqueeze", [before.inputs[0], row])
        first = ir.node("Transpose", [image.outputs[0]], attributes={"perm": _CHANNELS_FIRST})
        weight = ir.node("Unsqueeze", [node.inputs[1], flat])
        attributes = {key: attribute for key, attribute in node.attributes.items() if key == "group"}
        for key in ("strides", "dilations", "pads"):
            if key in node.attributes:
                given = list(node.attributes[key].as_ints())
                wide = [0, given[0], 0, given[1]] if key == "pads" else [1, *given]
                attributes[key] = ir.AttrInt64s(key, wide)
        made = ir.node("Conv", [first.outputs[0], weight.outputs[0], *node.inputs[2:]], attributes=attributes)
        last = ir.node("Transpose", [made.outputs[0]], attributes={"perm": _CHANNELS_LAST})
        tokens = ir.node("Squeeze", [last.outputs[0], row])
        origins = ((image, before), (first, before), (weight, node), (made, node), (last, after))
        for new, old in origins:
            new.metadata_props.update(old.metadata_props)
        model.graph.insert_before(node, [image, first, weight, made])
        model.graph.insert_before(after, last)
        _replace(model, after, tokens, after)
        for old in (node, before):
            model.graph.remove(old, safe=True)


def _turns(node: ir.Node | None, perm: list[int]) -> bool:
    return node is not None and node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == perm


def _axes(model: ir.Model, name: str, axis: int) -> ir.Value:
    tensor = ir.tensor(np.array([axis], dtype=np.int64), name=name)
    value = ir.Value(name=name, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64), const_value=tensor)
    model.graph.initializers[name] = value
    return value


def _replace(model: ir.Model, old: ir.Node, new: ir.Node, origin: ir.Node) -> None:
    """Puts `new` in the place of `old`; it is named after where `origin` came from."""
    new.metadata_props.update(origin.metadata_props)
    made, given = new.outputs[0], old.outputs[0]
    made.shape, made.type = given.shape, given.type
    given.replace_all_uses_with(made, replace_graph_outputs=True)
    model.graph.insert_before(old, new)
    model.graph.remove(old, safe=True)
