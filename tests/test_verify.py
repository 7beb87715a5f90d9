"""Verification passes what is right and fails what is wrong: each fault here is one that a file can really have."""

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from exported import CONFIG, LABELS, SPEC, exported, liven, metadata, model, reference, written
from hypothesis import given, settings
from hypothesis import strategies as st

from aum_compress.bundle import BundleCard, now, write_bundle
from aum_compress.errors import ModelFileError, VerificationFailed
from aum_compress.export.verification import (
    TOLERANCES,
    Tolerance,
    Verification,
)
from aum_compress.export.verify import verify_onnx
from aum_compress.export.verify_inputs import golden_file, read_golden, stress_inputs
from aum_compress.models import scan
from aum_compress.models.config import uniform_blocks
from aum_compress.models.factory import build_model
from aum_compress.models.scan import selective_scan

PRECISIONS = ("fp32", "fp16", "int8")
TOLERANCE = Tolerance(max_error=0.01, min_sqnr_db=30.0, min_agreement=1.0)
INPUTS = np.random.default_rng(3).standard_normal((3, 1, 32, 17), dtype=np.float32)


def alter(path, change: Callable[[onnx.ModelProto], None]) -> None:
    """Rewrites the file at `path` with `change` made to it."""
    proto = onnx.load(path)
    change(proto)
    path.write_bytes(proto.SerializeToString())


def set_weight(name: str, change: Callable[[np.ndarray], None]) -> Callable[[onnx.ModelProto], None]:
    def apply(proto: onnx.ModelProto) -> None:
        (tensor,) = (tensor for tensor in proto.graph.initializer if tensor.name == name)
        values = onnx.numpy_helper.to_array(tensor).copy()
        change(values)
        tensor.raw_data = values.tobytes()

    return apply


def flip_one(values: np.ndarray) -> None:
    place = np.abs(values).argmax()
    values.flat[place] = -values.flat[place]


def put_nan(values: np.ndarray) -> None:
    values.flat[0] = np.nan


def set_metadata(**changes) -> Callable[[onnx.ModelProto], None]:
    def apply(proto: onnx.ModelProto) -> None:
        onnx.helper.set_model_props(proto, replace(metadata("fp32"), **changes).to_props())

    return apply


def failures(verification: Verification) -> dict[str, str]:
    return {check.name: check.reason for check in verification.checks if not check.passed}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_right_file_passes(precision, tmp_path):
    path = written(tmp_path, precision)
    verification = verify_onnx(path, reference(precision), clips=INPUTS)
    assert verification.passed, "\n".join(verification.lines())
    verification.enforce()
    by_name = {(check.name, check.optimised): check for check in verification.checks}
    for name in ("random", "silence", "full scale", "clipped", "constant", "click", "clips"):
        for optimised in (False, True):
            assert by_name[name, optimised].tolerance == TOLERANCES[precision, optimised].on(name)
    assert by_name["random by the oracle scan", False].sqnr_db > 30
    assert by_name["weights", None].passed
    if precision != "int8":
        assert verification.max_abs_error < 1e-4
    assert (
        verification.lines()[0] == f"model-{precision}.onnx ({precision}): PASSED of 27 checks against the torch model"
    )


def test_open_batch_is_run_in_batches(tmp_path):
    verification = verify_onnx(written(tmp_path, "fp32", dynamic_batch=True), reference("fp32"))
    assert verification.passed, "\n".join(verification.lines())
    assert {"batch of 2", "batch of 3"} <= {check.name for check in verification.checks}


def test_verdict_is_json_and_names_no_folder(tmp_path):
    verification = verify_onnx(written(tmp_path, "int8"), reference("int8"))
    text = json.dumps(verification.to_dict(), allow_nan=False)
    assert json.loads(text)["passed"] is True
    assert str(tmp_path) not in text


def test_oracle_scan_is_put_away_again(tmp_path):
    verify_onnx(written(tmp_path, "fp32"), reference("fp32"))
    assert scan.selective_scan is selective_scan


@pytest.mark.parametrize(
    ("precision", "name"),
    [("fp32", "layers.0.mixer.in_proj.weight"), ("fp16", "layers.0.mixer.A_log"), ("int8", "patch_embed.proj.weight")],
)
def test_one_flipped_weight_fails(precision, name, tmp_path):
    path = written(tmp_path, precision)
    alter(path, set_weight(name, flip_one))
    verification = verify_onnx(path, reference(precision))
    assert f"{name}: 1 of " in failures(verification)["weights"]
    with pytest.raises(
        VerificationFailed, match=rf"model-{precision}\.onnx: is not what the torch model says"
    ) as raised:
        verification.enforce()
    assert raised.value.exit_code == 4


