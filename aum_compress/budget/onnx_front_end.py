"""The front-end inside an ONNX file, which stands outside every budget: the functions that `export` writes for it, when
the main graph calls them, and what these alone read. Names of layers do not decide: any model may have a `front_end`.
Torch-free.
"""

from collections.abc import Iterable

import onnx

from aum_compress.budget.onnx_file import bodies

FRONT_END_FUNCTIONS = {("aum_compress", name) for name in ("LogMel", "KaldiFbank", "Resample")}
"""Those that turn a waveform into features."""


def front_end_functions(model: onnx.ModelProto) -> set[tuple[str, str]]:
    """Domain and name of those that the main graph calls."""
    return {(node.domain, node.op_type) for node in model.graph.node} & FRONT_END_FUNCTIONS


def front_end_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of the main graph that nothing but its calls of those functions read: tables, and the waveform."""
    calls, others = [], []
    for node in model.graph.node:
        (calls if (node.domain, node.op_type) in FRONT_END_FUNCTIONS else others).append(node)
    kept = _read_by(others) | {output.name for output in model.graph.output}
    return _read_by(calls) - kept


def _read_by(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Bodies included, which see the names around them."""
    found, waiting = set(), list(nodes)
    for node in waiting:  # grows on the way
        found.update(node.input)
        for body in bodies(node):
            waiting += body.node
            found.update(output.name for output in body.output)
    return found
