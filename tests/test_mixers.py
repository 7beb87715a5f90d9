"""Mamba-2 in matmul form against its definition; blocks along time and mel; the gated convolution; their exports."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from aum_compress.audio.config import InputSpec, LogMelConfig
from aum_compress.errors import AumError
from aum_compress.export.metadata import OnnxMetadata
from aum_compress.export.onnx_writer import export_onnx
from aum_compress.models.blocks import ResidualBlock
from aum_compress.models.config import (
    AudioMambaConfig,
    BlockConfig,
    ConvBlockConfig,
    ConvStage,
    ConvStem,
    Mamba2BlockConfig,
)
from aum_compress.models.factory import build_model, fold_batch_norm
from aum_compress.models.ssd import ssd, ssd_oracle

SPEC = InputSpec(
    front_end=LogMelConfig(sample_rate_hz=8000, n_fft=512, window_samples=512, hop_samples=500, n_mels=32),
    clip_seconds=1.0,
)
STEM = ConvStem(
    stages=(ConvStage(channels=8, stride_mels=4, stride_frames=2, expansion=0), ConvStage(channels=12)), token="cell"
)
ROWS, COLUMNS = 4, 9
BLOCKS = {
    "mamba along time": BlockConfig(d_inner=16, d_state=4, dt_rank=2, along="time"),
    "mamba both ways with shared weights along mel": BlockConfig(
        d_inner=16, d_state=4, dt_rank=2, block_type="v1", along="mel"
    ),
    "mamba2 along mel": Mamba2BlockConfig(d_inner=32, d_state=4, along="mel"),
    "mamba2 one way": Mamba2BlockConfig(d_inner=32, d_state=4, two_way=False),
    "conv along time": ConvBlockConfig(d_inner=8, d_conv=9, along="time"),
}


def config_of(*blocks, **changes) -> AudioMambaConfig:
    values = {"n_mels": 32, "n_frames": 17, "n_classes": 4, "d_model": 12, "stem": STEM, "position": "factorised"}
    return AudioMambaConfig(blocks=blocks, **values | changes)


def ssd_inputs(seed: int, batch: int, length: int, heads: int, head_dim: int, d_state: int, steps: float):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, dt = normal(batch, length, heads, head_dim), normal(batch, length, heads).exp() * steps
    A = -normal(heads).exp()
    return x, dt, A, normal(batch, length, d_state), normal(batch, length, d_state), normal(heads)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 3),
    length=st.integers(1, 12),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 4),
    d_state=st.integers(1, 5),
    steps=st.sampled_from([1e-3, 0.3, 30.0]),
    two_way=st.booleans(),
)
def test_the_matmul_form_is_the_recurrence_in_value_and_gradient(
    seed, batch, length, heads, head_dim, d_state, steps, two_way
):
    inputs = [t.requires_grad_() for t in ssd_inputs(seed, batch, length, heads, head_dim, d_state, steps)]
    found, wanted = ssd(*inputs, two_way), ssd_oracle(*inputs, two_way)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    weights = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), inputs), torch.autograd.grad((wanted * weights).sum(), inputs)
    ):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


def test_long_steps_do_not_overflow():
    # exp(-s_j) alone would be exp(8000)
    inputs = [t.float() for t in ssd_inputs(0, 1, 40, 2, 3, 4, 200.0)]
    assert torch.isfinite(ssd(*inputs, True)).all()


def test_one_way_never_looks_ahead():
    x, *others = ssd_inputs(1, 1, 8, 2, 3, 4, 0.3)
    changed = x.clone()
    changed[:, 5] += 1
    before, after = ssd(x, *others, False), ssd(changed, *others, False)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any()


def test_the_operator_and_the_training_path_compute_the_same():
    inputs = ssd_inputs(2, 2, 6, 2, 3, 4, 0.3)
    with torch.no_grad():
        node = ssd(*inputs, True)
    torch.testing.assert_close(node, ssd(*inputs, True))
    torch.library.opcheck(torch.ops.aum_compress.ssd.default, (*(t.float() for t in inputs), True))


@pytest.mark.parametrize("along", ["time", "mel"])
def test_a_block_along_one_axis_keeps_rows_or_columns_apart(along):
    torch.manual_seed(0)
    block = ResidualBlock(12, BlockConfig(d_inner=16, d_state=4, dt_rank=2, along=along), COLUMNS).eval()
    tokens = torch.randn(2, ROWS * COLUMNS, 12)
    changed = tokens.clone().unflatten(1, (ROWS, COLUMNS))
    changed[:, 1, 3] += 1
    with torch.no_grad():
        moved = (block(tokens, (ROWS, COLUMNS)) != block(changed.flatten(1, 2), (ROWS, COLUMNS))).any(2)
    moved = moved.unflatten(1, (ROWS, COLUMNS))
    same = moved[:, 1] if along == "time" else moved[:, :, 3]
    assert same.all()
    assert moved.sum() == same.sum()


def test_along_mel_is_along_time_of_the_transposed_grid():
    torch.manual_seed(0)
    values = {"d_inner": 16, "d_state": 4, "dt_rank": 2}
    by_mel, by_time = (
        ResidualBlock(12, BlockConfig(along=along, **values), COLUMNS).eval() for along in ("mel", "time")
    )
    by_time.load_state_dict(by_mel.state_dict())
    tokens = torch.randn(2, ROWS, COLUMNS, 12)
    with torch.no_grad():
        one = by_mel(tokens.flatten(1, 2), (ROWS, COLUMNS)).unflatten(1, (ROWS, COLUMNS))
        other = by_time(tokens.transpose(1, 2).flatten(1, 2), (COLUMNS, ROWS)).unflatten(1, (COLUMNS, ROWS))
    torch.testing.assert_close(one, other.transpose(1, 2))


@pytest.mark.parametrize("dynamic_batch", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_exported_file_computes_the_same(name, dynamic_batch, tmp_path):
    torch.manual_seed(0)
    model = fold_batch_norm(build_model(config_of(BLOCKS[name]))).eval()
    path = tmp_path / "model.onnx"
    metadata = OnnxMetadata(labels=("a", "b", "c", "d"), input=SPEC.model_dump(), precision="fp32")
    export_onnx(model, path, metadata, dynamic_batch=dynamic_batch)
    features = torch.randn(3 if dynamic_batch else 1, 1, 32, 17)
    found = ort.InferenceSession(path).run(None, {"features": features.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(found, model(features).numpy(), atol=1e-6)


@pytest.mark.parametrize("name", BLOCKS)
def test_other_clip_lengths_are_read(name):
    model = build_model(config_of(BLOCKS[name])).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 1, 32, 33)).shape == (2, 4)


def test_configurations_without_a_mixer_are_mamba():
    config = config_of(BLOCKS["mamba along time"])
    record = config.model_dump()
    del record["blocks"][0]["mixer"]
    assert AudioMambaConfig.model_validate(record) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mixer": "attention"}, "wanted mixer: mamba, mamba2 or conv"),
        ({"mixer": "mamba2", "d_inner": 20, "d_state": 4}, "multiple of head_dim"),
        ({"mixer": "conv", "d_inner": 8, "d_state": 4, "d_conv": 3}, "d_state"),
    ],
)
def test_blocks_that_make_no_sense_are_refused(change, words):
    record = config_of(BLOCKS["conv along time"]).model_dump() | {"blocks": [change]}
    with pytest.raises(ValidationError, match=words):
        AudioMambaConfig.model_validate(record)


@pytest.mark.parametrize("change", [{"position": "none"}, {"position": "factorised"}])
def test_a_class_token_stands_in_no_row(change):
    block = BLOCKS["mamba along time"] if change["position"] == "none" else BLOCKS["mamba2 one way"]
    with pytest.raises(ValidationError, match="class token"):
        config_of(block, pool="class_token", **change)


def test_mel_bins_may_change_where_tokens_are_cells_but_not_frames():
    frames = ConvStem(stages=STEM.stages, token="frame")
    model = build_model(config_of(BLOCKS["mamba2 one way"], stem=frames)).eval()
    with pytest.raises(AumError, match="mel bins"):
        model(torch.randn(1, 1, 64, 17))
