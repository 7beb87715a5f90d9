"""Small files: an int8 layer is one node, nothing is said twice, and every byte is accounted for."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from exported import LABELS, exported, metadata, model, written, written_waveform

from aum_compress.audio.config import InputSpec
from aum_compress.budget.check_onnx import check_onnx
from aum_compress.budget.onnx_parts import FRAMING, FRONT_END_VALUES, METADATA, PARAMETERS, file_parts
from aum_compress.compress.quantize import quantize
from aum_compress.export.onnx_compact import compact, int8_function
from aum_compress.export.onnx_writer import export_onnx
from aum_compress.export.waveform_input import write_waveform_file
from aum_compress.models.factory import build_model
from aum_compress.models.presets import PRESETS, front_end_of


def test_every_int8_layer_is_one_node():
    proto = onnx.load_from_string(exported("int8"))
    kinds = Counter(node.op_type for node in proto.graph.node)
    # 4 convolutions and a linear layer of the stem; those of the block with at most 4 weights an output are float16
    assert {name: count for name, count in kinds.items() if name.startswith("Int8")} == {
        **{"Int8Conv": 4, "Int8Linear": 1, "Int8MatMul": 4, "Int8Gemm": 1}
    }
    # 3 inputs of each of two scans have no layer that they could be written with
    written_out = [n.name for n in proto.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(written_out) == 12
    assert all(".scan_" in name for name in written_out)
    names = {node.name for node in proto.graph.node}
    assert {"layers.0.mixer.in_proj/MatMul", "patch_embed.stages.0.0/Conv"} <= names


def test_attributes_with_their_default_are_not_written():
    proto = onnx.load_from_string(exported("fp32"))
    for node in proto.graph.node:
        given = {attribute.name for attribute in node.attribute}
        assert not given & {"auto_pad", "kernel_shape", "alpha", "beta", "noop_with_empty_axes"}, node.name
        if node.op_type == "Conv" and "strides" in given:
            assert set(onnx.helper.get_node_attr_value(node, "strides")) != {1}


def test_what_is_compact_stays_as_it_is():
    proto = onnx.load_from_string(exported("int8"))
    again = onnx.load_from_string(exported("int8"))
    compact(again)
    assert again == proto


QUANTISED = """
    <ir_version: 10, opset_import: ["": 20]>
    small (float[1, 4] x) => (float[1, 2] y)
    <float s = {0.1}, uint8 z = {128}, int8[2, 4] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[2] ws = {0.1, 0.2},
     float[2] b = {1, 2}, int8[4, 2] v = {1, 2, 3, 4, 5, 6, 7, 8}>
    {
        q = QuantizeLinear (x, s, z)
        d = DequantizeLinear (q, s, z)
        BODY
    }
