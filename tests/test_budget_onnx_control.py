"""Branches, loops, scans and functions in ONNX graphs: how often each body counts, and what is said about it."""

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import inliner, numpy_helper, parser
from onnx_text import graph, ones

from aum_compress.budget.check_onnx import check_onnx
from aum_compress.budget.onnx_graph import GraphCost, measure_graph
from aum_compress.errors import AumError, ModelFileError
from aum_compress.export.scan_function import scan_function


def measured(model: onnx.ModelProto, **options) -> GraphCost:
    return measure_graph(model, "test.onnx", **options)


def macs(found: GraphCost) -> int:
    return sum(own.macs for own in found.operations.values())


def elementwise(found: GraphCost, kind: str) -> int:
    return sum(own.elementwise.get(kind, 0) for own in found.operations.values())


LOOP = """g (float[2,4] x, bool go{inputs}) => (float[2,4] y) {{
    {before}
    [steps] y = Loop <body = b (int64 i, bool c, float[2,4] h) => (bool k, float[2,4] o) {{
        k = Identity (c)  p = MatMul (h, layers_w)  o = Relu (p)
    }}> ({limit}, {condition}, x)
}}"""


def loop(before: str = "", limit: str = "n", condition: str = "", inputs: str = "") -> str:
    return LOOP.format(before=before, limit=limit, condition=condition, inputs=inputs)


@pytest.mark.parametrize(
    ("text", "trips"),
    [
        (loop("n = Constant <value_int = 7> ()"), 7),
        (loop("s = Shape <start = 1> (x)  n = Squeeze (s)"), 4),
        (loop("s = Size (x)  two = Constant <value_int = 2> ()  n = Div (s, two)"), 4),
        (loop("n = Constant <value_int = 0> ()"), 0),
        (loop("n = Constant <value_int = 7> ()  z = Constant <value_int = 0> ()  c = Cast <to = 9> (z)", "n", "c"), 0),
    ],
)
def test_the_body_of_a_loop_counts_once_a_trip(text, trips):
    found = measured(graph(text, layers_w=ones(4, 4)))
    assert macs(found) == trips * 2 * 4 * 4
    assert elementwise(found, "relu") == trips * 8
    assert found.notes == (f"Loop steps: counted for {trips} trips",)


def test_a_loop_whose_trips_depend_on_values_wants_them_named(tmp_path):
    model = graph(loop(inputs=", int64 n", condition="go"), layers_w=ones(4, 4))
    with pytest.raises(ModelFileError, match=r"Loop steps: how often it runs depends on values(.|\n)*'steps': N"):
        measured(model)
    for name in ("steps", "y"):
        found = measured(model, trips={name: 12})
        assert macs(found) == 12 * 32
        assert found.notes == ("Loop steps: counted for 12 trips, as given",)
    with pytest.raises(ModelFileError, match="no Loop is named, or makes, other"):
        measured(model, trips={"steps": 1, "other": 2})
    path = tmp_path / "loop.onnx"
    onnx.save(model, path)
    report = check_onnx(path, trips={"steps": 3})
    assert report.macs == 96
    assert "Loop steps: counted for 3 trips, as given" in report.notes


def test_a_loop_without_a_limit_runs_until_its_condition_fails():
    text = loop(limit="", condition="go")
    with pytest.raises(ModelFileError, match="how often it runs depends on values"):
        measured(graph(text, layers_w=ones(4, 4)))
    endless = loop(f"n = Constant <value_int = {2**63 - 1}> ()", condition="go")  # torch writes a while loop so
    with pytest.raises(ModelFileError, match="how often it runs depends on values"):
        measured(graph(endless, layers_w=ones(4, 4)))


def test_a_loop_that_may_stop_early_counts_for_the_most_it_can_make():
    text = loop("n = Constant <value_int = 9> ()").replace("k = Identity (c)", "s = ReduceSum (h)  k = Greater (s, t)")
    found = measured(graph(text, layers_w=ones(4, 4), t=ones(1, 1)))
    assert macs(found) == 9 * 32
    assert found.notes == ("Loop steps: counted for 9 trips, the most it can make",)


def test_a_loop_whose_values_grow_is_followed_through_each_trip():
    text = """g (float[1,4] x) => (float[n,4] y, float[3,4] all) {
        three = Constant <value_int = 3> ()
        y, all = Loop <body = b (int64 i, bool c, float[m,4] h) => (bool k, float[l,4] o, float[4] last) {
            k = Identity (c)  p = MatMul (h, w)  o = Concat <axis = 0> (p, x)  last = ReduceSum <keepdims = 0> (o, axis)
        }> (three, , x)
        r = Relu (y)
        q = Exp (all)
    }"""
    found = measured(graph(text, w=ones(4, 4), axis=np.array([0])))
    assert macs(found) == (1 + 2 + 3) * 16
    assert elementwise(found, "relu") == 4 * 4  # one row more each trip
    assert elementwise(found, "exp") == 3 * 4
    assert elementwise(found, "reduce") == (2 + 3 + 4) * 4


