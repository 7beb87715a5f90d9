"""Kaldi's filterbank as AuM reads it: against torchaudio, against its twin, and along the whole road."""

import json

import numpy as np
import onnx
import pytest
import torch
from audio_trees import SECONDS, write_tau_tree
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from tiny_recipe import TRAIN, command, recipe

from aum_compress.audio.config import FrontEnd, InputSpec, KaldiConfig, LogMelConfig
from aum_compress.audio.front_ends import count_frames, features, frame_macs
from aum_compress.audio.frontend import KaldiFbank, front_end_module
from aum_compress.audio.kaldi import kaldi_filterbank, symmetric_hann
from aum_compress.audio.reading import read_audio
from aum_compress.audio.torchaudio_compat import kaldi as torchaudio_kaldi
from aum_compress.bundle import read_bundle
from aum_compress.data.cache import cache_clips, feature_statistics
from aum_compress.data.clips import Clip
from aum_compress.errors import DataError, ModelFileError, RecipeError
from aum_compress.export.metadata import OnnxMetadata
from aum_compress.export.verify_structure import check_identity
from aum_compress.pipeline import run

AUM = KaldiConfig()
SMALL = KaldiConfig(
    sample_rate_hz=8000, window_samples=201, hop_samples=90, n_mels=20, f_min_hz=50.0, f_max_hz=3500.0, pre_emphasis=0.9
)
both = pytest.mark.parametrize("config", [AUM, SMALL], ids=["aum", "small"])


