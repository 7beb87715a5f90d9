"""The runtime hears what training heard, without torch; windows and votes as documented."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile
import torch
from exported import LABELS, SPEC, metadata, model, written
from hypothesis import given, settings
from hypothesis import strategies as st

import aum_compress
from aum_compress.audio.frontend import LogMel
from aum_compress.audio.reading import read_audio
from aum_compress.errors import DataError, ModelFileError
from aum_compress.export.runtime import Classifier, open_session, window_starts

RATE_HZ = 44_100


def noise(seconds: float, channels: int = 1, rate_hz: int = RATE_HZ) -> np.ndarray:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (round(seconds * rate_hz), channels)).astype(np.float32)
    return samples * np.linspace(0.01, 1, len(samples), dtype=np.float32)[:, None]  # so that windows differ


@pytest.fixture
def classifier(tmp_path) -> Classifier:
    return Classifier(written(tmp_path, "fp32"), intra_op_num_threads=1)


def test_window_probabilities_are_those_of_torch(classifier, tmp_path):
    path = tmp_path / "stereo.wav"
    soundfile.write(path, noise(1.25, channels=2), RATE_HZ, subtype="PCM_24")
    prediction = classifier.classify_file(path)
    assert prediction.starts_seconds == (0.0, 0.5, 0.75)
    clips = [read_audio(path, 8000, start_seconds=start, duration_seconds=0.5) for start in prediction.starts_seconds]
    with torch.inference_mode():
        features = (LogMel(SPEC.front_end)(torch.from_numpy(np.stack(clips))) - SPEC.mean) / SPEC.std
        expected = model("fp32")(features).softmax(1).numpy()
    np.testing.assert_allclose(prediction.probabilities, expected, atol=1e-4)
    assert np.ptp(expected, axis=0).max() > 0.01  # the windows do differ


def test_vote_is_the_renormalised_geometric_mean(classifier):
    prediction = classifier.classify_samples(noise(1.5)[:, 0], RATE_HZ)
    assert prediction.probabilities.shape == (3, len(LABELS))
    product = prediction.probabilities.astype(np.float64).prod(0) ** (1 / 3)
    np.testing.assert_allclose(prediction.vote, product / product.sum(), rtol=1e-4)
    assert prediction.label == LABELS[product.argmax()]


def test_samples_in_memory_give_what_the_file_gives(classifier, tmp_path):
    samples = noise(1.0, channels=2, rate_hz=8000)
    soundfile.write(tmp_path / "a.wav", samples, 8000, subtype="FLOAT")
    found = classifier.classify_samples(samples, 8000)
    np.testing.assert_allclose(found.vote, classifier.classify_file(tmp_path / "a.wav").vote, rtol=1e-4)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
@pytest.mark.parametrize("rate_hz", [8000, 16_000, 44_100, 48_000])
def test_rate_and_width_of_the_file_do_not_matter(subtype, rate_hz, classifier, tmp_path):
    """A tone below every Nyquist frequency, at -40 dBFS."""
    tone = 0.01 * np.sin(2 * np.pi * 700 * np.arange(rate_hz) / rate_hz)
    soundfile.write(tmp_path / "tone.wav", tone, rate_hz, subtype=subtype)
    direct = classifier.classify_samples(0.01 * np.sin(2 * np.pi * 700 * np.arange(8000) / 8000), 8000)
    np.testing.assert_allclose(classifier.classify_file(tmp_path / "tone.wav").vote, direct.vote, atol=0.05)


def test_short_recording_is_padded_with_silence(classifier):
    short = noise(0.2, rate_hz=8000)[:, 0]
    padded = np.concatenate([short, np.zeros(4000 - len(short), dtype=np.float32)])
    found = classifier.classify_samples(short, 8000)
    assert found.starts_seconds == (0.0,)
    np.testing.assert_array_equal(found.vote, classifier.classify_samples(padded, 8000).vote)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.01, 100.0), st.sampled_from([0.1, 0.5, 1.0, 10.0]))
def test_windows_cover_the_recording(seconds, window):
    starts = window_starts(seconds, window)
    assert starts == sorted(starts)
    assert starts[0] == 0.0
    assert len(starts) == 1 or starts[-1] + window <= seconds + 1e-4 * window
    assert seconds - (starts[-1] + window) < 0.1 * window + 1e-9  # less than a tenth of a window is left out
    assert all(second - first <= window + 1e-9 for first, second in pairwise(starts))


@pytest.mark.parametrize("seconds", [0.1, 0.3, 0.7, 2.3])
def test_whole_windows_are_counted_in_spite_of_rounding(seconds):
    assert len(window_starts(seconds * 10, seconds)) == 10


def test_runs_where_torch_cannot_be_imported(tmp_path):
    path = written(tmp_path, "int8")
    soundfile.write(tmp_path / "a.wav", noise(1.0, channels=2), RATE_HZ, subtype="PCM_24")
    script = (
        "import sys\n"
        "for name in ('torch', 'torchaudio', 'lightning', 'pydantic', 'onnx'): sys.modules[name] = None\n"
        "from aum_compress.export.runtime import Classifier\n"
        "prediction = Classifier(sys.argv[1], intra_op_num_threads=1).classify_file(sys.argv[2])\n"
        "print(len(prediction.starts_seconds), prediction.label, *prediction.vote)\n"
    )
    root = Path(aum_compress.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), str(tmp_path / "a.wav")], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    n_windows, label, *vote = done.stdout.split()
    expected = Classifier(path).classify_file(tmp_path / "a.wav")
    assert (int(n_windows), label) == (2, expected.label)
    np.testing.assert_allclose([float(p) for p in vote], expected.vote, rtol=1e-5)


def test_open_batch_axis_changes_nothing(classifier, tmp_path):
    features = np.random.default_rng(1).standard_normal((3, 1, 32, 17), dtype=np.float32)
    together = Classifier(written(tmp_path, "fp32", dynamic_batch=True)).logits(features)
    np.testing.assert_allclose(classifier.logits(features), together, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_small_files_say_nearly_what_the_large_one_says(precision, classifier, tmp_path):
    expected = classifier.classify_samples(noise(1.5), RATE_HZ)
    found = Classifier(written(tmp_path, precision)).classify_samples(noise(1.5), RATE_HZ)
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=0.2)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros(8000, dtype=np.int16), r"type int16: wanted float .*divide 16-bit integers by 32768"),
        (np.zeros((2, 2, 8)), r"samples of shape \(2, 2, 8\)"),
        (np.zeros((2, 0)), r"samples of shape \(2, 0\)"),
        (
            np.zeros((2, 48_000)),
            r"\(2, 48000\): 48,000 channels of 2 samples; wanted the order \(S,channels\).*samples\.T",
        ),
        (np.zeros((2, 50)), r"\(2, 50\): 50 channels of 2 samples; wanted the order \(S,channels\)"),
        (np.zeros((100, 65)), "65 channels of 100 samples; .*at most 64 channels"),
        (np.zeros((0, 2)), "no samples: wanted"),
        (np.zeros(0), "no samples: wanted at least one"),
        (np.array([0.0, np.nan, np.inf]), "2 of 3 samples are NaN or infinite"),
    ],
)
def test_samples_that_are_none_are_refused(samples, message, classifier):
    with pytest.raises(DataError, match=message):
        classifier.classify_samples(samples, 8000)


def test_file_that_is_no_audio_is_named(classifier, tmp_path):
    (tmp_path / "notes.wav").write_text("not audio")
    with pytest.raises(DataError, match=r"notes\.wav: cannot be read as audio"):
        classifier.classify_file(tmp_path / "notes.wav")


def test_model_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(ModelFileError, match=r"absent\.onnx: an ONNX file was wanted, there is no such file"):
        Classifier(tmp_path / "absent.onnx")
    with pytest.raises(ModelFileError, match="it is a folder"):
        Classifier(tmp_path)
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(ModelFileError, match=r"bad\.onnx: onnxruntime .* cannot load it \(11 bytes\)"):
        open_session(tmp_path / "bad.onnx")


@pytest.mark.parametrize("text", [b"features", b"logits", b"labels", b"n_fft"])
def test_a_text_that_is_none_is_refused(text, tmp_path):
    """Found by fuzzing: onnxruntime's names and metadata are bytes until someone asks for them."""
    path = written(tmp_path, "fp32")
    path.write_bytes(path.read_bytes().replace(text, b"\xb3\xff" + text[2:]))
    with pytest.raises(ModelFileError, match="cannot load it .*'utf-8' codec can't decode"):
        Classifier(path)


