"""Sizes that pruning plans, by configuration alone: to a budget, within floors, and what they cost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prune import COSTING, KINDS, mixed, space
from tiny import student_config

from aum_compress.budget.records import Limits
from aum_compress.compress.prune_dimensions import resized
from aum_compress.compress.prune_plan import (
    Cost,
    Costing,
    fewest_blocks,
    least_config,
    require_reachable,
    step_target,
    target_limits,
)
from aum_compress.compress.prune_sizes import expected_losses, plan_sizes
from aum_compress.errors import AumError, BudgetExceeded
from aum_compress.models.config import Mamba2BlockConfig
from aum_compress.recipe_schema import QuantizeSection


def test_what_costs_the_least_loss_goes_first():
    config = student_config()
    rooms = space(config, [kind for kind in KINDS if kind != "blocks"])
    losses = {place: np.full(own[0], 1.0) for place, own in rooms.sizes.items()}
    losses["layers.1.d_inner"] = np.full(32, 1e-6)
    now = COSTING(config)
    sizes = plan_sizes(config, rooms, losses, COSTING, Cost(now.param_bytes - 600, now.macs))
    assert sizes.keys() == {"layers.1.d_inner"}
    sizes = plan_sizes(config, rooms, losses, COSTING, Cost(now.param_bytes, round(0.7 * now.macs)))
    assert sizes["layers.1.d_inner"] == 8, "as small as it may become"
    assert len(sizes) > 1


@settings(max_examples=25, deadline=None)
@given(data=st.data(), bytes_share=st.floats(0.5, 1.1), macs_share=st.floats(0.5, 1.1))
def test_plans_meet_the_target_and_giving_anything_back_would_not(data, bytes_share, macs_share):
    config = mixed()
    rooms = space(config)
    seeds = data.draw(st.integers(0, 99))
    random = np.random.default_rng(seeds)
    losses = {place: np.sort(random.exponential(size=own[0])) for place, own in rooms.sizes.items()}
    now = COSTING(config)
    target = Cost(round(bytes_share * now.param_bytes), round(macs_share * now.macs))
    try:
        sizes = plan_sizes(config, rooms, losses, COSTING, target)
    except BudgetExceeded:
        assert min(bytes_share, macs_share) < 0.7
        return
    assert COSTING(resized(config, sizes)).within(target)
    gone = {place for place, size in sizes.items() if size == 0}
    for place, size in sizes.items():
        own = rooms.sizes[place]
        assert size in own[1:]
        if place.rpartition(".")[0] in gone:
            continue
        larger = sizes | {place: own[own.index(size) - 1]}
        assert not COSTING(resized(config, larger)).within(target)


def test_steps_take_equal_shares_of_what_is_over():
    now, limits = Cost(800, 90), Cost(100, 100)
    found = []
    for left in (3, 2, 1):
        now = step_target(now, limits, left)
        found.append(now)
    assert found == [Cost(400, 100), Cost(200, 100), Cost(100, 100)]


def test_a_hopeless_budget_is_refused_with_what_could_be_reached():
    config = student_config()
    rooms = space(config)
    least = COSTING(resized(config, rooms.smallest | {"layers.1": 0}))
    with pytest.raises(BudgetExceeded, match=f"smallest that pruning may leave is {least.param_bytes:,} bytes and "):
        require_reachable(config, rooms, COSTING, Cost(least.param_bytes - 1, 10**9))
    require_reachable(config, rooms, COSTING, Cost(least.param_bytes, least.macs))
    with pytest.raises(AumError, match="within the limits as it is"):
        require_reachable(config, rooms, COSTING, target_limits(Limits()))
    losses = {place: np.ones(own[0]) for place, own in rooms.sizes.items()}
    with pytest.raises(BudgetExceeded, match=r"the least that may be left here"):
        plan_sizes(config, rooms, losses, COSTING, Cost(least.param_bytes - 1, 10**9))


def test_floors_hold():
    config = student_config(widths=(24, 64))
    found = space(config, round_to=8, largest_share=0.5).sizes
    assert found["layers.0.d_inner"] == (24, 16)
    assert found["layers.1.d_inner"] == (64, 56, 48, 40, 32)
    assert found["layers.0.d_state"] == (4, 2)
    assert found["layers.0"] == (1, 0)
    assert found["layers.0.directions"] == (2, 1)
    assert fewest_blocks(config, 0.5) == 1
    assert "d_model" not in space(config, kinds=["d_inner"]).sizes


def test_widths_stay_multiples_however_heads_and_their_channels_give_way():
    blocks = (
        Mamba2BlockConfig(d_inner=96, d_state=8, head_dim=12),
        Mamba2BlockConfig(d_inner=96, d_state=8, head_dim=24),
    )
    found = space(student_config().model_copy(update={"blocks": blocks}), round_to=8).sizes
    assert found["layers.0.d_inner"] == (8, 6, 4, 2), "heads of 12 channels in pairs"
    assert found["layers.0.head_dim"] == (12, 8)
    assert found["layers.1.d_inner"] == (4, 3, 2, 1)
    assert found["layers.1.head_dim"] == (24, 16, 8)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), share=st.floats(0, 1), round_to=st.sampled_from((1, 2, 4)))
def test_heads_and_their_width_together_leave_what_a_block_has_to_keep(seed, share, round_to):
    blocks = (
        Mamba2BlockConfig(d_inner=64, d_state=4, head_dim=8),
        Mamba2BlockConfig(d_inner=60, d_state=4, head_dim=12),
    )
    config = student_config().model_copy(update={"blocks": blocks})
    rooms = space(config, kinds=["d_inner", "head_dim"], round_to=round_to)
    limits = Cost(1, 1)
    now, least = COSTING(config), COSTING(least_config(config, rooms, COSTING, limits))
    target = Cost(*(round(low + share * (high - low)) for low, high in zip(least, now)))
    random = np.random.default_rng(seed)
    losses = {place: random.exponential(size=own[0]) for place, own in rooms.sizes.items()}
    left = resized(config, plan_sizes(config, rooms, losses, COSTING, target))
    assert COSTING(left).within(target)
    assert [block.d_inner >= 0.25 * whole.d_inner for block, whole in zip(left.blocks, blocks)] == [True, True]


def test_layers_that_stay_float_cost_as_much():
    config = student_config()
    section = QuantizeSection(keep_float=("layers.0.mixer.in_proj", "head"))
    wide = Costing("int8", 1.0, section)(config)
    assert wide.param_bytes > COSTING(config).param_bytes
    assert wide.macs == COSTING(config).macs == 2 * Costing("int8", 2.0)(config).macs


def test_measured_losses_are_shared_out_by_importance():
    assert expected_losses(np.array([1.0, 3.0, 6.0, 10.0]), 2, 0.8, 0.0).tolist() == pytest.approx([0.2, 0.6, 1.2, 2.0])
    assert expected_losses(np.zeros(4), 2, -1.0, 0.5).tolist() == [0.25] * 4
