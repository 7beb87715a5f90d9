"""onnxruntime's own format: the same answers, the same metadata, and the operators that a reduced build needs."""

import numpy as np
import onnx
import pytest
from exported import LABELS, metadata, written, written_waveform

from aum_compress.errors import ModelFileError, VerificationFailed
from aum_compress.export import ort_format
from aum_compress.export.model_card import model_card, operators
from aum_compress.export.ort_format import operator_names, required_operators, write_ort
from aum_compress.export.runtime import Classifier


@pytest.mark.parametrize("write", [written, written_waveform])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_runtime_reads_either_format(write, precision, tmp_path):
    source = write(tmp_path, precision)
    target = source.with_suffix(".ort")
    write_ort(source, target)
    plain, ort = Classifier(source), Classifier(target)
    assert ort.metadata == plain.metadata
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 6000).astype(np.float32)
    found, wanted = (model.classify_samples(samples, 8000).probabilities for model in (ort, plain))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert not list(tmp_path.glob("tmp*")), "nothing is left of the writing"


def test_weights_of_4_bits_are_refused_with_the_reason(tmp_path):
    source = written(tmp_path, "int4")
    with pytest.raises(ModelFileError, match=r"weight has 4 bits a weight, which onnxruntime cannot read back"):
        write_ort(source, source.with_suffix(".ort"))
    assert not source.with_suffix(".ort").exists()


def test_operators_of_a_student_are_few(tmp_path):
    files = [written(tmp_path, "int8"), written_waveform(tmp_path, "int8")]
    for path in files:
        write_ort(path, path.with_suffix(".ort"))
    config = required_operators([path.with_suffix(".ort") for path in files])
    assert config.startswith("# operators of model-int8-waveform.ort, model-int8.ort\n")
    assert str(tmp_path) not in config
    names = operator_names(config)
    assert {"Conv", "MatMul", "Log", "com.microsoft.QLinearConv"} <= set(names)
    assert len(names) <= 36
    assert operator_names("# a\nai.onnx;13;Exp,Log\ncom.microsoft;1;FusedConv\n") == [
        *("Exp", "Log", "com.microsoft.FusedConv")
    ]


def test_what_cannot_be_written_is_named(tmp_path, monkeypatch):
    source = written(tmp_path, "fp32")
    with pytest.raises(ModelFileError, match=r"absent\.onnx: cannot be read"):
        write_ort(tmp_path / "absent.onnx", tmp_path / "absent.ort")
    with pytest.raises(ModelFileError, match=r"model\.ort: cannot be written: there is no folder"):
        write_ort(source, tmp_path / "none" / "model.ort")
    with pytest.raises(ModelFileError, match=r"no \.ort files"):
        required_operators([])
    true = ort_format.run_session
    runs = iter((0.0, 0.5))
    monkeypatch.setattr(ort_format, "run_session", lambda session, x: true(session, x) + next(runs))
    with pytest.raises(VerificationFailed, match="in ORT format it computes something else"):
        write_ort(source, tmp_path / "model.ort")
    assert not (tmp_path / "model.ort").exists()


def test_card_tells_people_what_the_files_say(tmp_path):
    files = [written(tmp_path, "int8"), written_waveform(tmp_path, "int8", input_rate_hz=48_000)]
    card = model_card(files, {"model-int8.onnx": 61.25})
    assert card.startswith("# small\n\nTells 4 classes of sound apart in clips of 0.5 s:\nairport, bus, metro, park.\n")
    assert "| `model-int8.onnx` | features |" in card
    assert "| 61.2 |" in card
    assert "`waveform` (1, 24000) float32: mono samples at 48,000 Hz" in card
    assert "`features` (1, 1, 32, 17) float32" in card
    assert "IR 10, opset 20" in card
    assert str(tmp_path) not in card
    inside = operators(onnx.load(files[1]))
    assert {"Scan", "Cos", "Sin", "QuantizeLinear"} <= set(inside)
    assert not {"SelectiveScan", "LogMel", "Int8Conv"} & set(inside)
    assert f"- `model-int8-waveform.onnx`: {', '.join(inside)}" in card
    assert metadata("int8").labels == LABELS
