"""A stream hears, chunk by chunk, what a file of the same sound gives; and `predict` hears standard input."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from exported import LABELS, written, written_waveform
from hypothesis import given, settings
from hypothesis import strategies as st
from test_architecture import WITHOUT_TORCH
from tiny_recipe import command

import aum_compress
from aum_compress.errors import DataError
from aum_compress.export.runtime import Classifier
from aum_compress.export.stream import Stream

RATE_HZ = 44_100


def sound(seconds: float, rate_hz: int = RATE_HZ, channels: int = 1) -> np.ndarray:
    """(S,channels) whose windows differ."""
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (round(seconds * rate_hz), channels))
    return (samples * np.linspace(0.01, 1, len(samples))[:, None]).astype(np.float32)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Classifier:
    return Classifier(written(tmp_path_factory.mktemp("stream"), "fp32"), intra_op_num_threads=1)


@pytest.fixture(scope="module")
def with_front_end(tmp_path_factory) -> Classifier:
    path = written_waveform(tmp_path_factory.mktemp("stream"), "fp32", input_rate_hz=44_100)
    return Classifier(path, intra_op_num_threads=1)


def heard_in_chunks(classifier, samples, rate_hz, sizes, hop=None):
    stream, found, place = Stream(classifier, rate_hz, hop_seconds=hop), [], 0
    for size in sizes:
        found += stream.feed(samples[place : place + size])
        place += size
    found += stream.feed(samples[place:])
    assert stream.seconds == pytest.approx(len(samples) / rate_hz)
    return found + stream.finish()


@pytest.mark.parametrize("hop", [None, 0.25, 0.7])
@pytest.mark.parametrize("which", ["classifier", "with_front_end"])
def test_equal_to_the_windows_of_a_file(which, hop, request, tmp_path):
    model, samples = request.getfixturevalue(which), sound(1.83, channels=2)
    soundfile.write(tmp_path / "a.wav", samples, RATE_HZ, subtype="FLOAT")
    wanted = model.classify_file(tmp_path / "a.wav", hop_seconds=hop)
    found = heard_in_chunks(model, samples, RATE_HZ, [1000] * 60, hop)
    assert [p.starts_seconds[0] for p in found] == pytest.approx(wanted.starts_seconds, abs=1e-4)
    assert len(found) == {None: 4, 0.25: 7, 0.7: 3}[hop]
    np.testing.assert_allclose(np.concatenate([p.probabilities for p in found]), wanted.probabilities, atol=1e-4)
    assert np.ptp(wanted.probabilities, axis=0).max() > 0.01


@settings(max_examples=25, deadline=None)
@given(
    seconds=st.floats(0.02, 2.0),
    sizes=st.lists(st.integers(0, 9000), max_size=12),
    hop=st.sampled_from([None, 0.1, 0.35, 0.9]),
)
def test_chunks_of_any_size_give_the_same(classifier, seconds, sizes, hop):
    samples = sound(seconds, 8000)[:, 0]
    whole = heard_in_chunks(classifier, samples, 8000, [], hop)
    found = heard_in_chunks(classifier, samples, 8000, sizes, hop)
    assert [p.starts_seconds for p in found] == [p.starts_seconds for p in whole]
    assert len(found) >= 1
    for one, other in zip(found, whole, strict=True):
        np.testing.assert_array_equal(one.probabilities, other.probabilities)


def test_little_is_kept_however_long_it_goes_on(classifier):
    stream = Stream(classifier, 8000, hop_seconds=0.9)
    for _ in range(40):
        stream.feed(np.zeros(800, dtype=np.float32))
        assert len(stream._held) <= 4000 + 7200 + 800
    assert stream.seconds == 4.0


def test_short_stream_is_padded_and_an_empty_one_says_nothing(classifier):
    samples = sound(0.2, 8000)[:, 0]
    stream = Stream(classifier, 8000)
    assert stream.feed(samples) == []
    (found,) = stream.finish()
    np.testing.assert_allclose(found.vote, classifier.classify_samples(samples, 8000).vote, atol=1e-6)
    assert Stream(classifier, 8000).finish() == []


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (np.zeros(10, dtype=np.int16), "type int16: wanted float .*divide 16-bit integers by 32768"),
        (np.zeros((2, 2, 2)), r"samples of shape \(2, 2, 2\)"),
        (np.zeros((2, 480)), r"480 channels of 2 samples; wanted the order \(S,channels\)"),
        (np.array([0.0, np.nan]), "1 of 2 samples are NaN or infinite"),
    ],
)
def test_wrong_chunks_are_refused_and_forgotten(chunk, message, classifier):
    stream = Stream(classifier, 8000)
    stream.feed(np.zeros(100, dtype=np.float32))
    with pytest.raises(DataError, match=message):
        stream.feed(chunk)
    assert stream.seconds == 100 / 8000


def test_a_chunk_may_have_fewer_samples_than_channels(classifier):
    stream = Stream(classifier, 8000)
    assert stream.feed(np.zeros((1, 2))) == stream.feed(np.zeros((0, 2))) == []
    assert stream.seconds == 1 / 8000


def test_wrong_rates_and_hops_are_refused(classifier):
    for rate in (0, -8000, 8000.5, True):
        with pytest.raises(DataError, match=r"a sample rate of .* Hz: wanted a whole number above zero"):
            Stream(classifier, rate)
    for hop in (0, -1, float("inf"), float("nan")):
        with pytest.raises(DataError, match=r"a hop of .* s between windows: wanted a number of seconds above zero"):
            Stream(classifier, 8000, hop_seconds=hop)
    stream = Stream(classifier, 8000)
    stream.finish()
    with pytest.raises(DataError, match="the stream is finished"):
        stream.feed(np.zeros(1))


# --- predict


def pcm(samples: np.ndarray) -> bytes:
    return np.round(samples * 32767).astype("<i2").tobytes()


def test_predict_hears_standard_input_without_torch(tmp_path):
    """What `arecord -f S16_LE -c 2 -r 44100 -t raw | aum-compress predict` does, in a process that has no torch."""
    model, samples = written_waveform(tmp_path, "int8"), sound(1.3, channels=2)
    root = str(Path(aum_compress.__file__).parent.parent)
    words = ["predict", model, "-", "--rate", RATE_HZ, "--channels", 2, "--hop", 0.25, "--json"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *map(str, words)],
        input=pcm(samples) + b"\x00",  # a byte that is no whole sample
        capture_output=True,
        cwd=root,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    found = [json.loads(line) for line in done.stdout.decode().splitlines()]
    soundfile.write(tmp_path / "a.wav", np.round(samples * 32767) / 32768, RATE_HZ, subtype="PCM_16")
    wanted = Classifier(model).classify_file(tmp_path / "a.wav", hop_seconds=0.25).to_dict()["windows"]
    assert [w["start_seconds"] for w in found] == pytest.approx([w["start_seconds"] for w in wanted], abs=1e-4)
    for one, other in zip(found, wanted, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-3)


def test_predict_with_a_hop(tmp_path):
    model = written(tmp_path, "fp32")
    soundfile.write(tmp_path / "a.wav", sound(1.0), RATE_HZ)
    result = command("predict", model, tmp_path / "a.wav", "--hop", 0.25)
    assert result.exit_code == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()[1:]] == ["0.00", "0.25", "0.50", "vote"]
    assert any(label in result.stdout for label in LABELS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-"], "does not say its rate: predict MODEL - --rate 48000"),
        (["-", "a.wav", "--rate", "8000"], "standard input is heard alone"),
        (["a.wav", "--rate", "8000"], "--rate and --channels: are of standard input"),
        (["a.wav", "--channels", "2"], "--rate and --channels: are of standard input"),
        (["-", "--rate", "8000"], "no samples came from standard input"),
        (["-", "--rate", "8000", "--hop", "0"], "a hop of 0.0 s between windows"),
    ],
)
def test_predict_says_what_it_cannot_hear(words, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    result = command("predict", written(tmp_path, "fp32"), *words)
    assert result.exit_code == 2
    assert message in result.stderr
