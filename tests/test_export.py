"""Writing ONNX: structure, names, storage, bytes; what it computes is test_verify's matter."""

import errno
import os
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from exported import CONFIG, LABELS, SPEC, exported, liven, metadata, model, written
from onnx import inliner

from aum_compress.errors import ModelFileError
from aum_compress.export.metadata import OnnxMetadata
from aum_compress.export.onnx_cleanup import store_half
from aum_compress.export.onnx_file import write_whole
from aum_compress.export.onnx_writer import export_onnx, fold_if_needed, round_to_half
from aum_compress.export.scan_function import SCAN_DOMAIN, SCAN_NAMES
from aum_compress.models.config import CPMobileConfig
from aum_compress.models.factory import build_model
from aum_compress.models.quantized import stored_tensors

PRECISIONS = ("fp32", "fp16", "int8")


def load(precision, **options) -> onnx.ModelProto:
    return onnx.load_from_string(exported(precision, **options))


def shape_of(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def makers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in graph.node for name in node.output}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_interface_and_versions(precision):
    proto = load(precision)
    assert [(v.name, shape_of(v)) for v in proto.graph.input] == [("features", [1, 1, 32, 17])]
    assert [(v.name, shape_of(v)) for v in proto.graph.output] == [("logits", [1, 4])]
    assert proto.ir_version == 10
    assert {o.domain: o.version for o in proto.opset_import} == {"": 20, SCAN_DOMAIN: 1}
    assert proto.producer_name == "aum-compress"


