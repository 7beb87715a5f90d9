"""Functions: those that a model defines, with their attributes filled in, and those by which the standard defines
operators. Torch-free."""

from collections.abc import Mapping, Sequence

import onnx
from onnx import defs

from aum_compress.budget.onnx_file import GRAPH
from aum_compress.budget.onnx_values import Value


def bound(function: onnx.FunctionProto, call: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The nodes of a function, attributes that they take from the call filled in."""
    attributes = {attribute.name: attribute for attribute in (*function.attribute_proto, *call.attribute)}
    if not function.attribute and not function.attribute_proto:
        return list(function.node)
    return [_filled(node, attributes) for node in function.node]


def _filled(node: onnx.NodeProto, attributes: Mapping[str, onnx.AttributeProto]) -> onnx.NodeProto:
    if not any(attribute.ref_attr_name or attribute.type == GRAPH for attribute in node.attribute):
        return node
    filled = onnx.NodeProto()
    filled.CopyFrom(node)
    del filled.attribute[:]
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            if attribute.ref_attr_name not in attributes:
                continue  # left out by the call, so that the operator's own default holds
            own = filled.attribute.add()
            own.CopyFrom(attributes[attribute.ref_attr_name])
            own.name = attribute.name
            continue
        own = filled.attribute.add()
        own.CopyFrom(attribute)
        if attribute.type == GRAPH:
            inner = [_filled(child, attributes) for child in attribute.g.node]
            del own.g.node[:]
            own.g.node.extend(inner)
    return filled


def definition(
    node: onnx.NodeProto, schema: defs.OpSchema, inputs: Sequence[Value | None]
) -> onnx.FunctionProto | None:
    """The function by which the standard defines an operator, for inputs of these types; None where it has none.

    The attributes of `node` are filled in.
    """
    found = onnx.FunctionProto()
    if schema.has_function:
        found.CopyFrom(schema.function_body)
        if schema.attributes:
            del found.attribute_proto[:]
            defaults = {name: attribute.default_value for name, attribute in schema.attributes.items()}
            found.attribute_proto.extend(value for value in defaults.values() if value.name)
        return found
    if schema.has_context_dependent_function:
        types = [b"" if value is None else value.type.SerializeToString() for value in inputs]
        found.ParseFromString(schema.get_context_dependent_function(node.SerializeToString(), types))
        return found
    return None
