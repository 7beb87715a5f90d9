"""Costs of ONNX operators beyond the plain ones: by hand, by the standard's definition, as onnxruntime runs them."""

import math
from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, inliner, numpy_helper, parser

from aum_compress.budget import operators
from aum_compress.budget.onnx_contrib import DEFINITIONS, contrib_function
from aum_compress.budget.onnx_control import CONTROL
from aum_compress.budget.onnx_cost import COUNTED
from aum_compress.budget.onnx_graph import measure_graph
from aum_compress.budget.onnx_products import PRODUCTS
from aum_compress.budget.onnx_values import Value
from aum_compress.errors import AumError, ModelFileError

FLOAT, UINT8 = onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8


def test_every_operator_of_the_standard_has_exactly_one_place():
    standard = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    places = {
        "product": set(PRODUCTS),
        "written": set(operators.ONNX_WRITTEN),
        "read": set(operators.ONNX_READ),
        "pools": set(operators.ONNX_POOLS),
        "free": set(operators.ONNX_FREE),
        "control": set(CONTROL),
        "definition": set(operators.ONNX_BY_DEFINITION),
        "refused": set(operators.ONNX_REFUSED),
    }
    found = [name for names in places.values() for name in names]
    assert len(found) == len(set(found))
    # operators of newer versions of onnx than this was written for are unknown, and an error when met
    assert set(found) >= standard or onnx.defs.onnx_opset_version() > 28
    assert set(found) - standard <= {"BitCast", "CausalConvWithState", "CumProd", "LinearAttention", "SwiGLU"}
    assert operators.ONNX_VIEWS <= operators.ONNX_FREE <= COUNTED


def counted(model: onnx.ModelProto) -> tuple[int, dict[str, int]]:
    found: dict[str, int] = {}
    operations = measure_graph(model, "test.onnx").operations
    for own in operations.values():
        for kind, count in own.elementwise.items():
            found[kind] = found.get(kind, 0) + count
    return sum(own.macs for own in operations.values()), found


def graph(text: str, opset: int = 20, **weights: np.ndarray) -> onnx.ModelProto:
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return model


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


RECURRENT = "g (float[5,2,3] x) => (float[5,d,2,4] y) { y = OP (x, w, r REST) }"
STEPS = 5 * 2  # of two sequences


@pytest.mark.parametrize(
    ("operator", "rest", "directions", "macs", "elementwise"),
    [
        ("RNN <hidden_size = 4>", "", 1, STEPS * 4 * (3 + 4), {"sigmoid": STEPS * 4}),
        ('RNN <hidden_size = 4, activations = ["Relu"]>', ", b", 1, STEPS * 28, {"relu": 40, "add": 40}),
        (
            "GRU <hidden_size = 4, linear_before_reset = 1>",
            ", b",
            1,
            STEPS * 3 * 4 * 7,
            {"sigmoid": 3 * 40, "multiply": 3 * 40, "add": 5 * 40},
        ),
        (
            'LSTM <hidden_size = 4, direction = "bidirectional">',
            "",
            2,
            2 * STEPS * 4 * 4 * 7,
            {"sigmoid": 5 * 80, "multiply": 3 * 80, "add": 80},
        ),
        (
            "LSTM <hidden_size = 4>",
            ", b, , , , p",
            1,
            STEPS * (4 * 28 + 12),
            {"sigmoid": 200, "multiply": 120, "add": 200},
        ),
    ],
)
def test_recurrent_layers(operator, rest, directions, macs, elementwise):
    gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[operator.split()[0]]
    model = graph(
        RECURRENT.replace("OP", operator).replace(" REST", rest),
        w=ones(directions, gates * 4, 3),
        r=ones(directions, gates * 4, 4),
        b=ones(directions, 2 * gates * 4),
        p=ones(directions, 12),
    )
    onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])  # takes it as well
    assert counted(model) == (macs, elementwise)
    assert {own.kind for own in measure_graph(model, "").operations.values()} == {"rnn"}


