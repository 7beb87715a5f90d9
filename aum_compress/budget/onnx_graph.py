"""Third witness: MACs, elementwise operations and peak memory of an ONNX graph, by layer. Torch-free.

Works on any ONNX file. A layer is what names a node's weights have in common (`layers.0.mixer.in_proj.weight` belongs
to `layers.0.mixer.in_proj`); a node without weights counts for the node or function around it, at last for the graph
itself, named "". The graph is followed node by node, into functions and bodies, with the sizes of one run.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from aum_compress.budget.analytic import scan_macs
from aum_compress.budget.onnx_contrib import contrib_function, is_contrib
from aum_compress.budget.onnx_control import CONTROL, BodyRun, ControlRun, run_if, run_loop, run_scan
from aum_compress.budget.onnx_cost import COUNTED, Cost, node_operations, source_of
from aum_compress.budget.onnx_file import input_sizes
from aum_compress.budget.onnx_front_end import FRONT_END_FUNCTIONS
from aum_compress.budget.onnx_functions import bound, definition
from aum_compress.budget.onnx_memory import Step, peak_bytes
from aum_compress.budget.onnx_recurrence import Neighbourhood, around_recurrences, is_recurrence, silu_gates
from aum_compress.budget.onnx_stored import is_structure, scale_names
from aum_compress.budget.onnx_values import (
    FLOATING,
    Origin,
    Scope,
    Unsized,
    Value,
    constant_value,
    outputs_of,
    schema_of,
    stored_value,
)
from aum_compress.budget.operators import MAC, ONNX_BY_DEFINITION
from aum_compress.budget.records import Operations
from aum_compress.errors import AumError, ModelFileError, join_problems

SCAN_DOMAIN, SCAN_PREFIX = "aum_compress", "SelectiveScan"
"""Domain, and how the names begin, of the model-local functions that `export` writes around a scan."""
TWO_WAY = ("FoBi", "BiBi")
"""How they go on where two directions are in one."""

KNOWN = COUNTED.union(CONTROL, ONNX_BY_DEFINITION)
MALFORMED = (AttributeError, IndexError, KeyError, TypeError, ValueError)
"""Raised where a node lacks attributes or inputs, or has such of another type, or names that are no text."""


@dataclass(frozen=True)
class GraphCost:
    """What one run of a graph computes and needs."""

    operations: Mapping[str, Operations]
    """Layer -> operations."""
    front_end: Operations | None
    """Of a front-end inside the file, which no layer has; None where there is none."""
    peak_activation_bytes: int | None
    """None where the size of a value depends on other values; see `onnx_memory` for what is assumed."""
    notes: tuple[str, ...]
    """What had to be assumed: trips, branches, the batch."""


def measure_graph(
    model: onnx.ModelProto, source: str, dims: Mapping[str, int] | None = None, trips: Mapping[str, int] | None = None
) -> GraphCost:
    """Follows one run of the graph.

    A function `aum_compress::SelectiveScan...` counts what the definition of a selective scan costs, in whatever form
    its recurrence is written. Elsewhere a product counts as a MAC in and around a Scan or a Loop that carries
    floating-point values, else as the elementwise operation `multiply`. A SiLU's own product belongs to
    the SiLU. A body counts once for every step or trip; of two branches the more expensive one counts. Integers that
    follow from constants and sizes alone are shapes and axes, and not counted.

    Args:
        source: file name for messages.
        dims: size of each symbolic input dimension; a leading one not named here is a batch of one.
        trips: name of a Loop, or of one of its outputs -> trips to count; needed where their number depends on values.

    Raises:
        ModelFileError: a dimension without a value, sizes that do not follow from the inputs or contradict each other,
            a Loop whose trips are unknown.
        AumError: an operator that is neither counted nor known as free.
    """
    types, batches = input_sizes(model, source, dims or {})
    walk = _Walk(model, source, trips or {})
    scope = walk.main = Scope(_opsets(model.opset_import))
    inputs = [Value(name, kind) for name, kind in types.items()]
    found = walk.graph(model.graph, scope, inputs)
    if walk.unknown:
        raise AumError(
            join_problems(f"{source}: operators whose cost is unknown, and which cannot count as zero:", walk.unknown)
            + "\nGive them a place in aum_compress/budget/operators.py, as arithmetic or as free"
        )
    if foreign := (trips or {}).keys() - walk.loops:
        raise ModelFileError(f"{source}: no Loop is named, or makes, {', '.join(sorted(foreign))}")
    notes = list(dict.fromkeys(walk.notes))
    if batches:
        notes.append(f"input {', '.join(batches)} is open in its first axis: counted for a batch of one")
    if found.peak_bytes is None:
        notes.append("peak activation bytes are unknown: the size of a value depends on other values")
    return GraphCost(found.cost.operations(), walk.front_end.operations().get(""), found.peak_bytes, tuple(notes))


def _opsets(imports: Sequence[onnx.OperatorSetIdProto]) -> dict[str, int]:
    return {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in imports}


class _LostBody(Exception):
    """A body that makes something from an unknown operator."""


class _Walk:
    """One pass over a model. Problems with operators are collected, so that all are named at once."""

    def __init__(self, model: onnx.ModelProto, source: str, trips: Mapping[str, int]) -> None:
        self.source = source
        self.trips = trips
        self.functions = {(function.domain, function.name): function for function in model.functions}
        self.scales = scale_names(model)
        self.unknown: list[str] = []
        self.notes: list[str] = []
        self.main: Scope | None = None
        """Of the main graph, which alone calls a front-end."""
        self.front_end = Cost()
        self.loops: set[str] = set()
        """Names that `trips` may use."""

    def graph(self, graph: onnx.GraphProto, scope: Scope, inputs: Sequence[Value]) -> BodyRun:
        """One run of the main graph, or of a body whose inputs stand in `inputs` in their order."""
        for tensor in graph.initializer:
            scope.values[tensor.name] = stored_value(tensor.name, tensor, self._is_weight(tensor.name, tensor))
        for tensor in graph.sparse_initializer:
            scope.values[tensor.values.name] = stored_value(tensor.values.name, tensor, is_weight=True)
        names = [value.name for value in graph.input if scope.outer is not None or value.name not in scope.values]
        for name, value in zip(names, inputs):
            value.name = name
            scope.values[name] = value
        cost = Cost()
        steps = self._nodes(graph.node, scope, cost)
        outputs = [self._read(scope, output.name, "an output of the graph") for output in graph.output]
        return BodyRun(outputs, cost, peak_bytes(inputs, steps, outputs))

    def _nodes(self, nodes: Sequence[onnx.NodeProto], scope: Scope, cost: Cost) -> list[Step]:
        """Gives `scope` what the nodes make, `cost` what they compute, and says what they do to memory."""
        for node in nodes:
            if node.op_type == "Constant" and len(node.attribute) == 1:
                held = node.attribute[0].t
                scope.values[node.output[0]] = constant_value(node, self._is_weight(node.output[0], held))
        gates = silu_gates(nodes)
        near = Neighbourhood() if scope.is_scan or scope.recurs else around_recurrences(nodes, scope, gates)
        steps: list[Step] = []
        for node in nodes:
            if node.op_type == "Constant":
                continue
            inputs = [self._read(scope, name, _title(node)) if name else None for name in node.input]
            try:
                steps += self._node(node, inputs, scope, cost, gates, near)
            except Unsized as error:
                raise ModelFileError(
                    f"{self.source}: {node.op_type} {_title(node)}: the size of {str(error)!r} does not follow from "
                    "those of the inputs, so it cannot be counted; export the model with fixed sizes"
                ) from None
            except MALFORMED as error:
                raise ModelFileError(
                    f"{self.source}: {node.op_type} {_title(node)}: is not what ONNX defines ({error}); the file is "
                    "damaged or its exporter in error: see what onnx.checker.check_model says of it"
                ) from None
        return steps

    def _node(
        self,
        node: onnx.NodeProto,
        inputs: Sequence[Value | None],
        scope: Scope,
        cost: Cost,
        gates: set[str],
        near: Neighbourhood,
    ) -> Sequence[Step]:
        given = [value for value in inputs if value is not None]
        local = self.functions.get((node.domain, node.op_type))
        if local is not None:
            return self._call(node, local, inputs, scope, cost)
        schema = schema_of(node, scope.opsets)
        if schema is None:
            is_known = is_contrib(node)
        else:  # the first Scan took its batch apart
            is_known = node.op_type in KNOWN and not (node.op_type == "Scan" and schema.since_version < 9)
        if not is_known:
            return self._refuse(node, scope)
        if any(value.is_lost for value in given):
            return self._lose(node, scope)
        if schema is not None and node.op_type in CONTROL:
            return self._control(node, inputs, scope, cost)
        if schema is not None and node.op_type in COUNTED:
            made = outputs_of(node, inputs, scope.opsets, self.source)
            self._take(node, made, scope)
            # of what is made from constants, integers are sizes and axes; floats are tables, which torch computes too
            if any(value.origin is not Origin.STRUCTURE or value.element in FLOATING for value in made):
                in_recurrence = scope.recurs or scope.is_scan
                found = node_operations(node, inputs, made, gates, near, in_recurrence)
                source = source_of(node, in_recurrence or node.output[0] in near.products)
                cost.add(scope.layer_of(node), source, found)
            return [Step(given, [value for value in made if value.name])]
        function = contrib_function(node, inputs) if schema is None else definition(node, schema, inputs)
        if function is None:
            return self._refuse(node, scope)
        return [self._defined(node, function, inputs, scope, cost)]

    def _call(
        self,
        node: onnx.NodeProto,
        function: onnx.FunctionProto,
        inputs: Sequence[Value | None],
        scope: Scope,
        cost: Cost,
        whole: bool = False,
    ) -> list[Step]:
        """The nodes of a function, as if they stood in place of its call."""
        is_scan = node.domain == SCAN_DOMAIN and node.op_type.startswith(SCAN_PREFIX)
        is_front_end = scope is self.main and (node.domain, node.op_type) in FRONT_END_FUNCTIONS
        layer = "" if is_front_end else scope.layer_of(node)
        inner = Scope(
            _opsets(function.opset_import),
            scope,
            layer=layer,
            sees_outer=False,
            whole=whole or is_scan or is_front_end or scope.whole,
            is_scan=is_scan or scope.is_scan,
        )
        inner.values |= {name: value for name, value in zip(function.input, inputs) if value is not None}
        ran = Cost() if is_scan else self.front_end if is_front_end else cost
        steps = self._nodes(bound(function, node), inner, ran)
        if is_scan:
            defined = _scan_operations(node, inputs)
            cost.add(layer, "scan", defined)
            if (products := ran.weight[0]) > 1.1 * defined[MAC]:
                self.notes.append(
                    f"{node.op_type} {_title(node)}: runs {products:,} products where the definition of the scan, "
                    f"which is what is counted, has {defined[MAC]:,}"
                )
        made = []
        for formal, name in zip(function.output, node.output):
            if name:
                value = self._read(inner, formal, f"an output of function {function.name}")
                scope.values[name] = value
                made.append(value)
        return steps

    def _defined(
        self,
        node: onnx.NodeProto,
        function: onnx.FunctionProto,
        inputs: Sequence[Value | None],
        scope: Scope,
        cost: Cost,
    ) -> Step:
        """An operator that is defined by others, but runs as one: what the others pass on takes no memory."""
        self._call(node, function, inputs, scope, cost, whole=True)
        made = [Value(name, (own := scope.values[name]).type, own.origin, own.content) for name in node.output if name]
        self._take(node, made, scope)
        return Step([value for value in inputs if value is not None], made)

    def _control(
        self, node: onnx.NodeProto, inputs: Sequence[Value | None], scope: Scope, cost: Cost
    ) -> Sequence[Step]:
        read: dict[Value, None] = dict.fromkeys(value for value in inputs if value is not None)
        layer = scope.layer_of(node)

        def run(body: onnx.GraphProto, given: Sequence[Value]) -> BodyRun:
            inner = Scope(scope.opsets, scope, layer=layer, recurs=is_recurrence(node) or scope.recurs)
            found = self.graph(body, inner, given)
            read.update(inner.captured)
            if any(value.is_lost for value in found.outputs):
                raise _LostBody
            return found

        found: ControlRun
        try:
            if node.op_type == "If":
                found = run_if(node, inputs[0], run)
            elif node.op_type == "Loop":
                self.loops.update({node.name, *node.output})
                found = run_loop(node, inputs, run, self.trips, self.source)
            else:
                found = run_scan(node, inputs, run)
        except _LostBody:
            return self._lose(node, scope)
        cost.include(found.cost, 1)
        if found.note:
            self.notes.append(found.note)
        made = [Value(name, own.type, own.origin, own.content) for name, own in zip(node.output, found.outputs)]
        self._take(node, made, scope)
        return [Step(list(read), [value for value in made if value.name], found.peak_bytes)]

    def _read(self, scope: Scope, name: str, reader: str) -> Value:
        value = scope.find(name)
        if value is None:
            raise ModelFileError(
                f"{self.source}: {reader} reads {name!r}, which nothing before it makes: the file is damaged or was "
                "cut short; export it again"
            )
        return value

    def _take(self, node: onnx.NodeProto, made: Sequence[Value], scope: Scope) -> None:
        scope.values |= {value.name: value for value in made if value.name}

    def _refuse(self, node: onnx.NodeProto, scope: Scope) -> Sequence[Step]:
        """Notes an unknown operator, and goes on to find the others."""
        operator = "::".join(filter(None, (node.domain, node.op_type)))
        layer = scope.layer_of(node)
        self.unknown.append(f"{_title(node)}: {operator}{f' (layer {layer})' if layer else ''}")
        return self._lose(node, scope)

    def _lose(self, node: onnx.NodeProto, scope: Scope) -> Sequence[Step]:
        """Goes on past a node that is unknown, or reads what such a one makes."""
        self._take(node, [Value(name, None, is_lost=True) for name in node.output], scope)
        return ()

    def _is_weight(self, name: str, tensor: onnx.TensorProto) -> bool:
        """A stored tensor that gives its name to a layer."""
        several = math.prod(tensor.dims) > 1
        return name in self.scales or (several and not is_structure(name, tensor, self.scales))


def _scan_operations(node: onnx.NodeProto, inputs: Sequence[Value | None]) -> dict[str, int]:
    """What `budget.analytic.scan_macs` says, for u of any layout (B,D,L) or (B,L,D) and A (D,N)."""
    u, A = inputs[0], inputs[2]
    d_inner, d_state = A.shape
    directions = 2 if node.op_type.removeprefix(SCAN_PREFIX).startswith(TWO_WAY) else 1
    steps = directions * u.size
    found = {MAC: directions * scan_macs(d_inner, d_state, u.size // d_inner), "exp": steps * d_state}
    return found | {"softplus": steps, "silu": steps, "add": u.size * (directions - 1)}


def _title(node: onnx.NodeProto) -> str:
    return node.name or next(filter(None, node.output), node.op_type)
