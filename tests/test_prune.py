import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import aum_config, features, student_config, trained_like

from aum_compress.compress.prune import prune_d_inner
from aum_compress.errors import AumError
from aum_compress.models.config import BlockConfig, ConvStage, ConvStem, Mamba2BlockConfig


def squares(model):
    model(features(4)).square().sum().backward()


def masked(model, pruned):
    """The unpruned model with all that reads a removed channel set to zero."""
    for block, small in zip(model.layers, pruned.layers, strict=True):
        columns, wanted = block.mixer.out_proj.weight.detach(), small.mixer.out_proj.weight.detach()
        kept = [int((columns - wanted[:, [i]]).abs().sum(0).argmin()) for i in range(wanted.shape[1])]
        assert len(set(kept)) == len(kept)
        removed = [i for i in range(columns.shape[1]) if i not in kept]
        with torch.no_grad():
            block.mixer.out_proj.weight[:, removed] = 0
            for suffix in block.mixer.config.projections:
                getattr(block.mixer, f"x_proj{suffix}").weight[:, removed] = 0
    return model


@settings(max_examples=12, deadline=None)
@given(
    block_type=st.sampled_from(["none", "v1", "v2"]),
    widths=st.tuples(st.sampled_from([16, 24, 32]), st.sampled_from([16, 24, 40])),
    ratio=st.sampled_from([0.3, 0.5]),
    importance=st.sampled_from(["taylor", "magnitude"]),
    seed=st.integers(0, 3),
)
def test_pruned_model_equals_masked_model(block_type, widths, ratio, importance, seed):
    config = student_config(block_type=block_type, widths=widths)
    pruned, result = prune_d_inner(
        trained_like(config, seed), ratio, importance=importance, round_to=4, backward=squares
    )
    assert sum(result.d_inner_after) < sum(result.d_inner_before) == sum(widths)
    assert all(width % 4 == 0 for width in result.d_inner_after)
    assert tuple(block.d_inner for block in pruned.config.blocks) == result.d_inner_after
    model = masked(trained_like(config, seed), pruned)
    torch.testing.assert_close(pruned(features()), model(features()), rtol=1e-5, atol=1e-5)


def test_aum_with_class_token_and_positions_is_pruned():
    pruned, result = prune_d_inner(trained_like(aum_config()), 0.5, round_to=4, backward=squares)
    assert sum(result.d_inner_after) <= 0.6 * sum(result.d_inner_before)
    torch.testing.assert_close(pruned(features()), masked(trained_like(aum_config()), pruned)(features()))


def test_width_of_the_residual_stream_and_stem_stay():
    before = trained_like(student_config())
    shapes = {n: t.shape for n, t in before.state_dict().items() if "mixer" not in n}
    pruned, _ = prune_d_inner(before, 0.5, round_to=4, backward=squares)
    assert {n: t.shape for n, t in pruned.state_dict().items() if "mixer" not in n} == shapes


def test_taylor_keeps_the_channels_that_matter():
    model = trained_like(student_config(widths=(16, 16)))
    with torch.no_grad():  # channels 0 and 3 of block 0 are all that reaches the output
        keep = torch.zeros(16, dtype=torch.bool)
        keep[[0, 3, 5, 7]] = True
        model.layers[0].mixer.out_proj.weight[:, ~keep] *= 1e-3
    wanted = model.layers[0].mixer.out_proj.weight.detach()[:, keep].clone()
    pruned, _ = prune_d_inner(model, 0.5, round_to=4, backward=squares, max_block_ratio=0.75)
    left = pruned.layers[0].mixer.out_proj.weight.detach()
    for column in wanted.T:
        assert (left - column[:, None]).abs().sum(0).min() < 1e-6


def test_forward_is_restored_and_no_state_leaks_between_runs():
    first, _ = prune_d_inner(trained_like(student_config()), 0.4, round_to=4, backward=squares)
    second, _ = prune_d_inner(trained_like(student_config()), 0.4, round_to=4, backward=squares)
    assert all("forward" not in vars(block.mixer) for block in first.layers)
    torch.testing.assert_close(first(features()), second(features()))


def test_a_step_that_removes_nothing_is_an_error():
    with pytest.raises(AumError, match=r"ratio 0.01 removed nothing from d_inner \[24, 32\] in multiples of 8"):
        prune_d_inner(trained_like(student_config()), 0.01, round_to=8, backward=squares)


def cells(*blocks):
    stem = ConvStem(stages=(ConvStage(channels=8, stride_mels=4, stride_frames=2, expansion=0),), token="cell")
    return student_config().model_copy(update={"stem": stem, "blocks": blocks})


def test_blocks_along_time_and_mel_are_pruned_alike():
    blocks = (BlockConfig(d_inner=24, d_state=4, dt_rank=2, along=along) for along in ("time", "mel"))
    config = cells(*blocks)
    pruned, result = prune_d_inner(trained_like(config), 0.5, round_to=4, backward=squares)
    assert sum(result.d_inner_after) <= 0.6 * sum(result.d_inner_before)
    assert [block.along for block in pruned.config.blocks] == ["time", "mel"]
    torch.testing.assert_close(
        pruned(features()), masked(trained_like(config), pruned)(features()), atol=1e-5, rtol=1e-5
    )


def test_other_mixers_are_refused_by_name():
    config = cells(BlockConfig(d_inner=24, d_state=4, dt_rank=2), Mamba2BlockConfig(d_inner=32, d_state=4))
    with pytest.raises(AumError, match="works on mamba blocks, and the model has mamba2"):
        prune_d_inner(trained_like(config), 0.5, backward=squares)