def test_products_of_a_loop_are_macs_where_it_is_a_recurrence():
    carried = """g (float[5,3] xs, float[3] start) => (float[3] y) {
        n = Constant <value_int = 5> ()
        y = Loop <body = b (int64 i, bool c, float[3] h) => (bool k, float[3] o) {
            k = Identity (c)  x = Gather (xs, i)  d = Mul (h, a)  o = Add (d, x)
        }> (n, , start)
    }"""
    found = measured(graph(carried, a=ones(3)))
    assert (macs(found), elementwise(found, "multiply"), elementwise(found, "add")) == (15, 0, 0)
    assert found.operations["a"].kind == "scan"
    mapped = """g (float[5,3] xs) => (float[5,3] y) {
        n = Constant <value_int = 5> ()
        y = Loop <body = b (int64 i, bool c) => (bool k, float[3] o) {
            k = Identity (c)  x = Gather (xs, i)  o = Mul (x, a)
        }> (n, )
    }"""
    found = measured(graph(mapped, a=ones(3)))
    assert (macs(found), elementwise(found, "multiply")) == (0, 15)


BRANCHES = """g (float[2,4] x, bool c) => (float[2,n] y) {
    [choice] y = If <
        then_branch = a () => (float[2,3] t) { t = MatMul (x, small.weight) },
        else_branch = b () => (float[2,5] e) { m = MatMul (x, large.weight)  e = Relu (m) }
    > (COND)
    z = Exp (y)
}""".replace(".", "_")


def test_of_two_branches_the_more_expensive_one_counts():
    weights = {"small_weight": ones(4, 3), "large_weight": ones(4, 5)}
    found = measured(graph(BRANCHES.replace("COND", "c"), **weights))
    assert macs(found) == 2 * 4 * 5
    assert elementwise(found, "exp") == 2 * 5
    assert found.notes == ("If choice: counted for its more expensive branch, `else`",)


def test_a_branch_that_a_constant_chooses_counts_alone():
    weights = {"small_weight": ones(4, 3), "large_weight": ones(4, 5), "yes": np.array(True)}
    found = measured(graph(BRANCHES.replace("COND", "yes"), **weights))
    assert macs(found) == 2 * 4 * 3
    assert found.notes == ()


def test_equal_branches_need_no_note():
    text = BRANCHES.replace("COND", "c").replace("m = MatMul (x, large_weight)  e = Relu (m)", "e = MatMul (x, w)")
    found = measured(graph(text, small_weight=ones(4, 3), w=ones(4, 3)))
    assert macs(found) == 24
    assert found.notes == ()


def test_an_unknown_operator_in_the_cheaper_branch_is_an_error():
    text = BRANCHES.replace("COND", "c").replace("t = MatMul (x, small_weight)", "t = Fancy (x)")
    with pytest.raises(AumError, match="t: Fancy"):
        measured(graph(text, large_weight=ones(4, 5)))


@settings(max_examples=25, deadline=None)
@given(outer=st.integers(0, 4), inner=st.integers(0, 4), steps=st.integers(1, 5))
def test_bodies_multiply_through_all_levels(outer, inner, steps):
    """A Scan in an If in a Loop in a Loop."""
    text = """g (float[2] h0, float[STEPS,2] xs, bool c) => (float[2] y) {
        m = Constant <value_int = OUTER> ()  n = Constant <value_int = INNER> ()
        y = Loop <body = b1 (int64 i, bool g1, float[2] h) => (bool k1, float[2] o1) {
            k1 = Identity (g1)
            o1 = Loop <body = b2 (int64 j, bool g2, float[2] p) => (bool k2, float[2] o2) {
                k2 = Identity (g2)
                o2 = If <
                    then_branch = t () => (float[2] a) {
                        a = Scan <num_scan_inputs = 1, body = s (float[2] q, float[2] x) => (float[2] r) {
                            r = MatMul (q, w)
                        }> (p, xs)
                    },
                    else_branch = e () => (float[2] z) { z = Neg (p) }
                > (c)
            }> (n, , h)
        }> (m, , h0)
    }"""
    for name, value in {"OUTER": outer, "INNER": inner, "STEPS": steps}.items():
        text = text.replace(name, str(value))
    assert macs(measured(graph(text, w=ones(2, 2)))) == outer * inner * steps * 4


def function(text: str, version: int = 20) -> onnx.FunctionProto:
    return parser.parse_function(f'<domain: "own", opset_import: ["": {version}, "own": 1]> {text}')


