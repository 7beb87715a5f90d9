"""Most bytes of activations alive at once in one run of a traced torch graph."""

import math
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch

from aum_compress.budget.torch_costs import is_index, shape_of
from aum_compress.budget.torch_trace import Trace

RESHAPES = ("aten::reshape", "aten::reshape_as", "aten::flatten")
CONVERSIONS = ("aten::contiguous", "aten::to", "aten::type_as")
UNCHANGED = ("aten::dropout", "aten::feature_dropout", "aten::alpha_dropout", "aten::feature_alpha_dropout")
"""Give back what they were given, in evaluation mode."""


SIZES = ("aten::size", "aten::sym_size", "aten::numel", "aten::dim", "aten::len")
"""Read a shape, which is the same for every input."""


class _Memory:
    """Which blocks of memory there are, from which node to which, and which values lie in them."""

    def __init__(self) -> None:
        self.varying: set[str] = set()
        """Names of the values that depend on the inputs."""
        self.size: list[int] = []
        self.varies: list[bool] = []
        """Whether anything in the block depends on the inputs; else deployment computes it once and for all."""
        self.born: list[int] = []
        self.last_used: list[int] = []
        self.blocks: dict[str, frozenset[int]] = {}
        """Name of a value of the graph -> blocks that it lies in; none for weights and Python values."""
        self.made_at: dict[str, int] = {}
        """Name of a list of new tensors -> the node that made it."""

    def allocate(self, value: Any, place: int) -> frozenset[int]:
        """A block for a tensor; what is no tensor of the model takes none."""
        if value.type().kind() != "TensorType" or is_index(value):
            return frozenset()
        self.varies.append(False)
        self.size.append(math.prod(shape_of(value)) * value.type().dtype().itemsize)
        self.born.append(place)
        self.last_used.append(place)
        return frozenset({len(self.size) - 1})

    def blocks_of(self, values: Iterable[Any]) -> frozenset[int]:
        return frozenset().union(*(self.blocks.get(value.debugName(), frozenset()) for value in values))

    def use(self, values: Iterable[Any], place: int) -> None:
        for block in self.blocks_of(values):
            self.last_used[block] = place

    def mark_varying(self, value: Any) -> None:
        self.varying.add(value.debugName())
        for block in self.blocks_of([value]):
            self.varies[block] = True

    def peak(self, length: int) -> int:
        change = [0] * (length + 2)
        for varies, size, born, last_used in zip(self.varies, self.size, self.born, self.last_used):
            change[born] += size * varies
            change[last_used + 1] -= size * varies
        alive, most = 0, 0
        for step in change:
            alive += step
            most = max(most, alive)
        return most


def peak_activation_bytes(trace: Trace) -> int:
    """Most bytes of values alive at once, in the order of execution that was traced.

    An input is alive from the start to its last use, an output of the model to the end, and any other value from the
    node that writes it to the last that reads it; a node's inputs and outputs are alive together. Views and what works
    in place take no memory of their own. Not counted are weights and what is computed from them alone, such as the
    float values of int8 weights, nor what an operator needs inside: of a scan, a recurrent layer or attention only what
    it returns.
    """
    memory = _Memory()
    nodes = [node for node, _ in trace.nodes()]
    for value in [*trace.graph.inputs()][: trace.n_inputs]:
        memory.blocks[value.debugName()] = memory.allocate(value, 0)
        memory.mark_varying(value)
    for place, node in enumerate(nodes):
        inputs = [*node.inputs()]
        memory.use(inputs, place)
        for number, output in enumerate(node.outputs()):
            memory.blocks[output.debugName()] = _blocks(memory, node, inputs, number, output, place)
            if node.kind() not in SIZES and any(value.debugName() in memory.varying for value in inputs):
                memory.mark_varying(output)
    memory.use(trace.graph.outputs(), len(nodes))
    return memory.peak(len(nodes))


def _blocks(memory: _Memory, node: Any, inputs: list[Any], number: int, output: Any, place: int) -> frozenset[int]:
    """Where an output lies: in the memory of an input, or in its own."""
    kind = node.kind()
    if kind == "prim::Constant":
        return frozenset()  # stored with the weights
    if kind == "prim::ListUnpack" and (made_at := memory.made_at.get(inputs[0].debugName())) is not None:
        return memory.allocate(output, made_at)
    if kind.startswith("prim::"):
        return memory.blocks_of(inputs)  # packs, unpacks
    source = inputs[0] if kind in UNCHANGED else _source(node, inputs, number)
    if source is not None and _same_memory(kind, source, output):
        return memory.blocks_of([source])
    if output.type().kind() == "ListType":
        memory.made_at[output.debugName()] = place
        return frozenset()
    return memory.allocate(output, place)


def _source(node: Any, inputs: list[Any], number: int) -> Any | None:
    """The input in whose memory an output may lie, by the operator's schema."""
    place = _aliases(node.schema()).get(number)
    return None if place is None else inputs[place]


@cache
def _aliases(schema: str) -> dict[int, int]:
    """Place of an output -> place of the argument that it may share memory with."""
    parsed = torch._C.parse_schema(schema)
    found = {}
    for number, result in enumerate(parsed.returns):
        for place, argument in enumerate(parsed.arguments):
            if not argument.alias_info:
                continue
            annotated = result.alias_info and argument.alias_info.before_set & result.alias_info.before_set
            into_list = argument.alias_info.after_set == {"*"} and str(result.type) == "List[Tensor]"
            if annotated or into_list:
                found[number] = place
    return found


def _same_memory(kind: str, source: Any, output: Any) -> bool:
    """Whether an operator that may copy did not."""
    if kind not in (*RESHAPES, *CONVERSIONS):
        return True
    before, after = source.type(), output.type()
    if kind in CONVERSIONS:
        return before.dtype() == after.dtype() and before.strides() == after.strides()
    try:
        torch.empty_strided(before.sizes(), before.strides(), device="meta").view(after.sizes())
    except RuntimeError:
        return False
    return True
