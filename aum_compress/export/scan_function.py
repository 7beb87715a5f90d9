"""The selective scan in ONNX: a model-local function that viewers show as one node and that runtimes inline.

A step of onnxruntime's `Scan` costs some microseconds and a node about one, so that both directions share one `Scan`
whose body holds the recurrence alone; exponentials, outer products and the read-out are hoisted out and run once over
all steps. They are laid out as (L,N,B,D), because onnxruntime multiplies long runs of memory ten times faster than
runs of d_state values. Where both directions read the same (Fo-Bi), drives and read-out are computed once for both.
"""

from typing import Literal

import onnx

from aum_compress.export.scan_forms import FORMS, Direction, ScanForm

SCAN_DOMAIN, SCAN_VERSION = "aum_compress", 1
ScanKind = Literal["one-way", "fo-bi", "bi-bi"]
"""Of a block: forward alone; v1, whose directions read the same; v2, whose directions read their own."""
SCAN_NAMES: dict[ScanKind, str] = {
    "one-way": "SelectiveScan",
    "fo-bi": "SelectiveScanFoBi",
    "bi-bi": "SelectiveScanBiBi",
}

_OWN = ("u", "delta", "A", "B", "C", "D")
_INPUTS: dict[ScanKind, tuple[str, ...]] = {
    "one-way": (*_OWN, "z"),
    "fo-bi": (*_OWN, "z", "A_back"),
    "bi-bi": (*_OWN, "z", "A_back", "u_back", "delta_back", "B_back", "C_back", "D_back"),
}

# log(1 + exp(x)) without overflow, and without losing the digits of a small step size: what 1 + e rounds away is
# added again. Softplus itself is one node, but takes onnxruntime four times as long as these ten.
_STEP_SIZES = """
    size{s} = Abs (delta{s})
    falling{s} = Neg (size{s})
    grown{s} = Exp (falling{s})
    raised{s} = Add (one, grown{s})
    log{s} = Log (raised{s})
    rounded{s} = Sub (raised{s}, one)
    lost{s} = Sub (grown{s}, rounded{s})
    small{s} = Add (log{s}, lost{s})
    linear{s} = Relu (delta{s})
    dt{s} = Add (linear{s}, small{s})
    dt_by_step{s} = Transpose <perm = [1, 0, 2]> (dt{s})
    dt_row{s} = Unsqueeze (dt_by_step{s}, axis_1)
"""

_DRIVES = """
    dt_u{s} = Mul (dt{s}, u{s})
    dt_u_by_step{s} = Transpose <perm = [1, 0, 2]> (dt_u{s})
    dt_u_row{s} = Unsqueeze (dt_u_by_step{s}, axis_1)
    B_by_step{s} = Transpose <perm = [1, 2, 0]> (B{s})
    C_by_step{s} = Transpose <perm = [1, 2, 0]> (C{s})
    B_column{s} = Unsqueeze (B_by_step{s}, last)
    C_column{s} = Unsqueeze (C_by_step{s}, last)
    drives{s} = Mul (B_column{s}, dt_u_row{s})
"""

_EXPONENTS = """
    rates{r} = Transpose <perm = [1, 0]> (A{r})
    rates_row{r} = Unsqueeze (rates{r}, axis_1)
    step_shape{r} = Shape <start = 1> (dt_by_step{s})
    rates_of_batch{r} = Expand (rates_row{r}, step_shape{r})
    exponents{r} = Mul (dt_row{s}, rates_of_batch{r})
"""

# {times}: how many directions `kept` is the sum of; each adds its own drive and skip
_READ_OUT = """
    weighed{s} = Mul (C_column{s}, {kept})
    read{s} = ReduceSum <keepdims = 0> (weighed{s}, axis_1)
    B_C{s} = Mul (B_by_step{s}, C_by_step{s})
    own_weight{s} = ReduceSum <keepdims = 0> (B_C{s}, axis_1)
    own_column{s} = Unsqueeze (own_weight{s}, last)
    {doubled}
    own{s} = Mul ({own}, dt_u_by_step{s})
    scanned{s} = Add (read{s}, own{s})
    by_token{s} = Transpose <perm = [1, 0, 2]> (scanned{s})
    skipped{s} = Mul ({skip}, u{s})
    mixed{s} = Add (by_token{s}, skipped{s})
"""


def _reading(kept: str, suffix: str, directions: int) -> str:
    own, skip, doubled = f"own_column{suffix}", f"D{suffix}", ""
    if directions == 2:
        own, skip = "own_twice", "D_twice"
        doubled = f"own_twice = Add (own_column{suffix}, own_column{suffix}) D_twice = Add (D{suffix}, D{suffix})"
    return _READ_OUT.format(s=suffix, kept=kept, own=own, skip=skip, doubled=doubled)


_START = """
    one = Constant <value_float = 1.0> ()
    last = Constant <value_ints = [-1]> ()
    axis_1 = Constant <value_ints = [1]> ()
"""
_GATE = """
    gate = Sigmoid (z)
    opened = Mul (z, gate)
    y = Mul ({mixed}, opened)
"""
_TURN = """
    stop = Constant <value_ints = [{stop}]> ()
    mixed_turned = Slice (mixed_back, last, stop, axis_1, last)
    mixed_both = Add (mixed, mixed_turned)
"""


def _body(kind: ScanKind, form: ScanForm, length: int) -> str:
    recurrence = FORMS[form]
    first = Direction("exponents", "drives", "kept", from_end=False)
    parts = [_START, _STEP_SIZES.format(s=""), _DRIVES.format(s=""), _EXPONENTS.format(s="", r="")]
    if kind == "one-way":
        parts += [recurrence([first], length), _reading("kept", "", 1), _GATE.format(mixed="mixed")]
    elif kind == "fo-bi":
        second = Direction("exponents_back", "drives", "kept_back", from_end=True)
        parts += [_EXPONENTS.format(s="", r="_back"), recurrence([first, second], length)]
        parts += ["kept_both = Add (kept, kept_back)", _reading("kept_both", "", 2), _GATE.format(mixed="mixed")]
    else:
        second = Direction("exponents_back", "drives_back", "kept_back", from_end=False)
        parts += [_STEP_SIZES.format(s="_back"), _DRIVES.format(s="_back"), _EXPONENTS.format(s="_back", r="_back")]
        parts += [recurrence([first, second], length), _reading("kept", "", 1), _reading("kept_back", "_back", 1)]
        parts += [_TURN.format(stop=-(2**31)), _GATE.format(mixed="mixed_both")]
    return "\n".join(parts)


def scan_name(kind: ScanKind, form: ScanForm, length: int) -> str:
    """Of the function; those of the static forms are for one length."""
    return SCAN_NAMES[kind] if form == "scan" else f"{SCAN_NAMES[kind]}{form.capitalize()}{length}"


def scan_function(opset: int, kind: ScanKind, form: ScanForm, length: int) -> onnx.FunctionProto:
    """The maths of `models.scan.selective_scan` with softplus, skip and gate, or of `two_way_scan`, for float32.

    Inputs as there, but token by token: u, delta, z (B,L,D), B, C (B,L,N); A (D,N) and D (D,) as they are. Makes
    y (B,L,D). Only the form `scan` reads sequences of another length than `length`.
    """
    name, inputs = scan_name(kind, form, length), ", ".join(_INPUTS[kind])
    head = f'<domain: "{SCAN_DOMAIN}", opset_import: ["": {opset}]>\n{name} ({inputs}) => (y)'
    return onnx.parser.parse_function(f"{head} {{ {_body(kind, form, length)} }}")