def test_batch_axis_open_on_demand():
    graph = load("fp32", dynamic_batch=True).graph
    assert shape_of(graph.input[0]) == ["batch", 1, 32, 17]
    assert shape_of(graph.output[0]) == ["batch", 4]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_both_directions_are_one_node_over_one_scan_of_a_minimal_body(precision):
    proto = load(precision)
    assert sum((n.domain, n.op_type) == (SCAN_DOMAIN, SCAN_NAMES["bi-bi"]) for n in proto.graph.node) == 1
    assert not {"Scan", "Loop", "If"} & {n.op_type for n in proto.graph.node}
    (function,) = (function for function in proto.functions if function.name == SCAN_NAMES["bi-bi"])
    (scan,) = (node for node in function.node if node.op_type == "Scan")
    (body,) = (attribute.g for attribute in scan.attribute if attribute.name == "body")
    assert [node.op_type for node in body.node] == ["Mul", "Add"] * 2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nothing_of_the_exporting_machine_is_left(precision):
    proto = load(precision)
    assert not proto.graph.value_info
    assert not any(node.doc_string or node.metadata_props for node in proto.graph.node)
    assert not any(tensor.doc_string or tensor.metadata_props for tensor in proto.graph.initializer)
    for trace in (b"site-packages", b".py", b"pkg.torch"):
        assert trace not in exported(precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_tensor_is_stored_once_under_its_own_name(precision):
    found = {tensor.name: tensor for tensor in load(precision).graph.initializer}
    stored = stored_tensors(fold_if_needed(model(precision)), half=precision != "fp32")
    assert stored.keys() <= found.keys()
    for name, tensor in stored.items():
        values = onnx.numpy_helper.to_array(found[name])
        assert values.dtype == tensor.numpy().dtype, name
        assert np.array_equal(values, tensor.numpy()) or np.array_equal(values, tensor.numpy().T), name
    # what else is stored are axes, shapes and scalars
    assert max(int(np.prod(found[name].dims)) for name in found.keys() - stored.keys()) <= 8


def test_node_names_tell_the_module():
    names = [node.name for node in load("fp32").graph.node]
    assert "layers.0.mixer.in_proj/MatMul" in names
    assert "layers.0.mixer/SelectiveScanBiBi" in names
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_weight_is_transposed_at_run_time(precision):
    graph = load(precision).graph
    made_by, weights = makers(graph), {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Transpose":
            assert node.input[0] not in weights
            assert made_by[node.input[0]].op_type not in ("DequantizeLinear", "Cast")


def test_int8_weights_and_inputs_reach_their_product_through_dequantize_linear_alone():
    proto = load("int8")
    layers = [(function.domain, function.name) for function in proto.functions if function.name.startswith("Int8")]
    graph = inliner.inline_selected_functions(proto, layers).graph
    made_by, weights = makers(graph), {tensor.name: tensor for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Conv", "Gemm")]
    assert len(products) == 14  # 4 convolutions of the stem, its projection, 8 projections of the block, the head
    narrow = [node for node in products if made_by[node.input[1]].op_type == "DequantizeLinear"]
    assert len(narrow) == 10, "all but convolutions of 4 taps and dt_proj of rank 1, of two directions"
    for node in narrow:
        source, weight = made_by[node.input[0]], made_by[node.input[1]]
        assert source.op_type == "DequantizeLinear"
        assert made_by[source.input[0]].op_type == "QuantizeLinear"
        assert weights[weight.input[0]].data_type == onnx.TensorProto.INT8
        axis = next((attribute.i for attribute in weight.attribute if attribute.name == "axis"), 1)
        assert axis == (1 if node.op_type == "MatMul" else 0)
        assert list(weights[weight.input[1]].dims) == [weights[weight.input[0]].dims[axis]]


def test_onnxruntime_fuses_int8_kernels(tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3  # it warns that an optimised model is for one machine
    onnxruntime.InferenceSession(exported("int8"), options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    assert kinds["MatMulIntegerToFloat"] >= 4
    assert kinds["QLinearConv"] >= 1


def test_size_follows_precision():
    sizes = {precision: sum(len(t.raw_data) for t in load(precision).graph.initializer) for precision in PRECISIONS}
    assert sizes["fp16"] < 0.55 * sizes["fp32"]
    assert sizes["int8"] < 0.8 * sizes["fp16"]


def test_same_model_gives_same_bytes(tmp_path):
    export_onnx(model("int8"), tmp_path / "again.onnx", metadata("int8"))
    assert (tmp_path / "again.onnx").read_bytes() == exported("int8")


def test_values_that_float16_cannot_hold_stay_float32():
    graph = ir.from_proto(load("fp32"))
    for name, value in (("norm_f.weight", 1 + 2**-15), ("layers.0.norm.weight", 1 + 2**-10)):
        graph.graph.initializers[name].const_value = ir.tensor(np.full(16, value, dtype=np.float32))
    store_half(graph, {"norm_f.weight", "layers.0.norm.weight"})
    proto = ir.to_proto(graph)
    found = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    assert found["norm_f.weight"] == onnx.TensorProto.FLOAT
    assert found["layers.0.norm.weight"] == onnx.TensorProto.FLOAT16
    onnx.checker.check_model(proto, full_check=True)
    assert onnxruntime.InferenceSession(proto.SerializeToString()).get_inputs()[0].name == "features"


def test_round_to_half_changes_values_but_not_the_model_given():
    before = {name: tensor.clone() for name, tensor in model("fp32").state_dict().items()}
    rounded = round_to_half(model("fp32"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model("fp32").state_dict().items())
    for name, tensor in rounded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensor.half().float()), name
    features = torch.randn(4, 1, 32, 17)
    with torch.inference_mode():
        torch.testing.assert_close(rounded(features), model("fp32")(features), rtol=0.02, atol=0.02)


def test_round_to_half_names_what_overflows():
    large = liven(build_model(CONFIG))
    with torch.no_grad():
        large.head.weight[0, 0] = 1e5
    with pytest.raises(ModelFileError, match=r"head\.weight.*1e\+05.*65504"):
        round_to_half(large)


def test_cp_mobile_is_folded_and_exported(tmp_path):
    config = CPMobileConfig(n_mels=32, n_frames=17, n_classes=4, base_channels=8)
    network = liven(build_model(config))
    export_onnx(network, tmp_path / "cp.onnx", metadata("fp32"))
    proto = onnx.load(tmp_path / "cp.onnx")
    assert {o.domain for o in proto.opset_import} == {""}
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}
    features = np.random.default_rng(0).standard_normal((1, 1, 32, 17), dtype=np.float32)
    (found,) = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"features": features})
    with torch.inference_mode():
        expected = network(torch.from_numpy(features)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_metadata_survives_the_file():
    given = metadata(
        "int8", budget={"param_bytes": 1234, "passed": True}, metrics={"accuracy": 0.5}, recipe_sha256="ab"
    )
    props = given.to_props()
    assert OnnxMetadata.from_props(props, "model.onnx") == given
    assert props["sample_rate_hz"] == "8000"
    assert given.feature_shape == SPEC.feature_shape
    stored = {entry.key: entry.value for entry in load("fp32").metadata_props}
    assert OnnxMetadata.from_props(stored, "model.onnx") == metadata("fp32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ("bus", "bus")}, "labels: found .*two different"),
        ({"labels": ("bus",)}, "labels: found .*two different"),
        ({"precision": "fp64"}, "precision: found 'fp64', wanted fp32, fp16, int8, int4, mixed"),
        ({"input": {"clip_seconds": 1.0, "mean": 0, "std": 1}}, "input.front_end: absent"),
        ({"input": SPEC.model_dump() | {"std": 0.0}}, "input.std: found 0.0, wanted a number above zero"),
        ({"input": SPEC.model_dump() | {"mean": float("nan")}}, "input.mean: found nan, wanted a finite number"),
        ({"input": SPEC.model_dump() | {"gain": 2}}, "input.gain: unknown"),
        (
            {"input": SPEC.model_dump() | {"front_end": SPEC.front_end.model_dump() | {"n_mels": "32"}}},
            "input.front_end.n_mels: found '32', wanted int",
        ),
        (
            {"input": SPEC.model_dump() | {"front_end": SPEC.front_end.model_dump() | {"hop_samples": 0}}},
            "input.front_end.hop_samples: found 0, wanted a number above zero",
        ),
    ],
)
def test_metadata_that_no_runtime_could_use_is_refused(changes, message):
    with pytest.raises(ModelFileError, match=message):
        replace(metadata("fp32"), **changes)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("labels", None, "lack labels"),
        ("labels", "airport", "labels: 'airport' is not JSON"),
        ("labels", '"airport"', 'labels: found "airport", wanted a list'),
        ("format", '"aum-compress/9"', "format 'aum-compress/9', wanted 'aum-compress/1'"),
        ("precision", '"int2"', "model.onnx: .*precision: found 'int2'"),
    ],
)
def test_metadata_props_that_cannot_be_read_name_file_and_key(key, value, message):
    props = metadata("fp32").to_props()
    props.pop(key)
    if value is not None:
        props[key] = value
    with pytest.raises(ModelFileError, match=rf"(?s)model\.onnx.*{message.removeprefix('model.onnx: ')}"):
        OnnxMetadata.from_props(props, "model.onnx")


