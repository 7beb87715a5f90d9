"""How a recurrence is written in ONNX: as `Scan`, in chunks without control flow, or step by step.

Each form reads, for every direction, the exponents dt*A and the drives dt*u*B of all steps, (L,N,B,D) each, and makes
what is left of the state before a step's own drive is added, exp(dt*A) * h, of the same shape. That is where a `Scan`
can hand out its state without a copy; a step's own drive needs no state and is read out by itself.

Not a choice is the cumulative-sum form, exp(s) * cumsum(drive * exp(-s)) with s the running sum of dt*A: s falls by
dt*|A| at every step, and exp(-s) is beyond float32 once it has fallen by 89, which dt 0.2 and A -16 do in 28 steps.
`CumSum` occurs here only within a chunk and only in exp(s), which cannot exceed 1.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

ScanForm = Literal["scan", "chunked", "unrolled"]
"""`scan`: one `Scan` for both directions, of any length. `chunked`: about 2*sqrt(L) steps, each over many tokens, from
elementwise operators alone. `unrolled`: two nodes a step; what is left where neither can be read."""


class Direction(NamedTuple):
    """Names of what one direction reads and makes."""

    exponents: str
    drives: str
    kept: str
    """What is left of the state before the step's own drive is added."""
    from_end: bool
    """It reads the steps from the last to the first; what it makes stands in the order of its inputs all the same."""


def as_scan(directions: Sequence[Direction], length: int) -> str:
    """Two nodes a direction in the body: the least that a step can have. `length` does not matter."""
    places = range(len(directions))
    sizes = "float[d_state, batch, d_inner]"
    orders = ", ".join("1" if direction.from_end else "0" for direction in directions)
    decays = [f"{direction.kept}_decays" for direction in directions]
    lines = [f"{decay} = Exp ({direction.exponents})" for decay, direction in zip(decays, directions)]
    lines += [f"state_shape = Shape <start = 1> ({directions[0].drives})", "start = ConstantOfShape (state_shape)"]
    ends, kept = (", ".join(names) for names in ([f"end{i}" for i in places], [d.kept for d in directions]))
    given = ", ".join(("start " * len(directions)).split() + decays + [direction.drives for direction in directions])
    lines.append(f"{ends}, {kept} = Scan <num_scan_inputs = {2 * len(directions)},")
    lines.append(f"    scan_input_directions = [{orders}, {orders}], scan_output_directions = [{orders}], body = step")
    formal = [f"{name}{i}" for name in ("state", "decay", "drive") for i in places]
    made = [f"{name}{i}" for name in ("next", "left") for i in places]
    lines.append(f"    ({', '.join(f'{sizes} {name}' for name in formal)})")
    lines.append(f"    => ({', '.join(f'{sizes} {name}' for name in made)})")
    body = [f"left{i} = Mul (decay{i}, state{i}) next{i} = Add (left{i}, drive{i})" for i in places]
    lines += ["    {", *body, f"    }}> ({given})"]
    return "\n".join(lines)


def unrolled(directions: Sequence[Direction], length: int) -> str:
    """Every step written out."""
    return "\n".join(_unrolled(direction, length) for direction in directions)


def _unrolled(direction: Direction, length: int) -> str:
    name = direction.kept
    order = range(length)[::-1] if direction.from_end else range(length)
    lines = [f"{name}_decays = Exp ({direction.exponents})"]
    lines += [
        _split(f"{name}_decay", length, f"{name}_decays", 0),
        _split(f"{name}_drive", length, direction.drives, 0),
    ]
    first = order[0]
    lines += [f"{name}_shape = Shape ({name}_drive{first})", f"{name}_left{first} = ConstantOfShape ({name}_shape)"]
    state = f"{name}_drive{first}"
    for step in order[1:]:
        lines.append(f"{name}_left{step} = Mul ({name}_decay{step}, {state})")
        state = f"{name}_state{step}"
        if step != order[-1]:
            lines.append(f"{state} = Add ({name}_left{step}, {name}_drive{step})")
    lines.append(_concat(name, [f"{name}_left{step}" for step in range(length)], 0))
    return "\n".join(lines)


