"""Peak activation bytes of ONNX graphs: by hand, and against a simulation that knows nothing of lifetimes."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser
from onnx_text import graph, ones

from aum_compress.budget.check_onnx import check_onnx
from aum_compress.budget.onnx_graph import measure_graph
from aum_compress.budget.onnx_memory import Step, peak_bytes
from aum_compress.budget.onnx_values import Origin, Value, tensor_type


def peak(text: str, **weights: np.ndarray) -> int | None:
    return measure_graph(graph(text, opset=21, **weights), "test.onnx").peak_activation_bytes


@pytest.mark.parametrize(
    ("text", "floats"),
    [
        # input and output of each node together, then the input is gone
        ("g (float[10] x) => (float[10] y) { a = Exp (x)  b = Neg (a)  y = Relu (b) }", 20),
        # x lives on for the second reader: x, a, b
        ("g (float[10] x) => (float[10] y) { a = Exp (x)  b = Neg (a)  y = Add (b, x) }", 30),
        # outputs live to the end, though nothing reads `a` again
        ("g (float[10] x) => (float[10] a, float[10] y) { a = Exp (x)  b = Neg (x)  y = Relu (b) }", 30),
        # an input that nothing reads is there at the start
        ("g (float[10] x, float[50] unread) => (float[10] y) { y = Exp (x) }", 60),
        # a value that nothing reads is there while it is made
        ("g (float[10] x) => (float[10] y) { a = Concat <axis = 0> (x, x, x)  y = Exp (x) }", 40),
        # a view is no copy, and keeps what it shows: x and y with `a`, then `b` in place of `a`
        ("g (float[10] x) => (float[10] y) { a = Exp (x)  v = Unsqueeze (a, axes)  b = Identity (v)  c = Squeeze (b)"
         "  y = Add (c, x) }", 30),
        # a transposed value is a copy
        ("g (float[2,5] x) => (float[5,2] y) { y = Transpose (x) }", 20),
        # weights, and what follows from them alone, are none
        ("g (float[10] x) => (float[10] y) { n = Neg (w)  e = Exp (n)  y = Mul (x, e) }", 20),
        # bytes, not values
        ("g (float[10] x) => (float16[10] y) { y = Cast <to = 10> (x) }", 15),
        ("g (float[10] x) => (uint4[10] y) { y = Cast <to = 21> (x) }", 11.25),
        # an output that is the input itself
        ("g (float[10] x) => (float[10] y) { y = Identity (x) }", 10),
    ],
)  # fmt: skip
def test_lifetimes_by_hand(text, floats):
    assert peak(text, w=ones(10), axes=np.array([0])) == 4 * floats


def test_a_body_adds_its_own_peak_to_what_lives_around_it():
    text = """g (float[10] x, float[7,10] xs) => (float[10] y, float[7,10] ys) {
        kept = Exp (x)
        end, ys = Scan <num_scan_inputs = 1, body = s (float[10] h, float[10] v) => (float[10] n, float[10] k) {
            a = Add (h, v)  b = Mul (a, kept)  n = Relu (b)  k = Neg (n)
        }> (x, xs)
        y = Add (end, kept)
    }"""
    # around: x, xs, kept, end, ys; inside: first h, v, a; then a, b; b, n; n, k
    assert peak(text) == 4 * ((10 + 70 + 10 + 10 + 70) + 30)


def test_of_two_branches_the_one_that_needs_more_memory_counts():
    text = """g (float[10] x, bool c) => (float[10] y) {
        y = If <
            then_branch = t () => (float[10] p) { a = Concat <axis = 0> (x, x)  p = Slice (a, zero, ten) },
            else_branch = e () => (float[10] q) { q = Mul (x, x) }
        > (c)
    }"""
    assert peak(text, zero=np.array([0]), ten=np.array([10])) == 4 * (10 + 10 + 30) + 1


def test_a_loop_counts_one_trip_at_a_time():
    text = """g (float[10] x) => (float[10] y) {
        n = Constant <value_int = 5> ()
        y = Loop <body = b (int64 i, bool c, float[10] h) => (bool k, float[10] o) {
            k = Identity (c)  a = Exp (h)  o = Neg (a)
        }> (n, , x)
    }"""
    assert peak(text) == 4 * (10 + 10) + 8 + 1 + 4 * 20 - 8  # number of the trip, which nothing reads, is gone by then


def test_nodes_of_a_function_are_taken_one_by_one():
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["": 20, "own": 1]>
        g (float[10] x) => (float[10] y) { a = own.Twice (x)  y = own.Twice (a) }
        <domain: "own", opset_import: ["": 20]> Twice (a) => (c) { b = Exp (a)  c = Neg (b) }"""
    )
    assert measure_graph(model, "").peak_activation_bytes == 4 * 20


def test_a_size_that_depends_on_values_leaves_the_peak_unknown(tmp_path):
    text = "g (float[10] x) => (int64[1,n] i, float[10] y) { i = NonZero (x)  y = Exp (x) }"
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {text}')
    onnx.save(model, tmp_path / "m.onnx")
    report = check_onnx(tmp_path / "m.onnx")
    assert report.peak_activation_bytes is None
    assert any("peak activation bytes are unknown" in note for note in report.notes)
    assert report.elementwise == {"compare": 10, "exp": 10}


def simulated(inputs: list[Value], steps: list[Step], outputs: list[Value]) -> int:
    """At each moment, everything made so far that is still to be read or given back."""
    most = sum(value.nbytes for value in inputs)
    made = list(inputs)
    for place, step in enumerate(steps):
        later = [value for following in steps[place:] for value in following.reads] + outputs
        alive = {base for value in later for base in value.bases} & set(made)
        most = max(most, sum(value.nbytes for value in alive | set(step.writes)))
        made += step.writes
    return most


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_against_a_simulation(data):
    """Graphs of random nodes, some of them views."""
    sizes = st.integers(1, 9)
    values = [Value("x", tensor_type(1, [data.draw(sizes)]))]
    inputs, steps = list(values), []
    for _ in range(data.draw(st.integers(1, 8))):
        reads = data.draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))
        own = Value("v", tensor_type(1, [data.draw(sizes)]))
        steps.append(Step(reads, [own]))
        view = Value("view", own.type, owners=own.bases)
        values += [own, view]
    outputs = data.draw(st.lists(st.sampled_from(values), min_size=1, max_size=2))
    assert peak_bytes(inputs, steps, outputs) == simulated(inputs, steps, outputs)


def test_constants_are_never_alive():
    weight = Value("w", tensor_type(1, [100]), Origin.WEIGHTS)
    x, y = Value("x", tensor_type(1, [3])), Value("y", tensor_type(1, [3]))
    assert peak_bytes([x], [Step([x, weight], [y])], [y, weight]) == 24