def test_one_flipped_weight_fails_by_values_alone(tmp_path):
    path = written(tmp_path, "fp32")
    (tmp_path / "golden.npz").write_bytes(golden_file(INPUTS, {"fp32": model("fp32")}))
    assert verify_onnx(path).passed
    alter(path, set_weight("layers.0.mixer.in_proj.weight", flip_one))
    verification = verify_onnx(path)
    assert set(failures(verification)) == {"golden"}
    assert "an error of" in failures(verification)["golden"]


def test_two_swapped_labels_fail(tmp_path):
    path = written(tmp_path, "fp32")
    alter(path, set_metadata(labels=(LABELS[1], LABELS[0], *LABELS[2:])))
    found = failures(verify_onnx(path, reference("fp32")))
    assert found == {
        "labels of the reference": "class 0 is 'bus', the reference says 'airport'; "
        "class 1 is 'airport', the reference says 'bus'"
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"f_min_hz": 50.0}, "f_min_hz is 50.0, the reference says 0.0"),
        ({"sample_rate_hz": 8001}, "sample_rate_hz is 8001, the reference says 8000"),
        ({"log_offset": 1e-6}, "log_offset is 1e-06, the reference says 1e-05"),
    ],
)
def test_changed_front_end_fails(change, message, tmp_path):
    path = written(tmp_path, "fp32")
    spec = SPEC.model_dump(mode="json")
    alter(path, set_metadata(input=spec | {"front_end": spec["front_end"] | change}))
    assert failures(verify_onnx(path, reference("fp32"))) == {"front-end of the reference": message}


def test_a_second_sample_rate_that_differs_fails(tmp_path):
    path = written(tmp_path, "fp32")
    alter(path, lambda proto: onnx.helper.set_model_props(proto, metadata("fp32").to_props() | {"sample_rate_hz": "1"}))
    assert failures(verify_onnx(path)) == {"metadata": "sample_rate_hz is 1, input.front_end says 8000"}


@pytest.mark.parametrize("with_reference", [True, False])
def test_nan_fails(with_reference, tmp_path):
    path = written(tmp_path, "fp32")
    alter(path, set_weight("head.bias", put_nan))
    found = failures(verify_onnx(path, reference("fp32") if with_reference else None))
    assert {"random", "silence", "full scale", "clipped", "constant", "click"} <= found.keys()
    assert "4 of 16 logits are NaN or infinite" in found["random"]


def test_renamed_output_fails_before_anything_is_run(tmp_path):
    path = written(tmp_path, "fp32")

    def rename(proto):
        proto.graph.node[-1].output[0] = proto.graph.output[0].name = "scores"

    alter(path, rename)
    verification = verify_onnx(path, reference("fp32"))
    assert failures(verification) == {"names": "outputs ['scores'], wanted ['logits']"}
    assert "random" not in {check.name for check in verification.checks}


def test_labels_that_do_not_fit_the_output_fail(tmp_path):
    path = written(tmp_path, "fp32")
    alter(path, set_metadata(labels=(*LABELS, "tram")))
    found = failures(verify_onnx(path))
    assert found == {"shapes": "logits is tensor(float) [1, 4], wanted float32 (batch, *[5])"}


def test_clips_of_another_shape_fail(tmp_path):
    found = failures(verify_onnx(written(tmp_path, "fp32"), clips=INPUTS[..., :9]))
    assert found == {"inputs": "clips: features of shape (3, 1, 32, 9), wanted (batch, *[1, 32, 17])"}


def test_model_of_another_width_fails(tmp_path):
    wider = CONFIG.model_copy(update={"blocks": uniform_blocks(1, 16, expand=3, d_state=4)})
    other = replace(reference("fp32"), model=liven(build_model(wider)))
    assert (
        "layers.0.mixer.A_log is float32 (32, 4), wanted float32 (48, 4)"
        in failures(verify_onnx(written(tmp_path, "fp32"), other))["weights"]
    )


def test_bundle_beside_the_file_is_compared(tmp_path):
    folder = tmp_path / "bundle"
    card = BundleCard(
        kind="onnx", stage="export", recipe="small", model=CONFIG, input=SPEC, labels=LABELS, precision="int8", seed=0,
        versions={}, created=now(),
    )  # fmt: skip
    models = {precision: model(precision) for precision in PRECISIONS}
    files = {f"model-{precision}.onnx": exported(precision) for precision in PRECISIONS}
    write_bundle(folder, card, files | {"golden.npz": golden_file(INPUTS, models)})
    for name in files:
        verification = verify_onnx(folder / name)
        assert verification.passed, "\n".join(verification.lines())
        assert verification.reference == "golden logits"
        assert not any("golden logits alone" in note for note in verification.warnings), "the card is there"
        assert {"bundle card", "labels of the bundle card", "golden"} <= {check.name for check in verification.checks}

    alter(folder / "model-fp32.onnx", set_metadata(labels=(*LABELS[:2], LABELS[3], LABELS[2])))
    found = failures(verify_onnx(folder / "model-fp32.onnx"))
    assert set(found) == {"bundle card", "labels of the bundle card"}
    assert "altered or cut short" in found["bundle card"]

    (folder / "bundle.json").write_text("{")
    assert failures(verify_onnx(folder / "model-int8.onnx")) == {
        "bundle card": "bundle.json beside the file cannot be read"
    }


