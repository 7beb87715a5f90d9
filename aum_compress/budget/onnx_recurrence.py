"""Which products around a Scan or Loop belong to a recurrence, in graphs without the function that `export` writes.

A selective scan multiplies outside of its loop too: step times A and u, drive times B, read-out by C, skip, gate. They
are found by where they stand, so that a file whose functions another tool has inlined counts as before. Torch-free.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field

import onnx

from aum_compress.budget.onnx_file import bodies
from aum_compress.budget.onnx_products import MATRIX_PRODUCTS
from aum_compress.budget.onnx_values import FLOATING, SEEN_THROUGH, Origin, Scope
from aum_compress.budget.operators import ONNX_FREE, ONNX_READ, ONNX_WRITTEN

BORDERS = ("batch_norm", "norm", "softmax", "pool")
"""Kinds that end the neighbourhood of a recurrence."""
MEASURES = ("Shape", "Size", "ConstantOfShape")
"""What they make has the size of what they read, nothing else of it."""
PASSABLE = frozenset(
    (
        *ONNX_FREE.difference(MEASURES),
        *(name for name, kind in (*ONNX_WRITTEN.items(), *ONNX_READ.items()) if kind not in BORDERS),
        "QuickGelu",  # what onnxruntime makes of a SiLU
    )
)


@dataclass(frozen=True)
class Neighbourhood:
    """Nodes, by their first output, that compute a recurrence together with its Scan or Loop."""

    products: set[str] = field(default_factory=set)
    """Mul nodes whose products are MACs."""
    sums: set[str] = field(default_factory=set)
    """Add nodes that add such a product, and so belong to its MAC."""


def is_recurrence(node: onnx.NodeProto) -> bool:
    """A Scan, or a Loop that carries floating-point values from one trip to the next."""
    if node.op_type != "Loop":
        return node.op_type == "Scan"
    # a body that does not say what it carries is taken to carry what a network carries
    carried = [value.type.tensor_type.elem_type for body in bodies(node) for value in body.input[2:]]
    return any(kind in (0, *FLOATING) for kind in carried)


def silu_gates(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Outputs of a Sigmoid that its own input is multiplied by: the two nodes are one SiLU."""
    sigmoids = {node.output[0]: node.input[0] for node in nodes if node.op_type == "Sigmoid"}
    return {
        gate
        for node in nodes
        if node.op_type == "Mul"
        for gate in node.input
        if gate in sigmoids and sigmoids[gate] in node.input
    }


def around_recurrences(nodes: Sequence[onnx.NodeProto], scope: Scope, gates: Set[str]) -> Neighbourhood:
    """Products that lead to a recurrence or from it, as far as the next layer with weights, norm, softmax or pool.

    Upstream from what a recurrence reads; downstream from what it makes, through products of two activations (the
    read-out), with products that are added on the way (the skip).

    Args:
        scope: of `nodes`; knows which names are weights.
        gates: of the SiLUs, whose own product is no MAC.
    """
    found = Neighbourhood()
    recurrences = [node for node in nodes if is_recurrence(node)]
    if not recurrences:
        return found
    makers = {name: node for node in nodes for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in nodes:
        for name in node.input:
            readers[name].append(node)
    sums: dict[str, onnx.NodeProto] = {}

    def note(node: onnx.NodeProto) -> None:
        if node.op_type == "Mul" and gates.isdisjoint(node.input) and not _scales(node, scope):
            found.products.add(node.output[0])
        elif node.op_type == "Add":
            sums[node.output[0]] = node

    def moved(name: str) -> onnx.NodeProto | None:
        """The node that computed a value, past those that only moved it."""
        maker = makers.get(name)
        while maker is not None and maker.op_type in ONNX_FREE and maker.input:
            maker = makers.get(maker.input[0])
        return maker

    def has_weight(node: onnx.NodeProto) -> bool:
        return any(_is_weight(name, makers, scope) for name in node.input)

    upstream = [name for node in recurrences for name in (*node.input, *_captured(node))]
    seen: set[str] = set()
    for name in upstream:  # grows on the way
        maker = makers.get(name)
        if maker is None or name in seen or maker.op_type not in PASSABLE:
            continue
        seen.add(name)
        note(maker)
        upstream += maker.input
    downstream = [name for node in recurrences for name in node.output]
    for name in downstream:  # grows on the way
        for node in readers[name]:
            through = node.op_type in PASSABLE or (node.op_type in MATRIX_PRODUCTS and not has_weight(node))
            if not through or node.output[0] in seen:
                continue
            seen.add(node.output[0])
            note(node)
            for skip in filter(None, map(moved, node.input if node.op_type == "Add" else ())):
                if skip.op_type == "Mul":
                    note(skip)
            downstream += node.output
    for name, node in sums.items():
        made = [maker is not None and maker.output[0] in found.products for maker in map(moved, node.input)]
        if made.count(True) == 1:  # of two, each is a sum of products already
            found.sums.add(name)
    return found


def _scales(node: onnx.NodeProto, scope: Scope) -> bool:
    """By a single constant, such as the 0.5 that averages two directions."""
    operands = [value for name in node.input if (value := scope.peek(name)) is not None]
    return any(value.origin is Origin.STRUCTURE and value.size == 1 for value in operands)


def _captured(node: onnx.NodeProto) -> list[str]:
    """Names that the bodies of a node read; those of their own values among them do no harm."""
    return [name for body in bodies(node) for child in body.node for name in (*child.input, *_captured(child))]


def _is_weight(name: str, makers: dict[str, onnx.NodeProto], scope: Scope) -> bool:
    while (maker := makers.get(name)) is not None and maker.op_type in SEEN_THROUGH:
        name = maker.input[0]
    value = scope.peek(name)
    return value is not None and bool(value.weight)