def noise(config: KaldiConfig, seconds: float = 1.0, level: float = 0.1, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(3, config.clip_samples(seconds), generator=generator) * level + offset


def as_aum_calls_it(config: KaldiConfig, waveforms: torch.Tensor) -> torch.Tensor:
    """The lines of AuM's loader: the mean taken away, then torchaudio's fbank."""
    images = []
    for waveform in waveforms:
        image = torchaudio_kaldi.fbank(
            (waveform - waveform.mean())[None],
            htk_compat=True,
            sample_frequency=config.sample_rate_hz,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=config.n_mels,
            dither=0.0,
            frame_length=1000 * config.window_samples / config.sample_rate_hz,
            frame_shift=1000 * config.hop_samples / config.sample_rate_hz,
            low_freq=config.f_min_hz,
            high_freq=config.f_max_hz or 0.0,
            preemphasis_coefficient=config.pre_emphasis,
        )
        images.append(image.T)
    return torch.stack(images)[:, None]


@both
@pytest.mark.parametrize(("level", "offset"), [(0.3, 0.0), (0.003, 0.05)])
def test_module_and_twin_equal_torchaudio(config, level, offset):
    waveforms = noise(config, level=level, offset=offset)
    wanted = as_aum_calls_it(config, waveforms)
    got = front_end_module(config)(waveforms)
    assert got.shape == (3, 1, config.n_mels, config.n_frames(1.0))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    twin = features(waveforms.numpy(), config.model_dump())
    assert twin.dtype == np.float32
    np.testing.assert_allclose(twin, wanted[:, 0].numpy(), atol=1e-4, rtol=1e-4)


def test_equals_torchaudio_on_real_recordings(real_audio):
    files = sorted((real_audio / "clips").glob("*.wav"))
    assert files
    for path in files:
        samples = read_audio(path, AUM.sample_rate_hz)
        wanted = as_aum_calls_it(AUM, torch.from_numpy(samples)[None])
        for got in (KaldiFbank(AUM)(torch.from_numpy(samples)[None])[0, 0], features(samples, AUM.model_dump())):
            away = np.abs(np.asarray(got) - wanted[0, 0].numpy())
            # single cells far below others of their frame are float32 rounding noise
            assert away.max() < 5e-3
            assert np.quantile(away, 0.99) < 1e-4


@pytest.mark.parametrize(
    ("n_mels", "n_fft", "rate", "low", "high"),
    [(128, 512, 16_000, 20.0, None), (64, 1024, 32_000, 50.0, 14_000.0), (40, 512, 8000, 0.0, None)],
)
def test_filterbank_is_torchaudios(n_mels, n_fft, rate, low, high):
    wanted, _ = torchaudio_kaldi.get_mel_banks(n_mels, n_fft, float(rate), low, high or 0.0, 100.0, -500.0, 1.0)
    got = kaldi_filterbank(n_fft, n_mels, rate, low, high)
    assert got.shape == (n_fft // 2 + 1, n_mels)
    assert not got[-1].any()
    np.testing.assert_allclose(got[:-1], wanted.T.numpy(), atol=3e-5)


def test_cached_tables_cannot_be_written_to():
    for table in (kaldi_filterbank(512, 40, 16_000, 20.0, None), symmetric_hann(400)):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 1.0


def test_silence_is_the_floor():
    image = features(np.zeros(16_000, np.float32), AUM.model_dump())
    assert image.shape == (128, 98)
    np.testing.assert_allclose(image, np.log(np.finfo(np.float32).eps), rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(
    window=st.integers(2, 300),
    hop=st.integers(1, 200),
    n_samples=st.integers(300, 1200),
    fixed=st.none() | st.integers(1, 40),
)
def test_frames_number_as_the_config_says(window, hop, n_samples, fixed):
    config = KaldiConfig(sample_rate_hz=8000, window_samples=window, hop_samples=hop, n_mels=4, fixed_frames=fixed)
    waveforms = torch.randn(2, n_samples, generator=torch.Generator().manual_seed(0))
    module, twin = KaldiFbank(config)(waveforms), features(waveforms.numpy(), config.model_dump())
    assert twin.shape == (2, 4, config.n_frames(n_samples / 8000))
    assert twin.shape[-1] == count_frames(n_samples, config.model_dump())
    np.testing.assert_allclose(module[:, 0].numpy(), twin, atol=1e-4, rtol=1e-4)


def test_clips_are_padded_with_zeros_and_cut_as_in_aum():
    waveforms = noise(AUM)
    whole = KaldiFbank(AUM)(waveforms)
    longer = KaldiFbank(AUM.model_copy(update={"fixed_frames": 120}))(waveforms)
    torch.testing.assert_close(longer[..., :98], whole, rtol=0, atol=0)
    assert not longer[..., 98:].any()
    shorter = features(waveforms.numpy(), AUM.model_dump() | {"fixed_frames": 50})
    np.testing.assert_array_equal(shorter, features(waveforms.numpy(), AUM.model_dump())[..., :50])


def test_autocast_changes_nothing():
    front_end = KaldiFbank(SMALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = front_end(noise(SMALL))
    torch.testing.assert_close(under_autocast, front_end(noise(SMALL)), rtol=0, atol=0)
    assert front_end.state_dict() == {}


def test_short_clip_is_refused():
    for transform in (KaldiFbank(AUM), lambda clip: features(clip.numpy(), AUM.model_dump())):
        with pytest.raises(DataError, match="clip of 399 samples is too short for frames of 400"):
            transform(torch.zeros(1, 399))


def test_a_record_without_kind_is_a_log_mel():
    spec = InputSpec.model_validate({"front_end": {"n_mels": 64, "sample_rate_hz": 16_000}, "clip_seconds": 1.0})
    assert spec.front_end == LogMelConfig(n_mels=64, sample_rate_hz=16_000)
    old = spec.model_dump(mode="json")
    del old["front_end"]["kind"]
    assert InputSpec.model_validate_json(json.dumps(old)) == spec
    metadata = OnnxMetadata(labels=("bus", "tram"), input=old, precision="fp32")
    assert metadata.front_end == spec.front_end.model_dump()
    assert metadata.feature_shape == spec.feature_shape
    assert all(check.passed for check in check_identity(metadata, ("bus", "tram"), spec, "the card"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "mfcc"}, "wanted kind: log_mel or kaldi"),
        ({"kind": ["kaldi"]}, "wanted kind: log_mel or kaldi"),
        ({"n_fft": 512}, "n_fft"),
        ({"window_samples": 1}, "window_samples"),
        ({"f_max_hz": 9000.0}, "f_min_hz 20.0 and f_max_hz 9000.0 must satisfy"),
    ],
)
def test_wrong_records_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(FrontEnd).validate_python({"kind": "kaldi"} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "mfcc"}, "input.front_end.kind: found 'mfcc', wanted log_mel or kaldi"),
        ({"log_offset": 1e-5}, "input.front_end.log_offset: unknown"),
        ({"fixed_frames": 0}, "input.front_end.fixed_frames: found 0, wanted a number above zero"),
        ({"pre_emphasis": None}, "input.front_end.pre_emphasis: found None"),
    ],
)
def test_wrong_metadata_is_refused(changes, message):
    spec = InputSpec(front_end=SMALL, clip_seconds=1.0).model_dump(mode="json")
    spec["front_end"] |= changes
    with pytest.raises(ModelFileError, match=message):
        OnnxMetadata(labels=("bus", "tram"), input=spec, precision="fp32")


