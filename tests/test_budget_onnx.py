"""The ONNX graph as a witness on our exports: against the configuration, and against the bundle."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import inliner
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
from aum_compress.budget.records import Limits, enforce
from aum_compress.bundle import BundleCard, write_bundle
from aum_compress.errors import AumError, BudgetExceeded
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
    by_onnx, by_torch = Counter(found.elementwise), Counter(torch_report.elementwise)
    assert by_onnx["divide"] >= by_torch["divide"]
    for kinds in (by_onnx, by_torch):
        kinds["multiply"] += kinds.pop("divide", 0)
    assert by_onnx == by_torch


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


def test_torch_exports_of_other_makers_are_counted(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Hardswish(), torch.nn.Flatten())
    model.append(torch.nn.Linear(4 * 32 * 17, 3)).eval()
    path = tmp_path / "other.onnx"
    torch.onnx.export(model, (torch.zeros(1, 1, 32, 17),), path, dynamo=True, verbose=False, external_data=False)
    report = check_onnx(path)
    assert report.macs == check_model(model, SPEC).macs == 32 * 17 * 4 * 9 + 4 * 32 * 17 * 3
    assert report.param_bytes == sum(parameter.nbytes for parameter in model.parameters())
