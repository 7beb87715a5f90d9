"""If, Loop and Scan: their bodies, how often each runs, and the sizes of what they make. Torch-free."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import onnx
from onnx import helper

from aum_compress.budget.onnx_cost import Cost
from aum_compress.budget.onnx_values import Value, tensor_type
from aum_compress.errors import ModelFileError

CONTROL = ("If", "Loop", "Scan")
ENDLESS = 2**31 - 1
"""A trip count from here on stands for `until the condition fails`."""


@dataclass(frozen=True)
class BodyRun:
    """One run of a body."""

    outputs: Sequence[Value]
    cost: Cost
    peak_bytes: int | None


@dataclass(frozen=True)
class ControlRun:
    """All that a control-flow node does."""

    outputs: Sequence[Value]
    """Of its outputs, type and what else is known."""
    cost: Cost
    peak_bytes: int | None
    note: str = ""
    """What had to be assumed."""


class RunBody(Protocol):
    """Follows a body of the node at hand through one run with the given inputs."""

    def __call__(self, body: onnx.GraphProto, inputs: Sequence[Value]) -> BodyRun: ...


def run_if(node: onnx.NodeProto, condition: Value, run: RunBody) -> ControlRun:
    """The branch of more MACs, or then of more of anything; where the condition is constant, the one it chooses."""
    bodies = {name: helper.get_node_attr_value(node, f"{name}_branch") for name in ("then", "else")}
    if condition.content is not None:
        chosen = run(bodies["then" if condition.content.item() else "else"], ())
        return ControlRun(chosen.outputs, chosen.cost, chosen.peak_bytes)
    runs = {name: run(body, ()) for name, body in bodies.items()}
    larger = max(runs, key=lambda name: runs[name].cost.weight)  # of equal ones the first
    differ = runs["then"].cost.weight != runs["else"].cost.weight
    note = f"If {_title(node)}: counted for its more expensive branch, `{larger}`" if differ else ""
    outputs = [Value("", value.type) for value in runs[larger].outputs]
    return ControlRun(outputs, runs[larger].cost, _most_bytes(*(found.peak_bytes for found in runs.values())), note)


def run_loop(
    node: onnx.NodeProto, inputs: Sequence[Value | None], run: RunBody, trips: Mapping[str, int], source: str
) -> ControlRun:
    """The body times its trips. Values that change their size from trip to trip are followed through each.

    Args:
        trips: name of a Loop, or of one of its outputs -> trips to count.

    Raises:
        ModelFileError: the number of trips depends on values and is not in `trips`.
    """
    limit, condition, *carried = inputs if len(inputs) > 1 else (*inputs, None)
    given = next((trips[name] for name in (node.name, *node.output) if name in trips), None)
    count = _constant_trips(limit, condition) if given is None else given
    if count is None:
        raise ModelFileError(
            f"{source}: Loop {_title(node)}: how often it runs depends on values, so it cannot be counted; give the "
            f"number of trips: trips={{{_title(node)!r}: N}} (--trips {_title(node)}=N on the command line)"
        )
    body = helper.get_node_attr_value(node, "body")
    cost, peak, left = Cost(), 0, count
    while True:
        number = Value("", tensor_type(onnx.TensorProto.INT64, ()))
        goes_on = Value("", tensor_type(onnx.TensorProto.BOOL, ()))
        found = run(body, [number, goes_on, *(Value("", value.type) for value in carried)])
        last, made, scanned = found.outputs[0], found.outputs[1 : 1 + len(carried)], found.outputs[1 + len(carried) :]
        settled = all(one.type == two.type for one, two in zip(carried, made))
        times = left if settled else min(left, 1)
        cost.include(found.cost, times)
        peak = _most_bytes(peak, found.peak_bytes)
        left -= times
        carried = made if count else carried
        if not left:
            break
    outputs = [Value("", value.type) for value in carried]
    outputs += [Value("", tensor_type(value.element, (count, *value.shape))) for value in scanned]
    may_stop = not (last.content is not None and last.content.item()) and goes_on not in last.bases
    how = ", as given" if given is not None else ", the most it can make" if may_stop else ""
    return ControlRun(outputs, cost, peak, f"Loop {_title(node)}: counted for {count:,} trips{how}")


def _constant_trips(limit: Value | None, condition: Value | None) -> int | None:
    if condition is not None and condition.content is not None and not condition.content.item():
        return 0
    if limit is None or limit.content is None or limit.content.item() >= ENDLESS:
        return None
    return max(0, int(limit.content.item()))


def run_scan(node: onnx.NodeProto, inputs: Sequence[Value], run: RunBody) -> ControlRun:
    """The body times the length of what is scanned."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    scanned = attributes["num_scan_inputs"]
    states = len(inputs) - scanned
    axes = attributes.get("scan_input_axes", [0] * scanned)
    given, steps = [Value("", value.type) for value in inputs[:states]], 0
    for value, axis in zip(inputs[states:], axes):
        shape = list(value.shape)
        steps = shape.pop(axis)
        given.append(Value("", tensor_type(value.element, shape)))
    found = run(attributes["body"], given)
    cost = Cost()
    cost.include(found.cost, steps)
    outputs = [Value("", value.type) for value in inputs[:states]]
    made = found.outputs[states:]
    for value, axis in zip(made, attributes.get("scan_output_axes", [0] * len(made))):
        shape = list(value.shape)
        shape.insert(axis if axis >= 0 else len(shape) + 1 + axis, steps)
        outputs.append(Value("", tensor_type(value.element, shape)))
    return ControlRun(outputs, cost, found.peak_bytes)


def _title(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]


def _most_bytes(*peaks: int | None) -> int | None:
    return None if None in peaks else max(peaks)
