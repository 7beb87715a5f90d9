"""Published checkpoints: state dicts generated in the published naming, loaded, converted, refused."""

import argparse

import pytest
import torch
import torch.nn.functional as F
from audio_trees import write_tau_tree
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_recipe import raw_recipe

from aum_compress.errors import ModelFileError
from aum_compress.models.checkpoints import load_published, read_published, resize_kernel, state_for
from aum_compress.models.config import AudioMambaConfig, PatchStem, uniform_blocks
from aum_compress.models.factory import build_model
from aum_compress.pipeline import run
from aum_compress.recipe import validate_recipe

M, D, N, R, DEPTH = 16, 32, 16, 1, 2


def config(block_type="v2", *, n_mels=128, n_frames=64, n_classes=5, patch=(16, 16), **changes) -> AudioMambaConfig:
    """What a published model of these sizes is under our names."""
    stem = PatchStem(patch_mels=patch[0], patch_frames=patch[1], stride_mels=patch[0], stride_frames=patch[1])
    values = {
        "n_mels": n_mels,
        "n_frames": n_frames,
        "n_classes": n_classes,
        "d_model": M,
        "blocks": uniform_blocks(DEPTH, M, block_type=block_type),
        "stem": stem,
        "pool": "class_token",
        "position": "absolute",
    }
    return AudioMambaConfig(**values | changes)


def aum(block_type="v2", *, tokens=32, n_classes=5, channels=1) -> dict[str, torch.Tensor]:
    """A state dict as AuM writes it, from the table of its keys, not from our model."""
    shapes = {"cls_token": (1, 1, M), "pos_embed.pos_embed": (1, 1 + tokens, M), "norm_f.weight": (M,)}
    shapes |= {"patch_embed.proj.weight": (M, channels, 16, 16), "patch_embed.proj.bias": (M,)}
    shapes |= {"head.weight": (n_classes, M), "head.bias": (n_classes,)}
    direction = {
        "conv1d{}.weight": (D, 1, 4),
        "conv1d{}.bias": (D,),
        "x_proj{}.weight": (R + 2 * N, D),
        "dt_proj{}.weight": (D, R),
        "dt_proj{}.bias": (D,),
        "A{}_log": (D, N),
        "D{}": (D,),
    }
    mixer = {"in_proj.weight": (2 * D, M), "out_proj.weight": (M, D)}
    mixer |= {name.format(""): shape for name, shape in direction.items()}
    if block_type == "v1":
        mixer["A_b_log"] = (D, N)
    elif block_type == "v2":
        mixer |= {name.format("_b"): shape for name, shape in direction.items()}
    for number in range(DEPTH):
        shapes[f"layers.{number}.norm.weight"] = (M,)
        shapes |= {f"layers.{number}.mixer.{name}": shape for name, shape in mixer.items()}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def vim(**changes) -> dict[str, torch.Tensor]:
    """The same as Vim writes it for ImageNet: 14 x 14 patches of three channels, the class row in the middle."""
    state = aum(**{"tokens": 196, "n_classes": 1000, "channels": 3} | changes)
    state["pos_embed"] = state.pop("pos_embed.pos_embed")
    return state


def saved(folder, content):
    path = folder / "checkpoint.pth"
    torch.save(content, path)
    return path


