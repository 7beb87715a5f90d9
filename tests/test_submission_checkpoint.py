"""The checkpoint of an inference package of DCASE 2025 Task 1, and the four functions that read it."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchinfo
from audio_trees import noise
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from aum_compress.audio.config import InputSpec
from aum_compress.bundle import read_bundle
from aum_compress.device_names import GENERAL
from aum_compress.errors import DataError, ModelFileError
from aum_compress.export.runtime import Classifier
from aum_compress.submission.checkpoint import checkpoint_bytes, part_of
from aum_compress.submission.inference import get_model_for_device, load_inputs, load_model, predict

pytestmark = pytest.mark.usefixtures("cache_of_finished")


@pytest.fixture
def checkpoint(runs, tmp_path) -> Path:
    bundle = read_bundle(runs / "06-quantize")
    path = tmp_path / "model.safetensors"
    path.write_bytes(checkpoint_bytes({GENERAL: part_of(bundle)}, bundle.card.labels, bundle.card.input))
    return path


def test_unknown_devices_get_the_general_model(checkpoint):
    model = load_model(checkpoint)
    for device in ("a", "s10", "unknown", "", "general"):
        assert get_model_for_device(model, device) is model.model.models[0]


def test_inputs_are_of_one_length_and_their_order_is_kept(checkpoint, tmp_path):
    model = load_model(checkpoint)
    for name, seconds, rate in (("short", 0.03, 8000), ("long", 0.7, 48_000), ("right", 0.1, 44_100)):
        soundfile.write(tmp_path / f"{name}.wav", noise(len(name), seconds, rate), rate)
    files = [str(tmp_path / f"{name}.wav") for name in ("short", "long", "right", "short")]
    inputs = load_inputs(files, ["a"] * 4, model)
    assert {tuple(one.shape) for one in inputs} == {(1, *model.spec.feature_shape)}
    torch.testing.assert_close(inputs[0], inputs[3])
    assert not torch.equal(inputs[0], inputs[1])
    logits, classes = predict(files, ["a", "b", "c", "d"], model, use_cuda=False, batch_size=3)
    torch.testing.assert_close(logits[0], logits[3])
    assert {tuple(one.shape) for one in logits} == {(len(classes),)}
    for call in (load_inputs, predict):
        with pytest.raises(DataError, match="wanted a device for each file"):
            call(files, ["a"], model)
    with pytest.raises(DataError, match=r"none\.wav: an audio file was wanted"):
        predict([str(tmp_path / "none.wav")], ["a"], model)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_checkpoint_is_refused_in_words(data, runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("damaged") / "model.safetensors"
    bundle = read_bundle(runs / "06-quantize")
    content = bytearray(checkpoint_bytes({GENERAL: part_of(bundle)}, bundle.card.labels, bundle.card.input))
    header = 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        load_model(path)  # a label may have been changed
    except ModelFileError as error:
        found = str(error)
    else:
        found = str(path)
    assert str(path) in found, "no other error, and the file is named"


def test_a_checkpoint_of_something_else_is_refused(checkpoint, tmp_path):
    save_file({"0/x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for path in (tmp_path / "other.safetensors", tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(ModelFileError, match="not a whole checkpoint of a submission"):
            load_model(path)
    tensors = load_file(checkpoint)
    (name,) = [key for key in tensors if key.endswith("head.weight")]
    about = {"aum_compress": _header(checkpoint)}
    save_file({key: t for key, t in tensors.items() if key != name}, tmp_path / "less.safetensors", about)
    with pytest.raises(ModelFileError, match=r"tensors do not fit the general model: head\.weight: absent"):
        load_model(tmp_path / "less.safetensors")


def _header(path: Path) -> str:
    with path.open("rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]["aum_compress"]


def test_on_real_clips_it_answers_as_onnxruntime_does(real_audio, runs, exports, checkpoint):
    """The student that was packed, and the int8 file that ships, on real recordings of a street car's length."""
    wavs = sorted((real_audio / "clips").glob("*.wav")) + sorted((real_audio / "esc10").rglob("*.ogg"))[:20]
    model, classifier = load_model(checkpoint), Classifier(exports / "model-int8.onnx")
    logits, classes = predict([str(wav) for wav in wavs], ["a"] * len(wavs), model, use_cuda=False)
    inputs = load_inputs([str(wav) for wav in wavs], ["a"] * len(wavs), model)
    found, wanted = torch.stack(logits).numpy(), classifier.logits(torch.cat(inputs).numpy())
    first = np.stack([classifier.classify_file(wav).log_probabilities[0] for wav in wavs])
    assert tuple(classes) == classifier.labels
    largest = np.abs(wanted).max()
    assert np.abs(found - wanted).max() <= 0.25 * largest, "int8 kernels may round otherwise, as verification allows"
    shares = found - np.log(np.exp(found).sum(1, keepdims=True))
    assert np.abs(shares - first).max() <= 0.5 * largest
    fp32 = Classifier(exports / "model-fp32.onnx")
    bundle = read_bundle(runs / "05-prune")
    path = checkpoint.with_name("float.safetensors")
    path.write_bytes(checkpoint_bytes({GENERAL: part_of(bundle)}, bundle.card.labels, bundle.card.input))
    again = torch.stack(predict([str(wav) for wav in wavs], ["a"] * len(wavs), load_model(path), False)[0]).numpy()
    np.testing.assert_allclose(again, fp32.logits(torch.cat(inputs).numpy()), atol=0.01)
    assert isinstance(model.spec, InputSpec)
    assert torchinfo.__version__ == "1.8.0", "the version whose counts are reported"
