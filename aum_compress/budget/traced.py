"""Second witness: MACs and elementwise operations of the traced torch graph, by module.

fvcore traces the model, with one node for each scan; what each operator costs is said in `torch_costs`. Every operator
must be known, as arithmetic or as free: one that is not ends the count with an error, because a zero would be believed.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass

from torch import nn

from aum_compress.budget.operators import MAC
from aum_compress.budget.records import Operations
from aum_compress.budget.torch_costs import node_cost
from aum_compress.budget.torch_memory import peak_activation_bytes
from aum_compress.budget.torch_trace import Example, Trace, trace
from aum_compress.errors import AumError, join_problems


@dataclass(frozen=True)
class TracedCosts:
    """What one run of a model costs."""

    operations: dict[str, Operations]
    """Module path -> what that module computes itself, its children apart; a module with two owners has the first
    path."""
    peak_activation_bytes: int
    """As `torch_memory.peak_activation_bytes` defines it, in float32."""
    constant_bytes: int
    """Of tensors in the graph that are neither inputs nor in the state dict: buffers that are not persistent, and
    tensors that the model keeps in plain attributes."""


def traced_costs(model: nn.Module, example: Example) -> TracedCosts:
    """What one run on `example` costs: a float32 copy of `model` is traced once, in evaluation mode.

    Raises:
        AumError: an operator that is neither counted nor known as free, a model that does not run on the example, or
            one that branches on values.
    """
    traced = trace(model, example)
    return TracedCosts(_operations(traced), peak_activation_bytes(traced), _constant_bytes(traced))


def traced_operations(model: nn.Module, example: Example) -> dict[str, Operations]:
    """The operations of `traced_costs` alone."""
    return _operations(trace(model, example))


def _operations(traced: Trace) -> dict[str, Operations]:
    counted: dict[str, Counter[str]] = defaultdict(Counter)
    problems = []
    for node, path in traced.nodes():
        layer = path or "the model itself"
        try:
            cost = node_cost(node)
        except AumError as error:
            raise AumError(f"{layer}: {_operator(node)}: {error}") from error
        if cost is None:
            problems.append(f"{layer}: {_operator(node)}")
        else:
            counted[path] += cost  # drops what is zero
    if problems:
        raise AumError(
            join_problems(
                "operators whose cost is unknown, and which therefore cannot count as zero:",
                list(dict.fromkeys(problems)),
            )
            + "\nWrite the layer in operators that are known, or give these a place in aum_compress/budget/operators.py"
            " (or torch_costs.py), as arithmetic or as free"
        )
    return {
        path: Operations(macs, dict(sorted(cost.items())))
        for path, cost in counted.items()
        if (macs := cost.pop(MAC, 0)) or cost
    }


def _constant_bytes(traced: Trace) -> int:
    values = [
        node.t("value")
        for node, _ in traced.nodes()
        if node.kind() == "prim::Constant" and node.hasAttribute("value") and node.kindOf("value") == "t"
    ]
    # a factor is no table; one tensor that is read twice is written down twice
    return sum({(value.data_ptr(), value.shape): value.nbytes for value in values if value.dim()}.values())


def _operator(node) -> str:
    """Its name; of Python code, such as a custom autograd function, with the name of that."""
    return f"{node.kind()}.{node.pyname()}" if node.kind() == "prim::PythonOp" else node.kind()
