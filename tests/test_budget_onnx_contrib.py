"""Costs of onnxruntime's own operators: by hand, by what they are defined as, and as onnxruntime runs them."""

import math
from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, inliner
from onnx_text import counted, graph, ones

from aum_compress.budget.onnx_contrib import DEFINITIONS, contrib_function
from aum_compress.budget.onnx_graph import measure_graph
from aum_compress.budget.onnx_values import Value
from aum_compress.errors import AumError

FLOAT, UINT8 = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8


def contrib(operator: str, inputs: Mapping[str, tuple[int, ...]], outputs: int = 1, **attributes) -> onnx.ModelProto:
    """One operator of onnxruntime's own; inputs of 8 bits are named q..., a scale s..., empty ones have no shape."""
    given, constants = [], []
    for name, shape in inputs.items():
        kind = UINT8 if name[0] == "q" else FLOAT
        if name[0] == "s":
            constants.append(helper.make_tensor(name, FLOAT, shape, np.full(math.prod(shape), 0.1)))
        elif name[0] == "z":
            constants.append(helper.make_tensor(name, UINT8, shape, [128] * math.prod(shape)))
        elif name[0] != "_":
            given.append(helper.make_tensor_value_info(name, kind, shape))
    names = ["" if name[0] == "_" else name for name in inputs]
    domain = attributes.pop("domain", "com.microsoft")
    made = ["y", "", "", "total"][:outputs]
    node = helper.make_node(operator, names, made, domain=domain, **attributes)
    empty = [onnx.ValueInfoProto(name=name) for name in made if name]
    body = helper.make_graph([node], "one", given, empty, constants)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(body, opset_imports=imports, ir_version=10)


