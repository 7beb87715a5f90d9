"""Peak activation bytes of an ONNX graph: the most that its values take at any moment of one run. Torch-free.

Assumed is the order of the nodes in the file, which is also onnxruntime's, one node at a time, nothing fused and
nothing computed in place:

- every value lives from the node that makes it to the last one that reads it, the graph's inputs from the start, its
  outputs to the end; what a node makes is there beside all that it reads;
- weights, and what is computed from weights and constants alone, are not activations;
- a Reshape, Squeeze, Unsqueeze, Flatten or Identity makes a view, which keeps what it is a view of alive;
- a body of If, Loop or Scan needs its own peak, its inputs included, on top of what lives around it;
- the nodes of a model-local function are taken one by one, an operator of onnxruntime's own and one that the standard
  defines by others as a whole.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from aum_compress.budget.onnx_values import Origin, Unsized, Value


@dataclass(frozen=True)
class Step:
    """One node as far as memory goes."""

    reads: Sequence[Value]
    writes: Sequence[Value]
    inner_bytes: int | None = 0
    """Peak of a body while the node runs; None where it is unknown."""


def peak_bytes(inputs: Sequence[Value], steps: Sequence[Step], outputs: Sequence[Value]) -> int | None:
    """Most bytes alive at once; None where a value's size is unknown.

    Args:
        inputs: alive before the first step.
        outputs: alive to the end.
    """
    last_read: dict[Value, int] = {}
    for place, step in enumerate(steps):
        for base in (*_bases(step.writes), *_bases(step.reads)):
            last_read[base] = place
    for base in _bases(outputs):
        last_read[base] = len(steps)
    ends: dict[int, list[Value]] = {}
    for base, place in last_read.items():
        ends.setdefault(place, []).append(base)
    try:
        sizes = {value: value.nbytes for value in inputs}  # of what is alive
        alive = peak = sum(sizes.values())
        for value in [value for value in sizes if value not in last_read]:
            alive -= sizes.pop(value)
        for place, step in enumerate(steps):
            made = {value: value.nbytes for value in step.writes if _is_activation(value) and not value.owners}
            sizes |= made
            alive += sum(made.values())
            if step.inner_bytes is None:
                return None
            peak = max(peak, alive + step.inner_bytes)
            for base in ends.get(place, ()):
                alive -= sizes.pop(base, 0)  # what is read from around a body is not the body's
    except Unsized:
        return None
    return peak


def _bases(values: Iterable[Value]) -> Iterable[Value]:
    return (base for value in values for base in value.bases if _is_activation(base))


def _is_activation(value: Value) -> bool:
    return value.origin is Origin.RUN