def test_metadata_that_does_not_fit_the_model_is_refused(tmp_path):
    path = tmp_path / "model.onnx"
    longer = SPEC.model_dump(mode="json") | {"clip_seconds": 1.0}
    with pytest.raises(ModelFileError, match=r"features of shape \(1, 32, 17\).*makes \(1, 32, 33\)"):
        export_onnx(model("fp32"), path, metadata("fp32", input=longer))
    with pytest.raises(ModelFileError, match="4 classes, the metadata 3 labels"):
        export_onnx(model("fp32"), path, metadata("fp32", labels=LABELS[:3]))
    with pytest.raises(ModelFileError, match="training mode"):
        export_onnx(build_model(CONFIG).train(), path, metadata("fp32"))
    assert not path.exists()


def test_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ModelFileError, match=r"absent/model\.onnx: cannot be written: No such file"):
        write_whole(load("fp32"), tmp_path / "absent" / "model.onnx")


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = written(tmp_path, "fp32")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ModelFileError, match="cannot be written: No space left on device"):
        write_whole(load("int8"), path)
    assert path.read_bytes() == exported("fp32")
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_load(tmp_path):
    for precision in PRECISIONS:
        session = onnxruntime.InferenceSession(str(written(tmp_path, precision)))
        assert session.get_modelmeta().custom_metadata_map["precision"] == f'"{precision}"'