def quantised(**shapes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Inputs, each followed by its scale and zero point."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if name != "out":
            found[name] = shape
        found |= {f"s_{name}": (), f"z_{name}": ()}
    return found


CONTRIB = {
    "FusedMatMul": (
        contrib("FusedMatMul", {"a": (2, 6, 4), "b": (2, 5, 6)}, transA=1, transB=1, alpha=0.5),
        2 * 4 * 5 * 6,
    ),
    "FusedMatMul, batch": (contrib("FusedMatMul", {"a": (4, 2, 6), "b": (2, 6, 5)}, transBatchA=1), 2 * 4 * 5 * 6),
    "FusedGemm": (contrib("FusedGemm", {"a": (4, 6), "b": (5, 6), "c": (5,)}, transB=1, activation="Relu"), 4 * 5 * 6),
    "FusedConv": (
        contrib(
            "FusedConv", {"a": (1, 2, 6, 6), "b": (4, 1, 3, 3), "c": (4,)}, group=2, pads=[1] * 4, activation="Relu"
        ),
        4 * 36 * 9,
    ),
    "QuickGelu": (contrib("QuickGelu", {"a": (3, 4)}, alpha=1.0), 0),
    "QuickGelu, 1.702": (contrib("QuickGelu", {"a": (3, 4)}), 0),
    "Gelu": (contrib("Gelu", {"a": (3, 4)}), 0),
    "BiasGelu": (contrib("BiasGelu", {"a": (3, 4), "b": (4,)}), 0),
    "FastGelu": (contrib("FastGelu", {"a": (3, 4), "b": (4,)}), 0),
    "SkipLayerNormalization": (
        contrib("SkipLayerNormalization", {"a": (1, 3, 4), "b": (1, 3, 4), "c": (4,), "d": (4,), "e": (4,)}, 4),
        0,
    ),
    "SkipSimplifiedLayerNormalization": (
        contrib("SkipSimplifiedLayerNormalization", {"a": (1, 3, 4), "b": (1, 3, 4), "c": (4,)}),
        0,
    ),
    "SimplifiedLayerNormalization": (
        contrib("SimplifiedLayerNormalization", {"a": (1, 3, 4), "c": (4,)}, domain="", axis=-1),
        0,
    ),
    "MatMulNBits": (
        contrib("MatMulNBits", {"a": (3, 32), "q": (5, 2, 8), "s": (10,)}, K=32, N=5, bits=4, block_size=16),
        3 * 32 * 5,
    ),
    "DynamicQuantizeMatMul": (
        contrib("DynamicQuantizeMatMul", {"a": (3, 6), "q": (6, 5), "s": (), "z": (), "c": (5,)}),
        3 * 6 * 5,
    ),
    "MatMulIntegerToFloat": (
        contrib("MatMulIntegerToFloat", {"q": (3, 6), "q2": (6, 5), "s": (), "s2": (), "z": (), "z2": (), "c": (5,)}),
        3 * 6 * 5,
    ),
    "QLinearAdd": (contrib("QLinearAdd", quantised(q=(3, 4), q2=(4,), out=())), 0),
    "QLinearMul": (contrib("QLinearMul", quantised(q=(3, 4), q2=(3, 1), out=())), 0),
    "QLinearSigmoid": (contrib("QLinearSigmoid", quantised(q=(3, 4), out=())), 0),
    "QLinearLeakyRelu": (contrib("QLinearLeakyRelu", quantised(q=(3, 4), out=())), 0),
    "QLinearSoftmax": (contrib("QLinearSoftmax", quantised(q=(3, 4), out=()), opset=13), 0),
    "QLinearGlobalAveragePool": (contrib("QLinearGlobalAveragePool", quantised(q=(1, 3, 4, 5), out=())), 0),
    "QLinearGlobalAveragePool, last": (
        contrib("QLinearGlobalAveragePool", quantised(q=(1, 4, 5, 3), out=()), channels_last=1),
        0,
    ),
    "QLinearAveragePool": (contrib("QLinearAveragePool", quantised(q=(1, 3, 4, 6), out=()), kernel_shape=[2, 3]), 0),
    "QLinearConcat": (contrib("QLinearConcat", {"s": (), "z": (), **quantised(q=(2, 3), q2=(2, 4))}, axis=1), 0),
    "QLinearConv": (
        contrib("QLinearConv", quantised(q=(1, 5, 6, 4), q2=(2, 4, 3, 3), out=()), channels_last=1),
        2 * 3 * 4 * 36,
    ),
    "NhwcMaxPool": (contrib("NhwcMaxPool", {"q": (1, 6, 8, 3)}, kernel_shape=[2, 2], strides=[2, 2]), 0),
    "QGemm": (
        contrib("QGemm", {**quantised(q=(3, 6), q2=(6, 5)), "_": (), **quantised(out=())}),
        3 * 6 * 5,
    ),
    "Attention": (
        contrib("Attention", {"a": (2, 5, 6), "b": (6, 24), "c": (24,)}, num_heads=2),
        2 * 5 * 6 * 24 + 2 * 2 * 5 * 5 * 8,
    ),
    "QAttention": (
        contrib(
            "QAttention",
            {"q": (2, 5, 6), "q2": (6, 24), "c": (24,), "s": (), "s2": (), "_": (), "z": (), "z2": ()},
            num_heads=2,
        ),
        2 * 5 * 6 * 24 + 2 * 2 * 5 * 5 * 8,
    ),
    "MultiHeadAttention": (
        contrib("MultiHeadAttention", {"a": (2, 5, 8), "b": (2, 7, 8), "c": (2, 7, 8), "d": (24,)}, num_heads=2),
        2 * 2 * 5 * 7 * 8,
    ),
}


def run(model: onnx.ModelProto) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Random inputs, and what onnxruntime makes of them."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    feeds = {}
    for value in session.get_inputs():
        if value.type == "tensor(float)":
            feeds[value.name] = random.standard_normal(value.shape).astype(np.float32)
        else:
            feeds[value.name] = random.integers(100, 156, value.shape).astype(np.uint8)
    return feeds, session.run(None, feeds)


@pytest.mark.parametrize("name", CONTRIB)
def test_onnxruntimes_own_operators(name):
    """MACs by hand; sizes and types as onnxruntime makes them."""
    model, macs = CONTRIB[name]
    feeds, wanted = run(model)
    found = measure_graph(model, "test.onnx")
    assert sum(own.macs for own in found.operations.values()) == macs
    # what goes in and comes out is alive together; constants are not counted, nor what lies between
    assert found.peak_activation_bytes == sum(array.nbytes for array in (*feeds.values(), *wanted))
    longer = onnx.ModelProto()
    longer.CopyFrom(model)
    longer.graph.node.append(helper.make_node("Cast", ["y"], ["wide"], to=FLOAT))
    longer.graph.node.append(helper.make_node("Neg", ["wide"], ["negative"]))
    assert counted(longer)[1]["negate"] == wanted[0].size


FLOATING = [name for name in CONTRIB if "Q" not in name.replace("QuickGelu", "") and "Quantize" not in name]


@pytest.mark.parametrize("name", [name for name in FLOATING if name not in ("MatMulNBits", "MatMulIntegerToFloat")])
def test_definitions_of_onnxruntimes_own_operators_compute_the_same(name):
    model, _ = CONTRIB[name]
    feeds, wanted = run(model)
    (node,) = model.graph.node
    types = {value.name: value.type for value in model.graph.input}
    function = contrib_function(node, [Value(name, types[name]) for name in node.input])
    defined = onnx.ModelProto()
    defined.CopyFrom(model)
    defined.graph.node[0].domain = function.domain
    defined.functions.append(function)
    defined.opset_import[0].version = function.opset_import[0].version
    whole = inliner.inline_local_functions(defined)
    session = onnxruntime.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    for one, other in zip(session.run(None, feeds), wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)


def test_all_definitions_are_tested():
    tested = {name.split(",")[0] for name in CONTRIB} | {"LayerNormalization", "QuantizeLinear", "DequantizeLinear"}
    assert tested == set(DEFINITIONS)


def test_operators_that_the_standard_took_over_later_are_known_before():
    text = """g (float[3,4] x) => (float[3,4] y) {
        n = LayerNormalization <axis = -1> (x, w, w)
        q = com.microsoft.QuantizeLinear (n, s, z)
        y = com.microsoft.DequantizeLinear (q, s, z)
    }"""
    weights = {"w": ones(4), "s": np.float32(0.1) * np.ones((), np.float32), "z": np.ones((), np.uint16)}
    assert counted(graph(text, opset=13, **weights)) == (0, {"norm": 12, "quantize": 12, "dequantize": 12})


def test_a_form_of_an_operator_that_is_not_written_out_is_unknown():
    past = contrib("Attention", {"a": (2, 5, 6), "b": (6, 24), "c": (24,), "_": (), "p": (2, 2, 2, 3, 4)}, num_heads=2)
    with pytest.raises(AumError, match="y: com.microsoft::Attention"):
        counted(past)