def test_recipes_name_the_place_of_a_wrong_key(tmp_path):
    with pytest.raises(RecipeError, match=r"features\.hop_sample: unknown key; did you mean hop_samples\?"):
        recipe(tmp_path, features={"kind": "kaldi", "hop_sample": 160})
    with pytest.raises(RecipeError, match=r"features\.window_samples: 1601, but a clip has 1600 samples"):
        recipe(tmp_path, features={"kind": "kaldi", "window_samples": 1601})
    with pytest.raises(RecipeError, match="features: wanted kind: log_mel or kaldi"):
        recipe(tmp_path, features={"kind": "kaldy"})


def test_macs_of_one_frame():
    record = AUM.model_dump()
    weights = int((kaldi_filterbank(512, 128, 16_000, 20.0, None) != 0).sum())
    assert frame_macs(record) == 2 * 400 + 512 * 9 + 2 * 257 + weights


FEATURES = {"kind": "kaldi", "n_mels": 16, "hop_samples": 80, "fixed_frames": 24}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tau_tree(tmp_path_factory.mktemp("kaldi") / "tree")


def test_normalisation_is_by_two_deviations(tree, tmp_path):
    config = KaldiConfig.model_validate(FEATURES)
    paths = sorted((tree / "audio").glob("*.wav"))[:8]
    clips = [Clip(f"audio/{path.name}", path, "bus", "a", "lisbon-1000") for path in paths]
    cached = cache_clips(clips, config, SECONDS, cache_dir=tmp_path)
    values = cached[:]
    assert values.shape == (8, 16, 24)
    mean, std = feature_statistics(cached)
    assert (mean, std) == pytest.approx((values.mean(), 2 * values.std()), rel=1e-5)


def test_the_whole_road(tree, tmp_path, monkeypatch):
    """Cache, training, export, verification and prediction."""
    monkeypatch.setenv("AUM_CACHE", str(tmp_path / "cache"))
    student = {"d_model": 8, "depth": 1, "d_inner": 16, "d_state": 4, "train": TRAIN}
    stem = {"kind": "conv", "stages": [{"channels": 8, "expansion": 0, "stride_frames": 2}]}
    sections = {
        "features": FEATURES,
        "student": student | {"stem": stem},
        "export": {"precisions": ["fp32"]},
        **dict.fromkeys(("reference", "teacher", "distill", "prune", "quantize")),
    }
    outcome = run(recipe(tree, **sections), tmp_path / "out")
    exported = tmp_path / "out" / "exports" / "tiny"
    assert outcome.report["verification"]["model-fp32.onnx"]["passed"]
    card = read_bundle(exported).card
    assert card.input.front_end == KaldiConfig.model_validate(FEATURES)
    assert card.input.feature_shape == (1, 16, 24)
    stored = {entry.key: entry.value for entry in onnx.load(exported / "model-fp32.onnx").metadata_props}
    assert OnnxMetadata.from_props(stored, "model-fp32.onnx").front_end["kind"] == "kaldi"
    wav = min((tree / "audio").glob("*.wav"))
    answer = command("predict", exported / "model-fp32.onnx", wav, "--json")
    assert answer.exit_code == 0, answer.output
