"""What one node of an ONNX graph computes, and the sum over many. Torch-free."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx
from onnx import helper

from aum_compress.budget.onnx_products import CONVOLUTIONS, PRODUCTS, RECURRENT, product
from aum_compress.budget.onnx_recurrence import Neighbourhood
from aum_compress.budget.onnx_values import Value
from aum_compress.budget.operators import MAC, ONNX_FREE, ONNX_POOLS, ONNX_READ, ONNX_WRITTEN
from aum_compress.budget.records import Operations

COUNTED = frozenset((*PRODUCTS, *ONNX_WRITTEN, *ONNX_READ, *ONNX_POOLS, *ONNX_FREE))


@dataclass
class Cost:
    """Operations by layer, as they add up."""

    by_layer: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Layer -> kind of operation, MAC among them -> count."""
    sources: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Layer -> where its MACs come from -> count."""

    def add(self, layer: str, source: str, operations: Mapping[str, int]) -> None:
        for kind, count in operations.items():
            if count:
                self.by_layer[layer][kind] += count
                self.sources[layer][source] += count if kind == MAC else 0

    def include(self, other: "Cost", times: int) -> None:
        """Adds what a body computes in `times` runs."""
        if not times:
            return
        for layer, own in other.by_layer.items():
            for kind, count in own.items():
                self.by_layer[layer][kind] += times * count
            for source, count in other.sources[layer].items():
                self.sources[layer][source] += times * count

    @property
    def weight(self) -> tuple[int, int]:
        """By which branches are compared: MACs, then everything else."""
        total = sum(self.by_layer.values(), Counter())
        return total.pop(MAC, 0), total.total()

    def operations(self) -> dict[str, Operations]:
        return {
            layer: Operations(own[MAC], dict(sorted((+_without_macs(own)).items())), _most(self.sources[layer]))
            for layer, own in self.by_layer.items()
        }


def _without_macs(counts: Counter[str]) -> Counter[str]:
    return Counter({kind: count for kind, count in counts.items() if kind != MAC})


def _most(sources: Counter[str]) -> str:
    return sources.most_common(1)[0][0]


def source_of(node: onnx.NodeProto, in_scan: bool) -> str:
    """What MACs of a node are called in tables."""
    if in_scan:
        return "scan"
    if node.op_type in CONVOLUTIONS:
        return "conv"
    if node.op_type in RECURRENT:
        return "rnn"
    return "linear" if node.op_type in PRODUCTS else "elementwise"


def node_operations(
    node: onnx.NodeProto,
    inputs: Sequence[Value | None],
    outputs: Sequence[Value],
    gates: set[str],
    near: Neighbourhood,
    in_recurrence: bool,
) -> Mapping[str, int]:
    """Operations of one node whose operator is COUNTED.

    Args:
        gates: outputs of a Sigmoid that is part of a SiLU.
        near: nodes that belong to a recurrence in the same graph.
        in_recurrence: the node stands inside one.

    Raises:
        Unsized: a size that is needed does not follow from those of the graph's inputs.
    """
    operator = node.op_type
    if operator in ONNX_FREE:
        reduces = any(a.name == "reduction" and a.s not in (b"", b"none") for a in node.attribute)
        return {"reduce": inputs[2].size} if reduces else {}
    if operator in PRODUCTS:
        return product(node, inputs, outputs[0].shape)
    if operator in ONNX_READ:
        return {ONNX_READ[operator]: inputs[0].size}
    if operator in ONNX_POOLS:
        window = helper.get_node_attr_value(node, "kernel_shape")
        return {"pool": outputs[0].size * math.prod(window)}
    if operator in ("Resize", "Upsample") and not any(a.name == "mode" and a.s != b"nearest" for a in node.attribute):
        return {}  # copies values
    made = outputs[0]
    if made.element == onnx.TensorProto.INT64 or made.name in gates:
        return {}  # arithmetic on shapes; or counted with the product that makes it a SiLU
    if operator == "Mul" and gates.intersection(node.input):
        return {"silu": made.size}
    if operator == "Mul" and (in_recurrence or made.name in near.products):
        return {MAC: made.size}
    if operator == "Add" and (in_recurrence or made.name in near.sums):
        return {}  # follows a product, and so belongs to its MAC
    return {ONNX_WRITTEN[operator]: made.size}