def test_without_anything_to_compare_with_the_verdict_says_so(tmp_path):
    verification = verify_onnx(written(tmp_path, "fp16"))
    assert verification.passed
    assert verification.reference == "itself (neither a reference nor golden logits were there)"
    assert verification.lines()[0] == (
        "model-fp16.onnx (fp16): CONSISTENT in all 16 checks; nothing shows whether its model is right: "
        "give --reference BUNDLE"
    )
    assert (verification.to_dict()["verdict"], verification.to_dict()["passed"]) == ("consistent", True)
    verification.enforce()
    proved = verify_onnx(written(tmp_path, "fp16"), reference("fp16"))
    assert (proved.verdict, "PASSED of" in proved.lines()[0]) == ("passed", True)
    alter(tmp_path / "model-fp16.onnx", set_weight("head.bias", put_nan))
    failed = verify_onnx(tmp_path / "model-fp16.onnx")
    assert failed.to_dict()["verdict"] == "failed"
    assert " of 16 checks against itself" in failed.lines()[0]


@pytest.mark.parametrize("content", [b"", b"RIFF\x24\x00\x00\x00WAVEfmt ", b"import torch\n", b"\x00" * 64])
def test_what_is_not_onnx_is_refused(content, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=r"model\.onnx: not a whole ONNX file \(\d+ bytes\)"):
        verify_onnx(path)


def test_absent_file_is_named(tmp_path):
    with pytest.raises(ModelFileError, match=r"absent\.onnx: cannot be read: No such file"):
        verify_onnx(tmp_path / "absent.onnx")


@settings(max_examples=12, deadline=None)
@given(st.floats(0.0, 1.0, exclude_max=True))
def test_file_cut_anywhere_is_refused(tmp_path_factory, share):
    path = tmp_path_factory.mktemp("cut") / "model.onnx"
    whole = exported("int8")
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ModelFileError, match=r"model\.onnx: "):
        verify_onnx(path, reference("int8"))


def test_other_opset_is_refused(tmp_path):
    path = written(tmp_path, "fp32")

    def raise_opset(proto):
        for function in proto.functions:
            function.opset_import[0].version = 26
        proto.opset_import[0].version = 26

    alter(path, raise_opset)
    with pytest.raises(ModelFileError, match=r"IR 10 with opsets ai\.onnx 26.*wanted IR up to 10, ai\.onnx 20"):
        verify_onnx(path)


def test_file_of_another_tool_is_refused(tmp_path):
    path = written(tmp_path, "fp32")
    alter(path, lambda proto: proto.ClearField("metadata_props"))
    with pytest.raises(ModelFileError, match=r"metadata_props lack format.*not a file that aum-compress exported"):
        verify_onnx(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", None])
def test_golden_file_that_cannot_be_read_is_named(content, tmp_path):
    path = tmp_path / "golden.npz"
    path.write_bytes(golden_file(INPUTS, {"fp16": model("fp16")}) if content is None else content)
    with pytest.raises(ModelFileError, match=r"golden\.npz: no golden inputs and fp32 logits can be read"):
        read_golden(path, "fp32")


def test_golden_logits_are_the_torch_models(tmp_path):
    (tmp_path / "golden.npz").write_bytes(golden_file(INPUTS, {"fp32": model("fp32"), "int8": model("int8")}))
    inputs, logits = read_golden(tmp_path / "golden.npz", "int8")
    with torch.inference_mode():
        np.testing.assert_array_equal(logits, model("int8")(torch.from_numpy(INPUTS)).numpy())
    np.testing.assert_array_equal(inputs, INPUTS)


def test_stress_inputs_span_what_recordings_can_hold():
    inputs = stress_inputs(metadata("fp32"))
    assert all(features.shape[1:] == SPEC.feature_shape for features in inputs.values())
    floor = (np.log(SPEC.front_end.log_offset) - SPEC.mean) / SPEC.std
    np.testing.assert_allclose(inputs["silence"], floor, rtol=1e-5)
    assert inputs["full scale"].max() > floor + 4
    assert inputs["clipped"].max() > floor + 4
    lowest = inputs["constant"][0, 0, 0].mean()
    assert lowest > inputs["constant"][0, 0, 8:].max()  # all of an offset is at zero hertz
    loud_frames = (inputs["click"][0, 0] > floor + 1e-3).any(0)
    assert 1 <= loud_frames.sum() <= 3  # a click is in the windows that hold it, and in all their bins
    assert (inputs["click"][0, 0][:, loud_frames] > floor).all()