def nested_functions() -> onnx.ModelProto:
    """Block calls Layer twice, once on weights of its own; a function of another operator version inside."""
    model = graph(
        """g (float[3,4] x) => (float[3,4] y) {
            a = own.Block <slope: float = 0.2> (x, enc_0_up_weight, enc_0_down_weight)
            y = own.Block (a, enc_1_up_weight, enc_1_down_weight)
        }""",
        **{f"enc_{block}_{name}_weight": ones(4, 4) for block in range(2) for name in ("up", "down")},
    )
    model.opset_import.add(domain="own", version=1)
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.replace("_", ".")
    for node in model.graph.node:
        node.input[:] = [name.replace("_", ".") for name in node.input]
    model.functions.append(
        function(
            """Block <slope: float = 0.1> (x, up, down) => (y) {
                u = own.Layer <slope: float = @slope> (x, up)
                y = own.Layer <slope: float = @slope> (u, down)
            }"""
        )
    )
    model.functions.append(
        function(
            """Layer <slope> (x, w) => (y) {
                t = Transpose <perm = [1, 0]> (w)
                p = MatMul (x, t)
                c = own.Once (p)
                y = LeakyRelu <alpha: float = @slope> (c)
            }"""
        )
    )
    model.functions.append(function("Once (x) => (y) { y = Exp (x) }", version=13))
    return model


def test_functions_that_call_functions_count_at_every_call_for_the_layer_that_they_were_given():
    model = nested_functions()
    onnx.checker.check_model(model)
    found = measured(model)
    wanted = [f"enc.{block}.{name}" for block in range(2) for name in ("up", "down")]
    assert {name: own.macs for name, own in found.operations.items()} == dict.fromkeys(wanted, 48)
    assert all(own.elementwise == {"exp": 12, "relu": 12} for own in found.operations.values())


def test_weights_inside_functions_and_bodies_belong_to_their_layer():
    model = graph("g (float[3,4] x) => (float[3,4] y) { a = own.Shift (x)  y = own.Shift (a) }")
    model.opset_import.add(domain="own", version=1)
    model.functions.append(function("Shift (a) => (b) { b = Add (a, shift_bias) }"))
    constant = onnx.helper.make_node("Constant", [], ["shift_bias"], value=numpy_helper.from_array(ones(4)))
    model.functions[0].node.insert(0, constant)
    found = measured(model)
    assert {name: own.elementwise for name, own in found.operations.items()} == {"shift_bias": {"add": 24}}


def test_an_unknown_operator_in_a_function_names_the_layer():
    model = nested_functions()
    model.functions[1].node[1].op_type = "Det"
    with pytest.raises(AumError, match=r"p: Det \(layer enc\.0\.up\)"):
        measured(model)


SELECTIVE = """g (float[1,5,6] u, float[1,5,6] d, float[1,5,3] B, float[1,5,3] C, float[1,5,6] z)
    => (float[1,5,4] out) {
    gate = MatMul (z, w0)
    n = Neg (w1)
    y = aum_compress.SelectiveScan (u, d, n, B, C, w2, gate)
    out = MatMul (y, w3)
}"""
SCAN_MACS, OUTSIDE_MACS = 5 * (4 * 6 * 3 + 3 * 6), 5 * (36 + 24)
OWN_DRIVE = 5 * 6
"""A token's own drive, which the graph reads out beside the state and the definition with it."""


def selective() -> onnx.ModelProto:
    model = graph(SELECTIVE, w0=ones(6, 6), w1=ones(6, 3), w2=ones(6), w3=ones(6, 4))
    model.opset_import.add(domain="aum_compress", version=1)
    model.functions.append(scan_function(20, "one-way", "scan", 5))
    return model


def test_a_scan_counts_as_defined_and_inlined_what_it_runs():
    model = selective()
    found = measured(model)
    assert macs(found) == SCAN_MACS + OUTSIDE_MACS
    assert elementwise(found, "exp") == 5 * 6 * 3
    assert elementwise(found, "softplus") == elementwise(found, "silu") == 5 * 6
    inlined = inliner.inline_local_functions(model)
    assert not inlined.functions
    again = measured(inlined)
    assert macs(again) == SCAN_MACS + OUTSIDE_MACS + OWN_DRIVE
    assert again.peak_activation_bytes == found.peak_activation_bytes


@pytest.mark.parametrize(
    "level",
    [onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED],
)
def test_a_scan_that_onnxruntime_has_optimised_counts_as_inlined(level, tmp_path):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(selective().SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert check_onnx(tmp_path / "optimised.onnx").macs == SCAN_MACS + OUTSIDE_MACS + OWN_DRIVE


def test_products_beyond_the_next_layer_are_no_part_of_a_recurrence():
    text = """g (float[7,3] xs, float[3] start) => (float[7,4] out) {
        scaled = Mul (xs, before)
        mixed = MatMul (scaled, w0)
        driven = Mul (mixed, near)
        end, ys = Scan <num_scan_inputs = 1, body = s (float[3] h, float[3] x) => (float[3] n, float[3] k) {
            n = Add (h, x)  k = Identity (n)
        }> (start, driven)
        gated = Mul (ys, near)
        made = MatMul (gated, w1)
        out = Mul (made, after)
    }"""
    weights = {"before": ones(3), "near": ones(3), "w0": ones(3, 3), "w1": ones(3, 4), "after": ones(4)}
    found = measured(graph(text, **weights))
    assert macs(found) == 7 * (9 + 12) + 2 * 7 * 3
    assert elementwise(found, "multiply") == 7 * 3 + 7 * 4
