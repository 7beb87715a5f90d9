"""Positions: learned ones at other lengths, rotary ones against complex numbers, both in what is exported."""

import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny import N_FRAMES, N_MELS, SPEC, aum_config, features, student_config, trained_like

from aum_compress.errors import AumError
from aum_compress.export.metadata import OnnxMetadata
from aum_compress.export.onnx_writer import export_onnx
from aum_compress.models.config import AudioMambaConfig, BlockConfig
from aum_compress.models.factory import build_model
from aum_compress.models.positions import resample_positions, rotate, rotation

GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 9))


def changed(config: AudioMambaConfig, **changes) -> AudioMambaConfig:
    return AudioMambaConfig.model_validate(dict(config) | changes)


def turned(tokens, grid, trained=None, *, class_token=False):
    turns = rotation(grid, trained or grid, tokens.shape[2], class_token=class_token, device=tokens.device)
    return rotate(tokens, turns)


@settings(max_examples=20, deadline=None)
@given(old=GRIDS, new=GRIDS, prefix=st.integers(0, 1))
def test_resampling_keeps_the_class_row_and_what_does_not_vary(old, new, prefix):
    rows = torch.arange(old[0], dtype=torch.float32)[:, None].expand(old).flatten()
    positions = torch.cat([torch.full((prefix,), 77.0), rows])[None, :, None].repeat(1, 1, 2)
    found = resample_positions(positions, old, (old[0], new[1]), prefix)  # longer or shorter in time alone
    assert (found[:, :prefix] == 77).all()
    wanted = torch.arange(old[0], dtype=torch.float32)[:, None].expand(old[0], new[1]).flatten()
    torch.testing.assert_close(found[0, prefix:, 1], wanted)
    found = resample_positions(torch.ones_like(positions), old, new, prefix)
    torch.testing.assert_close(found, torch.ones(1, prefix + new[0] * new[1], 2))


def test_resampling_is_bilinear_and_antialiased():
    ramp = torch.arange(4.0).view(1, 4, 1)
    found = resample_positions(ramp, (1, 4), (1, 8), 0).flatten()
    torch.testing.assert_close(found, torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]))
    spike = torch.tensor([0.0, 0, 4, 0, 0, 0, 0, 0]).view(1, 8, 1)  # without antialiasing some would see nothing of it
    found = resample_positions(spike, (1, 8), (1, 2), 0).flatten()
    torch.testing.assert_close(found, torch.tensor([4 * 0.875 / 3.5, 4 * 0.125 / 3.5]))


@pytest.mark.parametrize("frames", [11, N_FRAMES, 40])
@pytest.mark.parametrize("config", [aum_config(), student_config(), changed(student_config(), position="absolute")])
def test_another_length_is_as_a_model_of_that_length_with_resampled_positions(config, frames):
    model = trained_like(config)
    other = changed(config, n_frames=frames)
    state = model.state_dict()
    if config.position == "absolute":
        prefix = int(config.pool == "class_token")
        rows = resample_positions(state["pos_embed.pos_embed"], config.token_grid, other.token_grid, prefix)
        state["pos_embed.pos_embed"] = rows
    wanted = build_model(other).eval()
    wanted.load_state_dict(state)
    x = torch.randn(2, 1, N_MELS, frames)
    torch.testing.assert_close(model(x), wanted(x))


def test_patches_take_another_number_of_mel_bins_too():
    assert trained_like(aum_config())(torch.randn(2, 1, 2 * N_MELS, N_FRAMES)).isfinite().all()


@pytest.mark.parametrize(
    ("config", "mels", "frames"), [(aum_config(), N_MELS, 7), (student_config(), 2 * N_MELS, N_FRAMES)]
)
def test_features_that_cannot_be_read_are_named(config, mels, frames):
    message = rf"features of {mels} mel bins x {frames} frames: a model for {N_MELS} x {N_FRAMES} cannot read them"
    with pytest.raises(AumError, match=message):
        build_model(config)(torch.randn(1, 1, mels, frames))


