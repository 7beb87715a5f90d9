"""The ONNX graph as a witness: against the configuration on our exports, by hand elsewhere, refused where unsure."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import inliner, numpy_helper, parser
from safetensors.torch import save

from aum_compress.audio.config import InputSpec, LogMelConfig
from aum_compress.budget.analytic import analytic_macs
from aum_compress.budget.check import check_bundle, check_model
from aum_compress.budget.check_onnx import check_onnx
from aum_compress.budget.onnx_bytes import (
    FOLDED,
    FOLDED_BIAS,
    NARROWED,
    NEVER_READ,
    QUANTISED,
    SCALES,
    STRUCTURE,
    bundle_sizes,
    explain_bytes,
)
from aum_compress.budget.onnx_graph import measure_graph
from aum_compress.budget.records import Limits, enforce
from aum_compress.bundle import BundleCard, write_bundle
from aum_compress.errors import AumError, BudgetExceeded, ModelFileError
from aum_compress.export.metadata import OnnxMetadata
from aum_compress.export.onnx_writer import export_onnx, round_to_half
from aum_compress.models.config import AudioMambaConfig, BlockConfig, ConvStage, ConvStem, CPMobileConfig, PatchStem
from aum_compress.models.factory import Model, build_model, fold_batch_norm
from aum_compress.models.quantized import quantizable_layers, stored_tensors, swap_in_quantized

SPEC = InputSpec(
    front_end=LogMelConfig(sample_rate_hz=8000, n_fft=512, window_samples=512, hop_samples=500, n_mels=32),
    clip_seconds=1.0,
)
BOTH_WAYS = BlockConfig(d_inner=10, d_state=3, dt_rank=2)
ONE_WAY = BlockConfig(d_inner=7, d_state=5, dt_rank=1, d_conv=3, block_type="none")
SHARED = BlockConfig(d_inner=9, d_state=4, dt_rank=2, block_type="v1")
SIZES = {"n_mels": 32, "n_frames": 17, "n_classes": 4}
STUDENT = AudioMambaConfig(
    **SIZES,
    d_model=12,
    blocks=(BOTH_WAYS, ONE_WAY),
    stem=ConvStem(stages=(ConvStage(channels=8, stride_mels=4, expansion=0), ConvStage(channels=6))),
    position="rope",
    head="mlp",
)
AUM = AudioMambaConfig(
    **SIZES,
    d_model=12,
    blocks=(BOTH_WAYS, ONE_WAY, SHARED),
    stem=PatchStem(patch_mels=8, patch_frames=4, stride_mels=8, stride_frames=4),
    pool="class_token",
    position="absolute",
)
CP_MOBILE = CPMobileConfig(**SIZES)


def write_export(config: AudioMambaConfig | CPMobileConfig, precision: str, path: Path, **options: bool) -> Model:
    """Writes a random model of `config` to `path` and returns what was written."""
    model = round_to_half(build_model(config).eval()) if precision != "fp32" else fold_batch_norm(build_model(config))
    if precision == "int8":
        swap_in_quantized(model, list(quantizable_layers(model)))
    metadata = OnnxMetadata(labels=("a", "b", "c", "d"), input=SPEC.model_dump(), precision=precision)
    export_onnx(model.eval(), path, metadata, **options)
    return model


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Name -> (configuration, precision, file, model): exporting is slow, so each is written once."""
    folder = tmp_path_factory.mktemp("exports")
    wanted = {"student": (STUDENT, "int8"), "aum": (AUM, "fp16"), "cp-mobile": (CP_MOBILE, "int8")}
    return {
        name: (config, precision, path := folder / f"{name}.onnx", write_export(config, precision, path))
        for name, (config, precision) in wanted.items()
    }


@pytest.mark.parametrize("name", ["student", "aum", "cp-mobile"])
def test_all_witnesses_agree_on_an_exported_file(name, exports):
    config, precision, path, model = exports[name]
    found = check_onnx(path, config=model.config)  # agrees layer by layer, or raises
    assert found.witnesses == ("ONNX graph", "configuration")
    assert found.macs == sum(analytic_macs(config).values())
    stored = stored_tensors(model, half=precision != "fp32")
    torch_report = check_model(model, SPEC, stored)
    assert found.macs == torch_report.macs
    assert found.param_bytes == torch_report.param_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert found.params == torch_report.params
    assert found.front_end_macs == torch_report.front_end_macs
    # a norm's product with torch's rsqrt is a division by the root in ONNX; all else is the same
    elementwise = dict(found.elementwise)
    elementwise["multiply"] = elementwise.get("multiply", 0) + elementwise.pop("divide", 0)
    assert Counter(elementwise) == Counter(torch_report.elementwise)


