"""Equal blocks of a network stand once in its file, as a model-local function that each of them calls.

Written out, a Mamba block of an int8 student is some 60 nodes of 9 kB, its values not counted: six blocks are 50 kB of
names. A call names its tensors and nothing else. Runtimes inline it; the tensors keep their names.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx
from onnx import helper

from aum_compress.export.onnx_compact import put_calls
from aum_compress.export.scan_function import SCAN_DOMAIN, SCAN_VERSION

_IN_BLOCK = re.compile(r"(layers\.\d+)[./]")
FUNCTION = "Block"
"""How the names of these functions begin; a number follows, one for each kind of block."""


@dataclass(frozen=True)
class _Piece:
    """The nodes of one block in a graph."""

    name: str
    nodes: list[onnx.NodeProto]
    inputs: list[str]
    """In the order of their first use."""
    outputs: list[str]

    def relative(self, name: str) -> str:
        """Name of a tensor or node within the block."""
        return name.removeprefix(f"{self.name}.").removeprefix(f"{self.name}/")

    def kind(self) -> bytes:
        """Equal for blocks that compute the same of their inputs: what the nodes are and how they are joined."""
        places = {name: f"in{number}" for number, name in enumerate(self.inputs)}
        function = onnx.FunctionProto()
        for node in self.nodes:
            places |= {name: f"v{len(places) + place}" for place, name in enumerate(node.output) if name}
            function.node.append(_renamed(node, self.relative(node.name), places))
        function.output.extend(places[name] for name in self.outputs)
        return function.SerializeToString(deterministic=True)


def outline_blocks(proto: onnx.ModelProto) -> None:
    """Puts a call in place of each block of which a file has several alike, in place; a finished, compact graph.

    A block is what the nodes `layers.<number>` and the tensors of that name make; alike are those whose nodes,
    attributes included, are.
    """
    alike: dict[bytes, list[_Piece]] = defaultdict(list)
    for piece in _pieces(proto.graph):
        alike[piece.kind()].append(piece)
    repeated = [pieces for pieces in alike.values() if len(pieces) > 1]
    opset = [entry for entry in proto.opset_import if not entry.domain]
    calls = []
    for number, pieces in enumerate(repeated, 1):
        name = f"{FUNCTION}{number}"
        proto.functions.append(_function(name, pieces[0], proto.graph, opset))  # behind those that it calls
        for piece in pieces:
            call = helper.make_node(name, piece.inputs, piece.outputs, piece.name, domain=SCAN_DOMAIN)
            calls.append((piece.nodes, call))
    put_calls(proto, calls)


def _pieces(graph: onnx.GraphProto) -> Iterator[_Piece]:
    """Blocks that one node could stand for: what others read of them is read behind their last node."""
    members: dict[str, list[int]] = defaultdict(list)
    for place, node in enumerate(graph.node):
        # a Cast that widens a stored tensor has no name
        if found := _IN_BLOCK.match(node.name or next(iter(node.input), "")):
            members[found[1]].append(place)
    results = {output.name for output in graph.output}
    readers: dict[str, list[int]] = defaultdict(list)
    for place, node in enumerate(graph.node):
        for name in node.input:
            readers[name].append(place)
    for block, places in members.items():
        nodes, own = [graph.node[place] for place in places], set(places)
        made = [name for node in nodes for name in node.output if name]
        outside = {name: [r for r in readers[name] if r not in own] for name in made}
        outputs = [name for name in made if outside[name] or name in results]
        has_body = any(attribute.HasField("g") or attribute.graphs for node in nodes for attribute in node.attribute)
        if has_body or any(reader < places[-1] for name in outputs for reader in outside[name]):
            continue
        inputs = dict.fromkeys(name for node in nodes for name in node.input if name and name not in outside)
        yield _Piece(block, nodes, list(inputs), outputs)


def _function(
    name: str, piece: _Piece, graph: onnx.GraphProto, opset: Sequence[onnx.OperatorSetIdProto]
) -> onnx.FunctionProto:
    """Tensors of the block have the names that they have within it, what passes between nodes has numbers."""
    stored = {tensor.name for tensor in graph.initializer}
    formals: dict[str, str] = {}
    for number, given in enumerate(piece.inputs):
        own = piece.relative(given)
        formals[given] = own if given in stored and own not in formals.values() else f"x{number}"
    numbered = (made for node in piece.nodes for made in node.output if made)
    places = formals | {made: f"y{number}" for number, made in enumerate(numbered)}
    nodes = [_renamed(node, piece.relative(node.name), places) for node in piece.nodes]
    outputs = [places[made] for made in piece.outputs]
    imports = [*opset, helper.make_opsetid(SCAN_DOMAIN, SCAN_VERSION)]
    return helper.make_function(SCAN_DOMAIN, name, list(formals.values()), outputs, nodes, imports)


def _renamed(node: onnx.NodeProto, name: str, places: dict[str, str]) -> onnx.NodeProto:
    copy = onnx.NodeProto.FromString(node.SerializeToString())
    copy.name = name
    for names in (copy.input, copy.output):
        names[:] = [places[value] if value else "" for value in names]
    return copy