def chunked(directions: Sequence[Direction], length: int) -> str:
    """Chunks of about sqrt(L) steps: each by itself, all at once; then what each hands to the next; both added."""
    steps = math.isqrt(length - 1) + 1
    return "\n".join(_chunked(direction, length, -(-length // steps), steps) for direction in directions)


def _chunked(direction: Direction, length: int, n_chunks: int, steps: int) -> str:
    name, missing = direction.kept, n_chunks * steps - length
    exponents, drives = direction.exponents, direction.drives
    lines = [
        f"{name}_state_shape = Shape <start = 1> ({drives})",
        f"{name}_rows = Constant <value_ints = [{n_chunks * steps}]> ()",
    ]
    lines.append(f"{name}_by_chunk = Constant <value_ints = [{n_chunks}, {steps}, -1]> ()")

    def by_chunk(source: str) -> str:
        """(L,N,B,D), turned if need be and filled up with steps that change nothing, as (chunks, steps, NBD)."""
        made = source
        if direction.from_end:
            lines.append(_turned(f"{name}_{source}_turned", made))
            made = f"{name}_{source}_turned"
        if missing:
            lines.append(f"{name}_{source}_pads = Constant <value_ints = [0, 0, 0, 0, {missing}, 0, 0, 0]> ()")
            lines.append(f"{name}_{source}_full = Pad ({made}, {name}_{source}_pads)")
            made = f"{name}_{source}_full"
        lines.append(f"{name}_{source} = Reshape ({made}, {name}_by_chunk)")
        return f"{name}_{source}"

    exponents, drives = by_chunk(exponents), by_chunk(drives)
    lines += [f"{name}_decays = Exp ({exponents})", f"{name}_step_axis = Constant <value_int = 1> ()"]
    lines += [f"{name}_sums = CumSum ({exponents}, {name}_step_axis)", f"{name}_since_start = Exp ({name}_sums)"]
    lines += [_split(f"{name}_decay", steps, f"{name}_decays", 1), _split(f"{name}_drive", steps, drives, 1)]
    lines.append(f"{name}_piece_shape = Shape ({name}_drive0)")
    lines.append(f"{name}_left0 = ConstantOfShape ({name}_piece_shape)")
    state = f"{name}_drive0"
    for step in range(1, steps):
        lines.append(f"{name}_left{step} = Mul ({name}_decay{step}, {state})")
        state = f"{name}_state{step}"
        lines.append(f"{state} = Add ({name}_left{step}, {name}_drive{step})")
    lines.append(_concat(f"{name}_own", [f"{name}_left{step}" for step in range(steps)], 1))

    lines.append(_split(f"{name}_through", steps, f"{name}_since_start", 1))
    lines.append(_split(f"{name}_whole", n_chunks, f"{name}_through{steps - 1}", 0))
    lines.append(_split(f"{name}_last", n_chunks, state, 0))
    lines.append(f"{name}_carry_shape = Shape ({name}_last0) {name}_carry0 = ConstantOfShape ({name}_carry_shape)")
    carry = f"{name}_last0"
    for chunk in range(1, n_chunks):
        lines.append(f"{name}_carry{chunk} = Identity ({carry})")
        if chunk < n_chunks - 1:
            lines.append(f"{name}_passed{chunk} = Mul ({name}_whole{chunk}, {carry})")
            carry = f"{name}_handed{chunk}"
            lines.append(f"{carry} = Add ({name}_passed{chunk}, {name}_last{chunk})")
    lines.append(_concat(f"{name}_carries", [f"{name}_carry{chunk}" for chunk in range(n_chunks)], 0))

    lines.append(f"{name}_from_before = Mul ({name}_since_start, {name}_carries)")
    lines.append(f"{name}_left = Add ({name}_own, {name}_from_before)")
    lines.append(f"{name}_shape = Concat <axis = 0> ({name}_rows, {name}_state_shape)")
    lines.append(f"{name}_all = Reshape ({name}_left, {name}_shape)")
    made = f"{name}_all"
    if missing:
        lines.append(
            f"{name}_zero = Constant <value_ints = [0]> () {name}_length = Constant <value_ints = [{length}]> ()"
        )
        lines.append(f"{name}_cut = Slice ({made}, {name}_zero, {name}_length, {name}_zero)")
        made = f"{name}_cut"
    lines.append(_turned(name, made) if direction.from_end else f"{name} = Identity ({made})")
    return "\n".join(lines)


def _split(stem: str, count: int, source: str, axis: int) -> str:
    pieces = ", ".join(f"{stem}{place}" for place in range(count))
    return f"{pieces} = Split <axis = {axis}, num_outputs = {count}> ({source})"


def _concat(made: str, pieces: Sequence[str], axis: int) -> str:
    return f"{made} = Concat <axis = {axis}> ({', '.join(pieces)})"


def _turned(made: str, source: str) -> str:
    """The first axis from its end to its beginning."""
    return (
        f"{made}_back = Constant <value_ints = [-1]> () {made}_stop = Constant <value_ints = [{-(2**31)}]> ()\n"
        f"{made}_axis = Constant <value_ints = [0]> ()\n"
        f"{made} = Slice ({source}, {made}_back, {made}_stop, {made}_axis, {made}_back)"
    )


FORMS: dict[ScanForm, Callable[[Sequence[Direction], int], str]] = {
    "scan": as_scan,
    "chunked": chunked,
    "unrolled": unrolled,
}
