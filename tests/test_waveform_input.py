"""Files with the front-end inside: what they are, that they are proved, and what proof finds wrong."""

import json
import re
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from exported import LABELS, SPEC, metadata, model, reference, written, written_waveform
from onnx import numpy_helper

from aum_compress.audio.frontend import front_end_module
from aum_compress.audio.resample import resample
from aum_compress.budget.check_onnx import check_onnx
from aum_compress.budget.onnx_bytes import explain_bytes
from aum_compress.errors import DataError, ModelFileError
from aum_compress.export.front_end_function import FrontEndPlan
from aum_compress.export.metadata import OnnxMetadata
from aum_compress.export.runtime import Classifier
from aum_compress.export.verify import verify_onnx
from aum_compress.export.waveform_input import split_front_end, write_waveform_file

PRECISIONS = ("fp32", "fp16", "int8")
NOISE = np.random.default_rng(1).uniform(-0.5, 0.5, (3, 4000)).astype(np.float32)


def altered(path, change) -> None:
    proto = onnx.load(path)
    change(proto)
    path.write_bytes(proto.SerializeToString())


def failures(verification) -> dict[str, str]:
    return {check.name: check.reason for check in verification.checks if not check.passed}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rate_hz", [None, 44_100])
def test_right_file_passes(precision, rate_hz, tmp_path):
    path = written_waveform(tmp_path, precision, input_rate_hz=rate_hz)
    recordings = NOISE if rate_hz is None else resample(NOISE, 8000, rate_hz)
    verification = verify_onnx(path, reference(precision), waveforms=recordings)
    assert verification.passed, "\n".join(verification.lines())
    names = {check.name for check in verification.checks}
    for kind in ("silence", "noise", "24-bit steps", "full scale", "square wave", "click", "constant", "recordings"):
        assert {f"front-end, {kind}", f"waveform, {kind}"} <= names
    assert {"random", "weights", "front-end of the reference"} <= names
    quiet = [check for check in verification.checks if check.name in ("front-end, silence", "front-end, 24-bit steps")]
    assert len(quiet) == 4
    assert max(check.max_abs_error for check in quiet) < 1e-4
    json.dumps(verification.to_dict(), allow_nan=False)


def test_file_is_readable_and_small(tmp_path):
    plain, path = written(tmp_path, "int8"), written_waveform(tmp_path, "int8", input_rate_hz=44_100)
    proto = onnx.load(path)
    assert [node.name for node in proto.graph.node[:2]] == ["front_end/Resample", "front_end/LogMel"]
    assert [(value.name, [d.dim_value for d in value.type.tensor_type.shape.dim]) for value in proto.graph.input] == [
        ("waveform", [1, 22_050])
    ]
    assert (proto.ir_version, proto.opset_import[0].version) == (10, 20)
    assert not any(node.doc_string or node.metadata_props for node in proto.graph.node)
    assert path.stat().st_size - plain.stat().st_size < 20_000
    stored = {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
    assert (stored["reads"], stored["input_rate_hz"], stored["sample_rate_hz"]) == ("waveform", 44_100, 8000)
    assert stored["labels"] == list(LABELS)


def test_open_batch_stays_open(tmp_path):
    path = written_waveform(tmp_path, "fp32", dynamic_batch=True)
    assert verify_onnx(path, reference("fp32")).passed
    single = Classifier(written_waveform(tmp_path, "fp32")).logits(NOISE)
    path = written_waveform(tmp_path, "fp32", dynamic_batch=True)
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    np.testing.assert_allclose(Classifier(path).logits(NOISE), single, atol=1e-5)


def test_logits_are_those_of_front_end_and_model_in_torch(tmp_path):
    with torch.inference_mode():
        features = (front_end_module(SPEC.front_end)(torch.from_numpy(NOISE)) - SPEC.mean) / SPEC.std
        wanted = model("fp32")(features).numpy()
    np.testing.assert_allclose(Classifier(written_waveform(tmp_path, "fp32")).logits(NOISE), wanted, atol=1e-4)


@pytest.mark.parametrize("rate_hz", [8000, 44_100, 48_000])
def test_runtime_hears_the_same_through_either_file(rate_hz, tmp_path):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (round(1.2 * rate_hz), 2)).astype(np.float32)
    plain = Classifier(written(tmp_path, "fp32")).classify_samples(samples, rate_hz)
    inside = Classifier(written_waveform(tmp_path, "fp32")).classify_samples(samples, rate_hz)
    resampling = Classifier(written_waveform(tmp_path, "fp32", input_rate_hz=44_100)).classify_samples(samples, rate_hz)
    assert plain.starts_seconds == inside.starts_seconds == pytest.approx(resampling.starts_seconds, abs=1e-4)
    np.testing.assert_allclose(inside.probabilities, plain.probabilities, atol=1e-4)
    np.testing.assert_allclose(resampling.probabilities, plain.probabilities, atol=0.05)  # windows end in silence