@pytest.mark.parametrize(
    ("nodes", "weights", "macs", "elementwise"),
    [
        # 48 values in, each meets 3 of 6 outputs' maps through 9 taps, whatever the padding of the output
        (
            "y = ConvTranspose <strides = [2, 2], group = 2, output_padding = [1, 1]> (x, w, b)",
            {"w": ones(4, 3, 3, 3), "b": ones(6)},
            96 * 27,
            {"add": 6 * 10 * 14},
        ),
        (
            "q = Cast <to = 2> (x)  y = ConvInteger <pads = [1, 1, 1, 1]> (q, w)",
            {"w": np.ones((2, 4, 3, 3), np.uint8)},
            2 * 24 * 36,
            {},
        ),
        (
            "q = Cast <to = 2> (x)  y = MatMulInteger (q, w)",
            {"w": np.ones((6, 5), np.uint8)},
            16 * 5 * 6,
            {},
        ),
        ('y = Einsum <equation = "abij,jk,kl->abil"> (x, w, v)', {"w": ones(6, 5), "v": ones(5, 2)}, 16 * 40, {}),
        ('y = Einsum <equation = "...j,jk"> (x, w)', {"w": ones(6, 5)}, 16 * 30, {}),
        ('y = Einsum <equation = "abij->ab"> (x)', {}, 0, {}),
        ("y = LpPool <kernel_shape = [2, 3]> (x)", {}, 0, {"pool": 4 * 3 * 4 * 6}),
        ("k = Constant <value_ints = [2]> ()  y, i = TopK (x, k)", {}, 0, {"sort": 96}),
        ("y = Hardmax (x)", {}, 0, {"softmax": 96}),
        ("y = LRN <size = 3> (x)", {}, 0, {"norm": 96}),
        ("y = MeanVarianceNormalization (x)", {}, 0, {"norm": 96}),
        ("n = GroupNormalization <num_groups = 2> (x, w, w)  y = Exp (n)", {"w": ones(4)}, 0, {"norm": 96, "exp": 96}),
        ("l = LessOrEqual (x, w)  y = Not (l)", {"w": ones(3, 1, 1, 1, 1)}, 0, {"compare": 576}),
        (
            'y = Resize <mode = "linear"> (x, , scales)',
            {"scales": np.array([1, 1, 2, 2], np.float32)},
            0,
            {"interpolate": 384},
        ),
        ("y = Resize (x, , scales)", {"scales": np.array([1, 1, 2, 2], np.float32)}, 0, {}),
        ("i = NonZero (x)  n = Shape (i)  y = Add (x, x)", {}, 0, {"compare": 96, "add": 96}),
        (
            'y = ScatterElements <reduction = "add"> (x, places, x)',
            {"places": np.zeros((1, 4, 4, 6), np.int64)},
            0,
            {"reduce": 96},
        ),
        ("y = ScatterElements (x, places, x)", {"places": np.zeros((1, 4, 4, 6), np.int64)}, 0, {}),
        ("y = Swish (x)", {}, 0, {"silu": 96}),
        ("y = RandomNormalLike (x)", {}, 0, {"random": 96}),
        ("y, s, z = DynamicQuantizeLinear (x)", {}, 0, {"quantize": 96}),
    ],
)
def test_operators_by_hand(nodes, weights, macs, elementwise):
    model = graph(f"g (float[1,4,4,6] x) => (float y) {{ {nodes} }}", opset=24, **weights)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert counted(model) == (macs, elementwise)


def direct(length: int, real: bool) -> int:
    return length * length * (2 if real else 4)


@pytest.mark.parametrize(
    ("text", "opset", "macs"),
    [
        ("g (float[3,16,1] x) => (float[3,9,2] y) { y = DFT <axis = 1, onesided = 1> (x) }", 17, 3 * 16 * 4),
        ("g (float[3,16,2] x) => (float[3,16,2] y) { y = DFT (x) }", 20, 3 * 2 * 16 * 4),
        ("g (float[3,12,2] x) => (float[3,12,2] y) { y = DFT (x) }", 20, 3 * direct(12, real=False)),
        ("g (float[8,3,1] x) => (float[8,3,2] y) { a = Constant <value_int = 0> ()  y = DFT (x, , a) }", 20, 3 * 8 * 3),
        (
            "g (float[2,40,1] x) => (float[2,7,5,2] y) { s = Constant <value_int = 5> ()  y = STFT (x, s, window) }",
            20,
            2 * 7 * (8 * 3 + 8),
        ),
    ],
)
def test_transforms(text, opset, macs):
    assert counted(graph(text, opset=opset, window=ones(8)))[0] == macs


