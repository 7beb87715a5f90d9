"""Costs of ONNX operators beyond the plain ones: by hand, and by the standard's definition."""

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_text import counted, graph, ones

from aum_compress.budget import operators
from aum_compress.budget.onnx_control import CONTROL
from aum_compress.budget.onnx_cost import COUNTED
from aum_compress.budget.onnx_graph import measure_graph
from aum_compress.budget.onnx_products import PRODUCTS
from aum_compress.errors import AumError, ModelFileError


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