def test_a_graph_that_stops_on_its_way_is_named(tmp_path):
    """Found by fuzzing: shapes that do not fit are not all noticed when the file is opened."""
    path = written(tmp_path, "fp32")
    proto = onnx.load(path)
    groups = [attribute for node in proto.graph.node for attribute in node.attribute if attribute.name == "group"]
    groups[0].i = 1
    onnx.save(proto, path)
    with pytest.raises(ModelFileError, match=r"model-fp32\.onnx: onnxruntime .* cannot run it: .* Input channels"):
        Classifier(path).logits(np.zeros((1, 1, 32, 17), dtype=np.float32))


def test_metadata_that_contradicts_the_graph_is_refused(tmp_path):
    path = written(tmp_path, "fp32")
    proto = onnx.load(path)
    onnx.helper.set_model_props(proto, metadata("fp32", labels=LABELS[:3]).to_props())
    onnx.save(proto, path)
    with pytest.raises(ModelFileError, match=r"do not fit its metadata.*\(1, 32, 17\) and 3 labels"):
        Classifier(path)


def test_real_recordings(classifier, real_audio):
    files = sorted((real_audio / "tut2018-10").glob("*.wav"))[:2] + sorted((real_audio / "clips").glob("*.wav"))
    assert len(files) == 4
    for path in files:
        info = soundfile.info(path)
        prediction = classifier.classify_file(path)
        assert len(prediction.starts_seconds) == round(info.duration / 0.5)
        assert prediction.vote.sum() == pytest.approx(1, rel=1e-4)