def test_attention_costs_what_its_definition_does():
    text = """g (float[2,5,8] q, float[2,7,8] k, float[2,7,12] v) => (float[2,5,12] y) {
        y = Attention <q_num_heads = 4, kv_num_heads = 4> (q, k, v)
    }"""
    macs, elementwise = counted(graph(text, opset=23))
    assert macs == 2 * 5 * 7 * (8 + 12)  # queries times keys, then weights times values, over all heads
    assert elementwise["softmax"] == 2 * 4 * 5 * 7
    assert measure_graph(graph(text, opset=23), "").peak_activation_bytes == 4 * (2 * 5 * 8 + 2 * 7 * 20 + 2 * 5 * 12)


@pytest.mark.parametrize(
    ("text", "opset", "macs", "elementwise"),
    [
        # two heads share a key; five queries, seven keys
        (
            "g (float[2,4,5,8] q, float[2,2,7,8] k, float[2,2,7,12] v) => (float y) { y = Attention (q, k, v) }",
            24,
            2 * 4 * 5 * 7 * (8 + 12),
            {"softmax": 280},
        ),
        # three keys more from before
        (
            "g (float[2,4,5,8] q, float[2,4,7,8] k, float[2,4,3,8] p) => (float y) "
            "{ y, n, m = Attention (q, k, k, , p, p) }",
            23,
            2 * 4 * 5 * 10 * 16,
            {"softmax": 400},
        ),
        (
            "g (float[2,4,5,8] x, float[2,5,4] c, float[2,5,4] s) => (float y) { y = RotaryEmbedding (x, c, s) }",
            23,
            0,
            {"multiply": 4 * 160, "add": 2 * 160},
        ),
        (
            "g (float[2,6,5] x, float[6,1,4] w, float[6] b) => (float y) { y, n = CausalConvWithState (x, w, b) }",
            27,
            2 * 6 * 5 * 4,
            {"add": 60},
        ),
        # outer product and read-out of a 4x6 state, for 2 heads, 5 steps, 2 sequences; results are scaled
        (
            "g (float[2,5,8] q, float[2,5,12] v) => (float y) { y, s = LinearAttention <q_num_heads = 2, "
            'kv_num_heads = 2, update_rule = "linear"> (q, q, v) }',
            27,
            2 * 2 * 5 * 2 * 24 + 120,
            {},
        ),
        ("g (float[2,5,8] x) => (float y) { y = SwiGLU (x, x) }", 28, 0, {"silu": 80, "multiply": 80}),
    ],
)
def test_operators_that_the_standard_defines_by_others(text, opset, macs, elementwise):
    if opset > onnx.defs.onnx_opset_version():
        pytest.skip(f"onnx {onnx.__version__} does not know it")
    model = graph(text, opset=opset)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    found = counted(model)
    assert found[0] == macs
    assert elementwise.items() <= found[1].items()


def test_an_operator_that_the_files_version_does_not_have_is_unknown():
    text = "g (float[1,1,3,3] x) => (float[1,1,3,3] y) { y = Swish (x) }"
    assert counted(graph(text, opset=24)) == (0, {"silu": 9})
    with pytest.raises(AumError, match="y: Swish"):
        counted(graph(text, opset=20))
    with pytest.raises(AumError, match="y: DeformConv"):
        counted(graph("g (float[1,1,3,3] x) => (float y) { y = DeformConv (x, x, x) }"))


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


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_products_of_matrices_of_any_rank(data):
    """Against the products that numpy makes, one by one."""
    sizes = st.integers(1, 4)
    batch = data.draw(st.lists(sizes, max_size=2))
    rows, inner, columns = data.draw(st.tuples(sizes, sizes, sizes))
    one = data.draw(st.sampled_from([[inner], [rows, inner], [*batch, rows, inner]]))
    other = data.draw(st.sampled_from([[inner], [inner, columns], [*batch, inner, columns]]))
    model = graph(f"g (float{one} a, float{other} b) => (float y) {{ y = MatMul (a, b) }}".replace("float[]", "float"))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    result = np.matmul(np.zeros(one), np.zeros(other))
    assert counted(model) == (result.size * inner, {})


def test_an_einsum_that_does_not_fit_is_an_error():
    with pytest.raises((AumError, ModelFileError)):
        counted(graph('g (float[2,3] x) => (float y) { y = Einsum <equation = "abc->a"> (x) }'))