def sizes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, str]]:
    """What `bundle_sizes` reads of a bundle with these tensors."""
    return {name: (tensor.nbytes, str(tensor.dtype).removeprefix("torch.")) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", ["student", "aum", "cp-mobile"])
def test_stored_bytes_follow_from_the_bundle(name, exports, tmp_path):
    """From the tensors that were exported: nothing but structure differs. From the network before: all is explained."""
    config, precision, path, model = exports[name]
    stored = stored_tensors(model, half=precision != "fp32")
    (tmp_path / "model.safetensors").write_bytes(save(stored))
    assert bundle_sizes(tmp_path / "model.safetensors") == sizes(stored)
    found = explain_bytes(path, sizes(stored))
    assert found.by_reason.keys() == {STRUCTURE}
    report = check_onnx(path, stored=sizes(stored))
    assert found.bundle_bytes == report.param_bytes
    assert any(note.startswith("bytes follow from the bundle's tensors") for note in report.notes)

    before = build_model(config).eval()
    explained = explain_bytes(path, sizes(before.state_dict()))
    assert explained.onnx_bytes - explained.bundle_bytes == sum(explained.by_reason.values())
    assert explained.onnx_bytes == found.onnx_bytes
    folded, quantised = {FOLDED, FOLDED_BIAS, NEVER_READ}, {QUANTISED, SCALES}
    wanted = {
        "student": {NARROWED, *folded, *quantised},
        "aum": {NARROWED},
        "cp-mobile": {*folded, *quantised},  # all floats of CP-Mobile come from its norms
    }
    assert explained.by_reason.keys() == {STRUCTURE, *wanted[name]}


@pytest.mark.parametrize("name", ["student", "aum", "cp-mobile"])
def test_what_another_tool_makes_of_an_export_counts_what_it_runs(name, exports, tmp_path):
    """Functions inlined, then fused and converted to integer operators by onnxruntime.

    Where both directions of a scan read the same, their drives and their read-out are computed once for both, so that
    fewer products run than the definition counts.
    """
    _, _, path, _ = exports[name]
    report = check_onnx(path)
    inlined = tmp_path / "inlined.onnx"
    onnx.save(inliner.inline_local_functions(onnx.load(path)), inlined)
    found = check_onnx(inlined)
    if name == "cp-mobile":
        assert (found.macs, found.elementwise) == (report.macs, report.elementwise)
    assert 0.95 < found.macs / report.macs < 1.05
    assert found.peak_activation_bytes == report.peak_activation_bytes
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert check_onnx(tmp_path / "optimised.onnx").macs == found.macs


def test_a_batch_axis_left_open_is_a_batch_of_one(tmp_path):
    config = STUDENT.model_copy(update={"blocks": (ONE_WAY,)})
    path = tmp_path / "model.onnx"
    model = write_export(config, "fp32", path, dynamic_batch=True)
    assert explain_bytes(path, sizes(model.state_dict())).by_reason.keys() == {STRUCTURE}
    report = check_onnx(path)
    assert report.file_bytes == path.stat().st_size
    assert report.macs == sum(analytic_macs(config).values())
    assert any("batch of one" in note for note in report.notes)
    assert check_onnx(path, dims={"batch": 4}).macs == 4 * report.macs


def test_a_graph_that_computes_more_than_its_configuration_is_refused(exports):
    config, _, path, _ = exports["aum"]
    smaller = config.model_copy(update={"blocks": (BOTH_WAYS, ONE_WAY.model_copy(update={"d_state": 4}), SHARED)})
    with pytest.raises(AumError, match=r"ONNX graph and by the configuration differ(.|\n)*layers\.1\.mixer: "):
        check_onnx(path, config=smaller)


def test_an_exported_bundle_is_counted_from_its_file(exports, tmp_path):
    _, precision, path, model = exports["student"]
    card = BundleCard(
        kind="onnx",
        stage="export",
        recipe="test",
        model=model.config,
        input=SPEC,
        labels=("a", "b", "c", "d"),
        precision=precision,
        seed=0,
        versions={},
        created="",
    )
    report = check_bundle(write_bundle(tmp_path / "bundle", card, {"model-int8.onnx": path}))
    assert report.witnesses == ("ONNX graph", "configuration")
    with pytest.raises(BudgetExceeded, match=r"over by 1\); largest: \S+ \d"):
        enforce(replace(report, limits=Limits(max_param_bytes=report.param_bytes - 1)))
    enforce(replace(report, limits=Limits(max_param_bytes=report.param_bytes, max_macs=report.macs)))


def graph(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    """A model of operators from `text`, with initialisers."""
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return model


def counted(model: onnx.ModelProto) -> tuple[int, dict[str, int]]:
    found = measure_graph(model, "test.onnx").operations
    elementwise: dict[str, int] = {}
    for own in found.values():
        elementwise |= own.elementwise
    return sum(own.macs for own in found.values()), elementwise


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


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


def test_torch_exports_of_other_makers_are_counted(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Hardswish(), torch.nn.Flatten())
    model.append(torch.nn.Linear(4 * 32 * 17, 3)).eval()
    path = tmp_path / "other.onnx"
    torch.onnx.export(model, (torch.zeros(1, 1, 32, 17),), path, dynamo=True, verbose=False, external_data=False)
    report = check_onnx(path)
    assert report.macs == check_model(model, SPEC).macs == 32 * 17 * 4 * 9 + 4 * 32 * 17 * 3
    assert report.param_bytes == sum(parameter.nbytes for parameter in model.parameters())