@settings(max_examples=20, deadline=None)
@given(grid=GRIDS, quarter=st.integers(1, 4), seed=st.integers(0, 9))
def test_rotary_positions_are_products_of_complex_numbers(grid, quarter, seed):
    rows, columns = grid
    tokens = torch.randn(2, rows * columns, 4 * quarter, generator=torch.Generator().manual_seed(seed))
    frequencies = 10_000.0 ** -(torch.arange(quarter) / quarter)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = torch.cat([row.reshape(-1, 1) * frequencies, column.reshape(-1, 1) * frequencies], dim=1)
    pairs = torch.view_as_complex(tokens.unflatten(2, (-1, 2)))
    wanted = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(2)
    torch.testing.assert_close(turned(tokens, grid), wanted, rtol=1e-5, atol=1e-5)


def test_rotary_products_depend_on_distance_alone():
    found, against = (turned(torch.randn(8).expand(1, 30, 8), (5, 6))[0].view(5, 6, 8) for _ in range(2))
    torch.testing.assert_close(
        (found[0, 1] * against[2, 4]).sum(), (found[2, 2] * against[4, 5]).sum(), rtol=1e-4, atol=1e-5
    )


def test_class_token_is_not_turned_and_patches_around_it_are_where_they_were():
    patches, class_token = torch.randn(1, 6, 8), torch.randn(1, 1, 8)
    tokens = torch.cat([patches[:, :3], class_token, patches[:, 3:]], dim=1)
    found = turned(tokens, (2, 3), class_token=True)
    assert torch.equal(found[:, 3], tokens[:, 3])
    torch.testing.assert_close(torch.cat([found[:, :3], found[:, 4:]], dim=1), turned(patches, (2, 3)))


def test_a_longer_grid_is_laid_over_the_trained_positions():
    tokens = torch.randn(1, 12, 8)
    half_steps = turned(tokens, (1, 12), (1, 6))
    torch.testing.assert_close(half_steps[:, ::2], turned(tokens[:, ::2], (1, 6)))


@pytest.mark.parametrize("config", [aum_config(), student_config(), student_config(token="cell")])
def test_rotary_positions_turn_what_each_block_adds_as_in_aum(config):
    model = trained_like(changed(config, position="rope"))
    assert not [name for name in model.state_dict() if "rope" in name or "pos" in name]
    class_token = config.pool == "class_token"
    hidden, residual = model.embed(features()), None
    for block in model.layers:  # AuM keeps the residual stream and what was added last apart
        hidden = turned(hidden, model.config.token_grid, class_token=class_token)
        residual = hidden if residual is None else residual + hidden
        hidden = block.mixer(block.norm(residual))
    tokens = model.norm_f(residual + hidden)
    pooled = tokens[:, (tokens.shape[1] - 1) // 2] if class_token else tokens.mean(1)
    torch.testing.assert_close(model(features()), model.head(pooled))
    assert not torch.allclose(model(features()), trained_like(changed(config, position="none"))(features()))


def test_rotary_positions_take_any_length():
    for config in (aum_config(), student_config()):
        model = trained_like(changed(config, position="rope"))
        for frames in (9, 40, 123):
            assert model(torch.randn(1, 1, N_MELS, frames)).isfinite().all()


def test_rotary_positions_need_whole_pairs():
    with pytest.raises(ValidationError, match="d_model 18 must be a multiple of 4"):
        changed(student_config(), d_model=18, position="rope")


def test_what_is_exported_computes_the_same(tmp_path):
    blocks = (BlockConfig(d_inner=24, d_state=4, dt_rank=2, block_type="v1"),) * 2
    model = trained_like(changed(aum_config(), blocks=blocks, position="rope", head="mlp"))
    path = tmp_path / "model.onnx"
    export_onnx(model, path, OnnxMetadata(labels=("a", "b", "c"), input=SPEC.model_dump(), precision="fp32"))
    x = features(1)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"features": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-4, atol=1e-5)