"""


@pytest.mark.parametrize(
    ("body", "wrapped"),
    [
        ("m = DequantizeLinear <axis = 0> (w, ws)\ny = Gemm <transB = 1> (d, m, b)", ["Int8Gemm"]),
        ("m = DequantizeLinear (v, ws)\ny = MatMul (d, m)", ["Int8MatMul"]),
        ("m = DequantizeLinear (v, ws)\np = MatMul (d, m)\ny = Add (b, p)", ["Int8Linear"]),
        # what differs from an int8 layer stays written out
        ("m = DequantizeLinear <axis = 0> (w, ws)\ny = Gemm <transB = 1, alpha = 0.5> (d, m, b)", []),
        ("m = DequantizeLinear <axis = 0> (w, s)\ny = Gemm <transB = 1> (q2, m, b)\nq2 = Identity (d)", []),
        ("m = DequantizeLinear (v, ws)\np = MatMul (d, m)\nn = Neg (d)\nk = MatMul (n, m)\ny = Add (k, p)", []),
    ],
)
def test_only_int8_layers_are_wrapped_and_they_compute_the_same(body, wrapped):
    if "q2 = Identity (d)" in body:  # in the order in which they are computed
        body = "q2 = Identity (d)\n" + body.replace("\nq2 = Identity (d)", "")
    proto = onnx.parser.parse_model(QUANTISED.replace("BODY", body))
    before = onnx.ModelProto.FromString(proto.SerializeToString())
    compact(proto)
    onnx.checker.check_model(proto, full_check=True)
    assert [node.op_type for node in proto.graph.node if node.op_type.startswith("Int8")] == wrapped
    x = np.array([[0.11, -0.52, 3.0, 9.0]], dtype=np.float32)
    found, wanted = (onnx.reference.ReferenceEvaluator(m).run(None, {"x": x})[0] for m in (proto, before))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("name", ["Int8Gemm", "Int8Linear"])
def test_weights_of_what_may_become_a_gemm_have_a_zero_point_for_each_scale(name):
    """onnxruntime 1.21 makes QGemm of it, which asks for as many, and fails at the first clip otherwise."""
    function = int8_function(name, 20)
    makers = {made: node for node in function.node for made in node.output}
    (widened,) = (node for node in function.node if node.input[0] == "weight")
    assert list(widened.input[:2]) == ["weight", "weight_scale"]
    zeros = makers[widened.input[2]]
    value = onnx.numpy_helper.to_array(onnx.helper.get_node_attr_value(zeros, "value"))
    assert (zeros.op_type, value.dtype, value.item()) == ("ConstantOfShape", np.int8, 0)
    shape = makers[zeros.input[0]]
    assert (shape.op_type, list(shape.input)) == ("Shape", ["weight_scale"])


def test_student_of_128_kb_is_a_file_of_160_kb_at_most(tmp_path):
    """At most 32,000 bytes beside the parameters, and at most 60,000 more for the front-end."""
    spec = InputSpec(front_end=front_end_of("student-int8"), clip_seconds=1.0)
    config = PRESETS["student-int8"](spec.front_end.n_mels, spec.front_end.n_frames(1.0), len(LABELS))
    wide = tuple(block.model_copy(update={"d_inner": 112}) for block in config.blocks)
    torch.manual_seed(0)
    heard = torch.randn(2, 1, config.n_mels, config.n_frames)
    student = quantize(build_model(config.model_copy(update={"blocks": wide})).eval(), [heard])
    plain, inside = tmp_path / "model.onnx", tmp_path / "model-waveform.onnx"
    export_onnx(student, plain, metadata("int8", input=spec.model_dump(mode="json")))
    write_waveform_file(plain, inside)
    parts = file_parts(plain)
    assert 110_000 < parts[PARAMETERS] <= 128_000
    assert sum(parts.values()) - parts[PARAMETERS] < 32_000
    assert inside.stat().st_size - plain.stat().st_size < 60_000


@pytest.mark.parametrize("write", [written, written_waveform])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_parts_add_up_to_the_file(write, precision, tmp_path):
    path = write(tmp_path, precision)
    parts, report = file_parts(path), check_onnx(path)
    assert sum(parts.values()) == path.stat().st_size
    assert parts[PARAMETERS] == report.param_bytes
    assert parts.get(FRONT_END_VALUES) == report.front_end_bytes
    assert 300 < parts[METADATA] < 1000
    assert 0 < parts[FRAMING] < 1000
    assert "function SelectiveScanBiBi" in parts
    assert sum(tensor.numel() for tensor in model(precision).state_dict().values()) > 1000


def test_constants_in_nodes_are_parameters_too(tmp_path):
    text = """
        <ir_version: 10, opset_import: ["": 20]>
        small (float[1, 4] x) => (float[1, 4] y)
        { w = Constant <value = float[1, 4] {1, 2, 3, 4}> ()
          y = Mul (x, w) }
    """
    path = tmp_path / "small.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    parts = file_parts(path)
    assert parts[PARAMETERS] == 16
    assert sum(parts.values()) == path.stat().st_size