def test_budget_of_the_model_is_unchanged_and_the_front_end_stands_apart(tmp_path):
    plain, inside = check_onnx(written(tmp_path, "int8")), check_onnx(written_waveform(tmp_path, "int8"))
    assert (inside.param_bytes, inside.macs, inside.layers) == (plain.param_bytes, plain.macs, plain.layers)
    assert plain.front_end_bytes is None
    plan = FrontEndPlan(SPEC.front_end.model_dump(), 4000)
    assert plan.factors == (32, 16)
    assert inside.front_end_bytes == 17 * 16 * (2 + 4 + 4)
    mel = sum((end - begin) * (high - low) for begin, end, low, high in plan.bands)
    a_frame = 34 * 400 + 17 * 32 * 32 + mel  # real and imaginary rows of the first step; of the second; filters
    assert inside.front_end_macs == 2 * 17 * a_frame  # two clips a second
    assert "the front-end is part of the file" in " ".join(inside.notes)


def test_every_byte_of_the_file_is_explained(tmp_path):
    path = written_waveform(tmp_path, "int8", input_rate_hz=44_100)
    tensors = {
        name: (tensor.numel() * tensor.element_size(), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in model("int8").state_dict().items()
    }
    by_reason = explain_bytes(path, tensors).by_reason
    assert by_reason["of the front-end inside the file, outside the budget"] == 2720


def test_parts_are_the_front_end_and_the_file_that_it_was_made_from(tmp_path):
    plain, path = written(tmp_path, "fp32"), written_waveform(tmp_path, "fp32")
    proto = onnx.load(path)
    props = {entry.key: entry.value for entry in proto.metadata_props}
    front_end, rest = split_front_end(proto, OnnxMetadata.from_props(props, "x"))
    for part in (front_end, rest):
        onnx.checker.check_model(part, full_check=True)
    assert [node.name for node in rest.graph.node] == [node.name for node in onnx.load(plain).graph.node]
    assert {tensor.name for tensor in front_end.graph.initializer} == {"front_end.mel_filter", "front_end.mel_weight"}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_one_changed_mel_weight_fails(precision, tmp_path):
    path = written_waveform(tmp_path, precision)

    def change(proto):
        (tensor,) = (tensor for tensor in proto.graph.initializer if tensor.name == "front_end.mel_weight")
        values = numpy_helper.to_array(tensor).copy()
        values[0, 40] *= 1.01
        tensor.raw_data = values.tobytes()

    altered(path, change)
    for against in (reference(precision), None):
        found = failures(verify_onnx(path, against, waveforms=NOISE))
        assert "an error of" in found["front-end, noise"]
        assert re.fullmatch(
            r"an error of 0\.00\d+ in the logarithm, at most 0\.001\d* wanted", found["front-end, recordings"]
        )
        assert "silence" not in " ".join(found)


@pytest.mark.parametrize("rate_hz", [None, 48_000])
def test_tones_and_offsets_in_recordings_are_no_fault_of_the_file(rate_hz, tmp_path):
    """Beside them float32 holds quiet cells no better than to its rounding."""
    rate = rate_hz or 8000
    times = np.arange(rate // 2) / rate
    tones = [np.sin(2 * np.pi * hz * times) for hz in (50, 440.3, 1000, 3000.7)]
    offsets = 0.3 + 0.1 * np.random.default_rng(2).uniform(-1, 1, (2, rate // 2)) * [[1], [1e-3]]
    recordings = np.concatenate([tones, np.sign(tones), offsets]).astype(np.float32)
    verification = verify_onnx(written_waveform(tmp_path, "fp32", input_rate_hz=rate_hz), waveforms=recordings)
    heard = [check for check in verification.checks if check.name == "front-end, recordings"]
    assert len(heard) == 2
    assert all(check.passed for check in heard), "\n".join(verification.lines())


@pytest.mark.parametrize(
    ("name", "value"), [("window_step", 0.0157), ("offset", 1e-6), ("mean", -4.1), ("basis_1_step", 0.05)]
)
def test_one_changed_constant_of_the_front_end_fails(name, value, tmp_path):
    path = written_waveform(tmp_path, "fp32")

    def change(proto):
        (constant,) = (n for function in proto.functions for n in function.node if n.output[0] == name)
        assert constant.attribute[0].f != pytest.approx(value)
        constant.attribute[0].f = value

    altered(path, change)
    assert any(check.startswith("front-end, ") for check in failures(verify_onnx(path)))


def test_wrong_rate_fails(tmp_path):
    path = written_waveform(tmp_path, "fp32", input_rate_hz=44_100)
    changed = replace(metadata("fp32"), reads="waveform", input_rate_hz=48_000)
    altered(path, lambda proto: onnx.helper.set_model_props(proto, changed.to_props()))
    assert failures(verify_onnx(path, reference("fp32"))) == {
        "shapes": "waveform is tensor(float) [1, 22050], wanted float32 (batch, *[24000])"
    }
    with pytest.raises(ModelFileError, match=r"which say waveform \(24000,\) and 4 labels"):
        Classifier(path)


@pytest.mark.parametrize(
    ("change", "check", "message"),
    [
        ({"f_min_hz": -100.0}, "metadata", "f_min_hz: Input should be greater than or equal to 0"),
        ({"f_max_hz": -5.0}, "metadata", "must satisfy f_min < f_max"),
        ({"window_samples": 5000}, "metadata", "window_samples 5000 must be at most n_fft 512"),
        ({"n_mels": 16}, "shapes", r"the front-end inside makes features of [1, 32, 17], wanted [1, 16, 17]"),
        ({"hop_samples": 100}, "shapes", r"the front-end inside makes features of [1, 32, 17], wanted [1, 32, 41]"),
    ],
)
def test_metadata_of_another_front_end_fail(change, check, message, tmp_path):
    path, spec = written_waveform(tmp_path, "fp32"), SPEC.model_dump(mode="json")
    changed = metadata("fp32", reads="waveform", input=spec | {"front_end": spec["front_end"] | change})
    altered(path, lambda proto: onnx.helper.set_model_props(proto, changed.to_props()))
    found = failures(verify_onnx(path))
    assert set(found) == {check}
    assert message in found[check]


def test_metadata_of_a_clip_too_short_for_a_frame_fail(tmp_path):
    path, spec = written_waveform(tmp_path, "fp32"), SPEC.model_dump(mode="json")
    changed = metadata("fp32", reads="waveform", input=spec | {"clip_seconds": 1e-9})
    altered(path, lambda proto: onnx.helper.set_model_props(proto, changed.to_props()))
    assert "a clip of 0 samples is too short" in failures(verify_onnx(path))["metadata"]


def test_nan_in_the_front_end_fails(tmp_path):
    path = written_waveform(tmp_path, "fp32")

    def change(proto):
        (tensor,) = (tensor for tensor in proto.graph.initializer if tensor.name == "front_end.mel_weight")
        tensor.raw_data = (numpy_helper.to_array(tensor) * np.float32("nan")).tobytes()

    altered(path, change)
    assert "features are NaN or infinite" in failures(verify_onnx(path))["front-end, noise"]


def test_wrong_sources_and_inputs_are_refused(tmp_path):
    path = written_waveform(tmp_path, "fp32")
    with pytest.raises(ModelFileError, match=r"reads waveform already; give the file that reads features"):
        write_waveform_file(path, tmp_path / "again.onnx")
    with pytest.raises(ModelFileError, match=r"44101 Hz cannot be resampled"):
        write_waveform_file(written(tmp_path, "fp32"), tmp_path / "odd.onnx", 44_101)
    with pytest.raises(
        DataError, match=r"inputs of shape \(1, 3999\), type float32: wanted waveform of shape \(batch, 4000\)"
    ):
        Classifier(path).logits(NOISE[:1, :3999])
    with pytest.raises(DataError, match="type float64"):
        Classifier(path).logits(NOISE.astype(np.float64))
    assert not (tmp_path / "again.onnx").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reads": "samples"}, "reads: found 'samples', wanted features or waveform"),
        ({"reads": "waveform", "input_rate_hz": 0}, "input_rate_hz: found 0, wanted a whole number"),
        ({"input_rate_hz": 48_000}, "input_rate_hz: found 48000, but the file reads features"),
    ],
)
def test_metadata_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ModelFileError, match=message):
        replace(metadata("fp32"), **changes)


def test_files_from_before_there_were_two_kinds_read_features():
    props = metadata("fp32").to_props()
    del props["reads"], props["input_rate_hz"]
    assert OnnxMetadata.from_props(props, "old.onnx") == metadata("fp32")