@pytest.mark.parametrize("block_type", ["none", "v1", "v2"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_aum_is_loaded_tensor_for_tensor_and_its_blocks_told_apart(tmp_path, block_type, prefix):
    state = aum(block_type)
    path = saved(tmp_path, {prefix + name: tensor for name, tensor in state.items()})
    assert read_published(path).block_type == block_type
    model = build_model(config(block_type))
    assert load_published(model, path) == []
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("changes", [{"n_classes": 10}, {"head": "mlp"}])
def test_head_of_other_classes_or_kind_is_left_fresh_and_that_is_said(tmp_path, changes):
    path = saved(tmp_path, aum())
    model = build_model(config(**changes))
    before = {name: tensor.clone() for name, tensor in model.head.state_dict().items()}
    (note,) = load_published(model, path)
    assert note.startswith("head: left fresh")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.head.state_dict().items())
    torch.testing.assert_close(model.norm_f.weight.detach(), aum()["norm_f.weight"])


def test_a_checkpoint_without_head_is_a_backbone(tmp_path):
    path = saved(tmp_path, {name: t for name, t in aum().items() if not name.startswith("head")})
    assert len(load_published(build_model(config()), path)) == 1


@pytest.mark.parametrize(("n_mels", "n_frames", "grid"), [(128, 160, (8, 10)), (128, 40, (8, 2)), (256, 65, (16, 4))])
def test_aum_positions_of_another_length_are_resampled(tmp_path, n_mels, n_frames, grid):
    state = aum(tokens=32)  # 8 rows of 128 mel bins, 4 columns
    rows = torch.arange(8.0)[:, None].expand(8, 4).reshape(1, 32, 1).expand(1, 32, M)
    state["pos_embed.pos_embed"] = torch.cat([torch.full((1, 1, M), 50.0), rows], dim=1)
    model = build_model(config(n_mels=n_mels, n_frames=n_frames))
    notes = load_published(model, saved(tmp_path, state))
    assert notes == [f"pos_embed.pos_embed: 8 x 4 resampled to {grid[0]} x {grid[1]}"]
    found = model.pos_embed.pos_embed.detach()
    assert (found[:, 0] == 50).all()
    by_row = found[0, 1:, 0].view(grid)
    torch.testing.assert_close(by_row, by_row[:, :1].expand(grid))  # rows stay rows: time did not run into frequency
    assert (by_row[1:, 0] > by_row[:-1, 0]).all()


def test_overlapping_patches_keep_their_grid(tmp_path):
    stem = PatchStem(stride_mels=8, stride_frames=8)
    wanted = config(stem=stem, n_frames=40)
    state = aum(tokens=15 * 4)
    model = build_model(wanted)
    assert load_published(model, saved(tmp_path, state)) == []
    assert torch.equal(model.pos_embed.pos_embed.detach(), state["pos_embed.pos_embed"])


@pytest.mark.parametrize("prefix", ["", "module."])
def test_vim_is_converted(tmp_path, prefix):
    state = vim()
    middle = 98
    state["pos_embed"][:] = 1
    state["pos_embed"][:, middle] = 9
    content = {"model": {prefix + n: t for n, t in state.items()}, "args": argparse.Namespace(lr=1e-3), "epoch": 3}
    model = build_model(config(n_classes=1000, patch=(8, 32)))
    notes = load_published(model, saved(tmp_path, content))
    assert [note.partition(":")[0] for note in notes] == [
        *("patch_embed.proj.weight", "patch_embed.proj.weight", "pos_embed.pos_embed", "head")
    ]
    found = model.pos_embed.pos_embed.detach()
    assert found.shape == (1, 1 + 16 * 2, M)
    assert (found[:, 0] == 9).all()
    torch.testing.assert_close(found[:, 1:], torch.ones(1, 32, M))
    grey = state["patch_embed.proj.weight"].mean(1, keepdim=True)
    torch.testing.assert_close(model.patch_embed.proj.weight.detach(), resize_kernel(grey, (8, 32)))
    assert not torch.equal(model.head.weight.detach(), state["head.weight"])  # its classes are other things


@settings(max_examples=15, deadline=None)
@given(
    old=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    more=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    seed=st.integers(0, 9),
)
def test_resized_kernel_gives_for_resized_patches_what_the_kernel_gave(old, more, seed):
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(3, 1, *old, generator=generator, dtype=torch.float64)
    patch = torch.randn(2, 1, *old, generator=generator, dtype=torch.float64)
    new = (old[0] + more[0], old[1] + more[1])
    larger = F.interpolate(patch, size=new, mode="bilinear")
    found = F.conv2d(larger, resize_kernel(kernel, new)).flatten()
    torch.testing.assert_close(found, F.conv2d(patch, kernel).flatten())


def test_rotary_tables_of_a_checkpoint_are_ours_to_compute(tmp_path):
    state = aum() | {"rope.freqs_cos": torch.ones(32, M), "rope.freqs_sin": torch.zeros(32, M)}
    del state["pos_embed.pos_embed"]
    path = saved(tmp_path, state)
    assert load_published(build_model(config(position="rope")), path) == []
    with pytest.raises(ModelFileError, match=r"rope.freqs_cos: unexpected"):
        load_published(build_model(config(position="none")), path)


def refused(path, wanted=None) -> str:
    model = build_model(wanted or config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelFileError) as caught:
        load_published(model, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


def test_missing_unexpected_and_misshapen_tensors_are_all_named(tmp_path):
    state = aum()
    del state["layers.1.norm.weight"]
    state["layers.0.mixer.D_c"] = torch.ones(2)
    state["norm_f.weight"] = torch.ones(M + 1)
    message = refused(saved(tmp_path, state))
    assert "layers.1.norm.weight: missing" in message
    assert "layers.0.mixer.D_c: unexpected" in message
    assert "norm_f.weight: shape (17,), wanted (16,)" in message
    assert "2 blocks of type v2, d_model 16, d_inner 32, a class token, learned positions" in message


def test_other_blocks_and_pools_than_the_checkpoint_has_are_named(tmp_path):
    path = saved(tmp_path, aum("v1"))
    message = refused(path, config("v2"))
    assert "layers.0.mixer.conv1d_b.weight: missing" in message
    assert "2 blocks of type v1" in message
    assert "cls_token: unexpected" in refused(path, config("v1", pool="mean", position="none"))


def test_positions_without_a_grid_are_refused(tmp_path):
    assert "33 rows beside the class token's cannot be laid out as rows of 128 mel bins" in refused(
        saved(tmp_path, aum(tokens=33))
    )
    state = {"model": vim(tokens=210)}
    assert "210 rows beside the class token's cannot be laid out as a square" in refused(saved(tmp_path, state))


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "absent.pth"
    assert "cannot be read: No such file" in refused(path)
    assert "cannot be read: Is a directory" in refused(tmp_path)
    whole = saved(tmp_path, aum()).read_bytes()
    path = tmp_path / "broken.pth"
    for content in (b"", b"not a checkpoint\n", whole[: len(whole) // 2], whole[:-200], b"\x80\x02K\x01."):
        path.write_bytes(content)
        assert "checkpoint" in refused(path)
    for content in (
        [1, 2],
        {"weight": torch.ones(2)},
        {"model": 3},
        aum() | {"patch_embed.proj.weight": torch.ones(2)},
    ):
        assert "no checkpoint of Audio Mamba or Vision Mamba" in refused(saved(tmp_path, content))


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    message = refused(saved(tmp_path, aum() | {"trap": Trap()}))
    assert "not a whole checkpoint of tensors" in message
    assert not (tmp_path / "sprung").exists()


def test_a_recipe_starts_its_teacher_from_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("AUM_CACHE", str(tmp_path / "cache"))
    state = aum("v1", n_classes=527)
    path = saved(tmp_path, state)
    later = ("reference", "student", "distill", "prune", "quantize", "budget", "export", "verify")
    tree = write_tau_tree(tmp_path / "tree")
    raw = raw_recipe(tree, **dict.fromkeys(later))
    raw["teacher"] |= {"depth": DEPTH, "checkpoint": str(path)}
    trained = validate_recipe(raw, "test")
    bundle = run(trained, tmp_path / "out").bundles["teacher"]
    assert {block.block_type for block in bundle.card.model.blocks} == {"v1"}
    named, *notes = bundle.card.notes["checkpoint"]
    assert named == str(path)
    assert [note.partition(":")[0] for note in notes] == ["patch_embed.proj.weight", "pos_embed.pos_embed", "head"]
    moved = bundle.tensors()["layers.1.norm.weight"] - state["layers.1.norm.weight"]
    assert moved.abs().max() < 0.1  # one epoch away from where it started

    created = bundle.card.created
    assert run(trained, tmp_path / "out").bundles["teacher"].card.created == created
    hashes = {bundle.card.inputs_sha256}
    saved(tmp_path, aum("none"))  # another file under the same name
    hashes.add(run(trained, tmp_path / "out").bundles["teacher"].card.inputs_sha256)
    assert len(hashes) == 2

    raw["teacher"]["block_type"] = "v2"
    with pytest.raises(ModelFileError, match="2 blocks of type none"):
        run(validate_recipe(raw, "test"), tmp_path / "out")
    path.unlink()
    with pytest.raises(ModelFileError, match="cannot be read"):
        run(trained, tmp_path / "out")


def test_half_precision_is_widened(tmp_path):
    path = saved(tmp_path, {name: tensor.half() for name, tensor in aum().items()})
    state, _ = state_for(read_published(path), config())
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert build_model(config()).load_state_dict(state)
