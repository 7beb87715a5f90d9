"""ONNX graphs of any maker: counted by hand, refused where unsure."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from onnx_text import counted, graph, ones

from aum_compress.audio.config import InputSpec, LogMelConfig
from aum_compress.budget.check_onnx import check_onnx
from aum_compress.budget.onnx_bytes import explain_bytes
from aum_compress.budget.onnx_file import INPUT_KEY
from aum_compress.budget.onnx_graph import measure_graph
from aum_compress.budget.records import Limits
from aum_compress.errors import AumError, ModelFileError


@pytest.mark.parametrize(
    ("nodes", "weights", "macs", "elementwise"),
    [
        ("y = Conv <pads = [1, 1, 1, 1], group = 2> (x, w)", {"w": ones(6, 2, 3, 3)}, 6 * 4 * 6 * 18, {}),
        ("y = Conv (x, w, b)", {"w": ones(2, 4, 1, 1), "b": ones(2)}, 2 * 24 * 4, {"add": 48}),
        ("y = ConvTranspose <strides = [2, 2]> (x, w)", {"w": ones(4, 3, 3, 3)}, 96 * 27, {}),
        ("y = MatMul (x, w)", {"w": ones(6, 5)}, 4 * 4 * 5 * 6, {}),
        ("f = Flatten (x)  y = Gemm <transB = 1> (f, w, b)", {"w": ones(3, 96), "b": ones(3)}, 288, {"add": 3}),
        ('y = Einsum <equation = "abij,jk->abik"> (x, w)', {"w": ones(6, 5)}, 4 * 4 * 5 * 6, {}),
        ("s = Sigmoid (x)  y = Mul (s, x)", {}, 0, {"silu": 96}),
        ("s = Sigmoid (x)  y = Mul (s, s)", {}, 0, {"sigmoid": 96, "multiply": 96}),
        ("p = AveragePool <kernel_shape = [2, 2]> (x)  y = GlobalAveragePool (p)", {}, 0, {"pool": 4 * 3 * 5}),
        ("s = Shape (x)  d = Add (s, s)  y = Expand (x, s)", {}, 0, {}),
    ],
)
def test_operators_by_hand(nodes, weights, macs, elementwise):
    model = graph(f"g (float[1,4,4,6] x) => (float y) {{ {nodes} }}", **weights)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    found = counted(model)
    if "GlobalAveragePool" in nodes:  # two kinds of pool: windows of four, then what is left
        assert found == (0, {"pool": 4 * 3 * 5 * 4 + 4 * 3 * 5})
    else:
        assert found == (macs, elementwise)


SCAN = """g (float[3,2] start, float[7,3,2] xs) => (float[3,2] end, float[7,3,2] ys) {
    end, ys = Scan <num_scan_inputs = 1, body = step (float[a,b] h, float[a,b] x) => (float[a,b] n, float[a,b] k) {
        d = Mul (h, w)  n = Add (d, x)  r = Exp (n)  k = Mul (r, x)
    }> (start, xs)
}"""


def test_the_body_of_a_scan_counts_once_a_step():
    found = measure_graph(graph(SCAN, w=ones(3, 2)), "test.onnx").operations
    assert [(own.macs, own.elementwise, own.kind) for own in found.values()] == [(7 * 2 * 6, {"exp": 7 * 6}, "scan")]


def test_a_scan_along_another_axis_takes_its_length_from_there():
    text = SCAN.replace("num_scan_inputs", "scan_input_axes = [2], num_scan_inputs").replace("[7,3,2] xs", "[3,2,5] xs")
    assert counted(graph(text.replace("[7,3,2] ys", "[5,3,2] ys"), w=ones(3, 2)))[0] == 5 * 2 * 6


def saved(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path


def test_bytes_are_those_of_the_stored_width(tmp_path):
    model = graph(
        """g (float[1,6] x) => (float[1,5] y) <int64[2] shape = {1, 6}, float eps = {0.5}> {
            r = Reshape (x, shape)
            e = Add (r, eps)
            q = QuantizeLinear (e, input_scale, input_zero)
            d = DequantizeLinear (q, input_scale, input_zero)
            w = DequantizeLinear <axis = 1> (head.weight, head.weight_scale)
            half = Cast <to = 1> (head.bias)
            y = Gemm (d, w, half)
        }""".replace("head.", "head_"),
        head_weight=np.ones((6, 5), np.int8),
        head_weight_scale=ones(5),
        head_bias=np.ones(5, np.float16),
        input_scale=np.float32(0.1) * np.ones(()),
        input_zero=np.ones((), np.uint8),
    )
    model.graph.initializer[5].CopyFrom(numpy_helper.from_array(np.array(0.1, np.float32), "input_scale"))
    report = check_onnx(saved(model, tmp_path / "int8.onnx"))
    assert report.param_bytes == 30 + 5 * 4 + 5 * 2 + 4 + 1
    assert report.params == 30 + 5
    assert report.macs == 30
    assert report.elementwise == {"dequantize": 36, "add": 11, "quantize": 6}
    assert any("20 bytes of shapes, axes and single constants" in note for note in report.notes)
    assert any("one run is taken to be 1 s" in note for note in report.notes)


def test_weights_in_constant_nodes_and_functions_are_stored_once(tmp_path):
    model = graph("g (float[1,4] x) => (float[1,4] z) { y = own.Shift (x)  z = own.Shift (y) }")
    model.opset_import.add(domain="own", version=1)
    function = parser.parse_function('<domain: "own", opset_import: ["": 20]> Shift (a) => (b) { b = Add (a, c) }')
    node = onnx.helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(ones(4)))
    function.node.insert(0, node)
    model.functions.append(function)
    report = check_onnx(saved(model, tmp_path / "constants.onnx"))
    assert report.param_bytes == 16
    assert report.elementwise == {"add": 8}


def test_a_layer_is_no_front_end_by_its_name(tmp_path):
    text = "g (float[1,6] x) => (float[1,3] z) { y = Gemm (x, front_end.weight)  z = Gemm (y, head.weight) }"
    model = graph(text.replace(".", "_"), front_end_weight=ones(6, 5), head_weight=ones(5, 3))
    for named in (*model.graph.initializer, *model.graph.node):
        if isinstance(named, onnx.NodeProto):
            named.input[1] = named.input[1].replace("_w", ".w")
        else:
            named.name = named.name.replace("_w", ".w")
    report = check_onnx(saved(model, tmp_path / "m.onnx"))
    assert (report.param_bytes, report.macs) == (30 * 4 + 15 * 4, 30 + 15)
    assert (report.front_end_bytes, report.front_end_macs) == (None, None)
    assert [(layer.name, layer.param_bytes, layer.macs) for layer in report.layers] == [
        ("front_end", 120, 30),
        ("head", 60, 15),
    ]
    both = {"head.weight": (60, "float32"), "front_end.weight": (120, "float32")}
    assert explain_bytes(model, both).by_reason == {}
    with pytest.raises(AumError, match=r"front_end\.weight: 120 bytes float32 in the file, 0 bytes \(absent\)"):
        explain_bytes(model, {"head.weight": (60, "float32")})


LOG_MEL = """<domain: "aum_compress", opset_import: ["": 20]>
LogMel (waveform, mel) => (features) { own = Constant <value = float[2] {1.0, 2.0}> ()
    filtered = MatMul (waveform, mel)  features = Mul (filtered, own) }"""


@pytest.mark.parametrize(("weight", "apart"), [("w", 6 * 2 * 4 + 2 * 4), ("mel", 2 * 4)])
def test_a_front_end_is_what_its_functions_alone_read_and_hold(weight, apart, tmp_path):
    nodes = f"f = aum_compress.LogMel (x, mel)  y = MatMul (x, {weight})  z = Add (f, y)"
    model = graph(f"g (float[1,6] x) => (float[1,2] z) {{ {nodes} }}", **{name: ones(6, 2) for name in {"mel", weight}})
    model.opset_import.add(domain="aum_compress", version=1)
    model.functions.append(parser.parse_function(LOG_MEL))
    report = check_onnx(saved(model, tmp_path / "m.onnx"))
    assert (report.param_bytes, report.macs) == (6 * 2 * 4, 12)
    assert (report.front_end_bytes, report.front_end_macs) == (apart, 12)


def test_integers_that_are_more_than_a_shape_are_parameters(tmp_path):
    model = graph(
        """g (float[1,6] x) => (float[1,20] z) <int64[2] shape = {1, 6}> {
            r = Reshape (x, shape)  wide = Cast <to = 1> (head_weight)  z = MatMul (r, wide)
        }""",
        head_weight=np.ones((6, 20), np.int64),
    )
    report = check_onnx(saved(model, tmp_path / "m.onnx"), Limits(max_param_bytes=6 * 20 * 8 - 1))
    assert (report.param_bytes, report.params, report.wide_params) == (6 * 20 * 8, 120, 120)
    assert [(layer.name, layer.macs) for layer in report.layers if layer.macs] == [("head_weight", 120)]
    assert any("16 bytes of shapes, axes and single constants" in note for note in report.notes)
    assert report.over


def test_the_clip_length_that_a_file_states_cannot_be_overruled(tmp_path):
    model = graph("g (float[1,6] x) => (float[1,5] y) { y = MatMul (x, w) }", w=ones(6, 5))
    spec = InputSpec(front_end=LogMelConfig(), clip_seconds=2.0)
    onnx.helper.set_model_props(model, {INPUT_KEY: spec.model_dump_json()})
    path = saved(model, tmp_path / "m.onnx")
    assert check_onnx(path).macs == check_onnx(path, clip_seconds=2.0).macs == 15
    with pytest.raises(
        AumError, match=r"m\.onnx: clip_seconds: found 60, wanted 2, the clip length that the file states"
    ):
        check_onnx(path, clip_seconds=60.0)


def test_macs_are_for_one_second(tmp_path):
    path = saved(graph("g (float[1,6] x) => (float[1,5] y) { y = MatMul (x, w) }", w=ones(6, 5)), tmp_path / "m.onnx")
    report = check_onnx(path, clip_seconds=4.0)
    assert (report.macs_per_clip, report.macs) == (30, 8)
    assert report.dcase_macs is None
    with pytest.raises(AumError, match=r"clip_seconds: found 0, wanted a positive number"):
        check_onnx(path, clip_seconds=0)


def test_an_unknown_operator_is_an_error_that_names_node_and_operator(tmp_path):
    model = graph(
        """g (float[1,4] x) => (float[1,4] z) {
            [odd] y = com.example.Fancy (x)
            d = Det (y)
            z = Add (x, y)
        }"""
    )
    model.opset_import.add(domain="com.example", version=1)
    with pytest.raises(AumError) as caught:
        check_onnx(saved(model, tmp_path / "model.onnx"))
    assert "odd: com.example::Fancy" in str(caught.value)
    assert "d: Det" in str(caught.value)
    assert "Add" not in str(caught.value)


def test_an_unknown_operator_inside_a_scan_is_found():
    with pytest.raises(AumError, match="r: Gamma"):
        counted(graph(SCAN.replace("Exp", "Gamma"), w=ones(3, 2)))


def test_dynamic_dimensions_without_a_value_are_refused_and_can_be_given(tmp_path):
    path = saved(
        graph("g (float[n,t,6] x) => (float[n,t,5] y) { y = MatMul (x, w) }", w=ones(6, 5)), tmp_path / "m.onnx"
    )
    with pytest.raises(
        ModelFileError, match=r"dynamic dimensions without a value(.|\n)*input x, axis 1: t(.|\n)*--dim"
    ):
        check_onnx(path)
    assert check_onnx(path, dims={"t": 10}).macs == 10 * 30
    with pytest.raises(ModelFileError, match="no input has a dimension named T; named are: n, t"):
        check_onnx(path, dims={"t": 10, "T": 10})


def test_a_size_that_depends_on_values_is_refused():
    chosen = graph("g (float[4] x) => (float[a] y) { n = NonZero (x) r = Squeeze (n) g = Gather (x, r) y = Relu (g) }")
    with pytest.raises(ModelFileError, match="Relu y: the size of 'y' does not follow"):
        counted(chosen)
    reshaped = graph("g (float[24] x, int64[2] s) => (float[a,b] y) { r = Reshape (x, s) y = Relu (r) }")
    with pytest.raises(ModelFileError, match="Relu y: the size of 'y' does not follow"):
        counted(reshaped)


def test_shapes_that_contradict_each_other_are_refused():
    with pytest.raises(ModelFileError, match="shapes do not fit together"):
        counted(graph("g (float[1,6] x) => (float[1,5] y) { y = MatMul (x, w) }", w=ones(7, 5)))


def test_files_that_are_not_onnx_are_refused(tmp_path):
    good = saved(
        graph("g (float[1,6] x) => (float[1,5] y) { y = MatMul (x, w) }", w=ones(6, 5)), tmp_path / "good.onnx"
    )
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(good.read_bytes()[:-20])
    text = tmp_path / "text.onnx"
    text.write_text("this is not a model")
    empty = tmp_path / "empty.onnx"
    empty.write_bytes(b"")
    for path in (cut, text, empty):
        with pytest.raises(ModelFileError, match=f"{path.name}: not an ONNX file"):
            check_onnx(path)
    with pytest.raises(ModelFileError, match="no such file"):
        check_onnx(tmp_path / "absent.onnx")


def test_weights_outside_the_file_are_counted_and_missing_ones_named(tmp_path):
    model = graph("g (float[1,6] x) => (float[1,5] y) { y = MatMul (x, w) }", w=ones(6, 5))
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert check_onnx(path).param_bytes == 120
    data = tmp_path / "weights.bin"
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ModelFileError, match=r"w: weights\.bin has 100 bytes, wanted at least 120"):
        check_onnx(path)
    data.unlink()
    with pytest.raises(ModelFileError, match=r"w: weights\.bin: absent"):
        check_onnx(path)


def test_sparse_weights_count_as_stored(tmp_path):
    model = graph("g (float[1,6] x) => (float[1,5] y) { y = MatMul (x, w) }")
    values, indices = numpy_helper.from_array(ones(3), "w"), numpy_helper.from_array(np.array([3, 7, 20]), "i")
    model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [6, 5]))
    report = check_onnx(saved(model, tmp_path / "sparse.onnx"))
    assert report.param_bytes == 3 * 4 + 3 * 8
    assert report.params == 3
    assert report.macs == 30  # zeros are multiplied like anything else
