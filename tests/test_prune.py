"""One step of pruning: the ranking of members, sizes by ratio and to a budget, what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SPEC, aum_config, features, student_config, trained_like

from aum_compress.budget.records import Limits
from aum_compress.compress.prune import apply_choice, choose_by_budget, choose_by_ratio, mean_loss, try_ratios
from aum_compress.compress.prune_dimensions import dimensions, resized
from aum_compress.compress.prune_importance import member_scores, unit_scores
from aum_compress.compress.prune_plan import (
    CHOICES,
    Cost,
    Costing,
    RatioPlan,
    fewest_blocks,
    room,
    share_floors,
)
from aum_compress.compress.prune_sizes import share_sizes
from aum_compress.compress.prune_slice import slice_model
from aum_compress.errors import AumError
from aum_compress.models.config import BlockConfig, ConvBlockConfig, ConvStage, ConvStem, Mamba2BlockConfig
from aum_compress.pruning import _Plan
from aum_compress.recipe_schema import PruneSection, TrainConfig

COSTING = Costing("int8", 1.0)
KINDS = [kind for kinds in CHOICES.values() for kind in kinds]
IMPORTANCES = ("taylor", "activation", "magnitude")


def squares(model):
    """The losses of two batches."""
    for seed in range(2):
        yield model(features(4, seed)).square().sum()


def by_ratio(model, ratio=0.5, names=("d_inner",), importance="taylor", round_to=4, largest_share=0.75):
    section = PruneSection(
        ratio=ratio, dimensions=names, round_to=round_to, max_block_ratio=largest_share, finetune=TrainConfig(epochs=1)
    )
    plan = RatioPlan(model.config, section)
    choice = choose_by_ratio(model, squares, importance=importance, plan=plan, step=1, costing=COSTING)
    return apply_choice(model, choice), choice


def mixed():
    """A block of every mixer, along every axis."""
    blocks = (
        BlockConfig(d_inner=24, d_state=4, dt_rank=2, along="time", block_type="v1"),
        BlockConfig(d_inner=16, d_state=6, dt_rank=2, along="mel"),
        Mamba2BlockConfig(d_inner=32, d_state=8, head_dim=8),
        ConvBlockConfig(d_inner=16, d_conv=5),
    )
    stages = (ConvStage(channels=8, stride_mels=4, stride_frames=2, expansion=0), ConvStage(channels=8, stride_mels=1))
    return student_config().model_copy(update={"stem": ConvStem(stages=stages, token="cell"), "blocks": blocks})


# --- importance


def with_noise(place, quiet):
    """A model some of whose members hardly matter: what reads them is a thousandth of what it was."""
    model = trained_like(mixed())
    (dimension,) = (d for d in dimensions(model.config) if d.place == place)
    state = model.state_dict()
    with torch.no_grad():
        for part in (p for p in dimension.slices if p.reads):
            for entry in part.entries[np.isin(part.members, quiet)].ravel():
                state[part.tensor].select(part.axis, int(entry)).mul_(1e-3)
    return model, dimension


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize(
    ("place", "quiet"),
    [
        ("d_model", [1, 5, 6]),
        ("layers.0.d_inner", [0, 3, 20]),
        ("layers.1.d_inner", [0, 3, 7]),
        ("layers.2.d_inner", [2]),
        ("layers.2.head_dim", [0, 9, 18, 27]),
        ("layers.3.d_inner", [4, 15]),
        ("layers.0.d_state", [1, 2]),
        ("layers.1.d_state", [5, 6]),  # one of each direction
        ("layers.2.d_state", [3]),
        ("layers.0.dt_rank", [0]),
        ("stem.0.channels", [2, 7]),
        ("stem.1.hidden", [0, 15]),
    ],
)
def test_members_that_hardly_matter_come_last(importance, place, quiet):
    model, dimension = with_noise(place, quiet)
    if importance == "magnitude":  # of all that a member has, its readers are only a part
        with torch.no_grad():
            for part in dimension.slices:
                tensor = model.state_dict()[part.tensor]
                if part.tensor.endswith("weight"):
                    for entry in part.entries[np.isin(part.members, quiet)].ravel():
                        tensor.select(part.axis, int(entry)).mul_(1e-3)
    scores = member_scores(model, [dimension], importance, squares)[place]
    by_lane = np.argsort(scores.reshape(dimension.lanes, -1), axis=1)
    count = len(quiet) // dimension.lanes
    found = {lane * dimension.size + int(m) for lane in range(dimension.lanes) for m in by_lane[lane, :count]}
    assert found == set(quiet)
    assert scores.min() >= 0
    assert all(p.grad is None for p in model.parameters())


def test_taylor_is_the_first_order_change_of_the_loss():
    """Of a channel whose readers are scaled by 1 - epsilon, the loss changes by epsilon times its score."""
    model = trained_like(student_config(block_type="v1"))

    def loss(model):
        yield model(features(4)).square().sum()

    (dimension,) = (d for d in dimensions(model.config) if d.place == "layers.0.d_inner")
    score = member_scores(model, [dimension], "taylor", loss)["layers.0.d_inner"][3]
    before = mean_loss(model, loss)
    with torch.no_grad():
        model.layers[0].mixer.out_proj.weight[:, 3] *= 1 - 1e-2
        model.layers[0].mixer.x_proj.weight[:, 3] *= 1 - 1e-2
    assert abs(mean_loss(model, loss) - before) == pytest.approx(1e-2 * score, rel=0.05)


def test_the_share_of_each_state_is_what_it_adds_to_the_scan():
    """Shares of all states and of the skip add up to what the mixer puts out."""
    from aum_compress.compress.prune_importance import _mamba2_states, _mamba_states

    model = trained_like(mixed()).double()
    for number, shares in ((0, _mamba_states), (1, _mamba_states), (2, _mamba2_states)):
        mixer = model.layers[number].mixer
        seen = []
        behind = mixer.norm if number == 2 else mixer.out_proj
        behind.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        tokens = torch.randn(2, 5, 16, dtype=torch.float64)
        with torch.no_grad():
            skips = [parameter for name, parameter in mixer.named_parameters() if name in ("D", "D_b")]
            for skip in skips:
                skip.zero_()
            lengths = mixer.out_proj.weight.norm(dim=0)
            if number == 2:
                lengths = lengths * mixer.norm.weight.abs()
            mixer(tokens)
            found = list(shares(mixer, tokens))
        if number == 1:  # v2: states of the second direction lie turned round, and the sum is halved
            half = len(found) // 2
            total = (sum(found[:half]) + sum(found[half:]).flip(-1)) / 2
        else:
            total = sum(found)
        total = total if number == 2 else total.transpose(1, 2)
        torch.testing.assert_close(total, seen[0] * lengths)


# --- by ratio


@settings(max_examples=8, deadline=None)
@given(
    block_type=st.sampled_from(["none", "v1", "v2"]),
    widths=st.tuples(st.sampled_from([16, 24, 32]), st.sampled_from([16, 24, 40])),
    ratio=st.sampled_from([0.3, 0.5]),
    importance=st.sampled_from(IMPORTANCES),
)
def test_about_the_ratio_goes(block_type, widths, ratio, importance):
    config = student_config(block_type=block_type, widths=widths)
    pruned, choice = by_ratio(trained_like(config), ratio, importance=importance)
    after = [block.d_inner for block in pruned.config.blocks]
    assert all(width % 4 == 0 and width >= size / 4 for width, size in zip(after, widths))
    assert sum(after) == pytest.approx((1 - ratio) * sum(widths), abs=4)
    assert (choice.note["before"], choice.note["after"]) == (list(widths), after)
    assert choice.note["param_bytes"][1] == COSTING(pruned.config).param_bytes < choice.note["param_bytes"][0]


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("name", CHOICES)
def test_every_dimension_goes_by_ratio(name, importance):
    model = trained_like(mixed())
    pruned, choice = by_ratio(model, names=(name,), importance=importance, round_to=2)
    assert choice.kept
    assert COSTING(pruned.config).param_bytes < COSTING(mixed()).param_bytes
    assert np.isfinite(mean_loss(pruned, squares))
    blocks = pruned.config.blocks
    if name == "d_state":
        assert [b.d_state for b in blocks[:3]] in ([2, 4, 2], [2, 2, 4], [2, 4, 4], [4, 2, 4], [2, 2, 6], [2, 6, 2])
    if name == "blocks":
        assert len(blocks) == 2
    if name == "directions":
        assert sorted(b.block_type for b in blocks[:2]) in (["none", "v2"], ["none", "v1"])
    if name == "d_model":
        assert pruned.config.d_model == 8


def test_aum_with_class_token_and_positions_is_pruned():
    pruned, _ = by_ratio(trained_like(aum_config()), names=("d_inner", "d_model"))
    assert (pruned.config.d_model, pruned.pos_embed.pos_embed.shape[2], pruned.cls_token.shape[2]) == (8, 8, 8)


def test_no_state_leaks_between_runs():
    first, second = (by_ratio(trained_like(student_config()), 0.4)[0] for _ in range(2))
    torch.testing.assert_close(first(features()), second(features()))


def test_by_ratio_a_step_counts_what_earlier_steps_have_taken():
    model = trained_like(student_config(widths=(64, 64)))
    with torch.no_grad():  # all that goes, goes here
        model.layers[0].mixer.out_proj.weight *= 1e-4
    section = PruneSection(ratio=0.5, steps=3, round_to=2, finetune=TrainConfig(epochs=1))
    recipe = SimpleNamespace(prune=section, quantize=None, export=None)
    plan = _Plan(SimpleNamespace(recipe=recipe, spec=SPEC, limits=Limits()), model.config)
    for step in range(3):
        choice = plan.choose(model, squares, step)
        model = apply_choice(model, choice)
        plan.follow(choice)
    assert model.layers[0].mixer.config.d_inner == 16
    assert 40 < model.layers[1].mixer.config.d_inner < 64


def test_a_step_that_removes_nothing_is_an_error():
    with pytest.raises(AumError, match="this step would remove nothing"):
        by_ratio(trained_like(student_config()), 0.01, round_to=8)


def planned(config, **section):
    return RatioPlan(config, PruneSection(finetune=TrainConfig(epochs=1), **section))


def steps_by(plan, config, steps):
    """The configurations that random importances lead to, step by step."""
    random = np.random.default_rng(0)
    for step in range(1, steps + 1):
        sizes = {}
        for kind, wanted in plan.wanted(config, step).items():
            places = [d for d in dimensions(config) if d.kind == kind]
            units = {d.place: np.sort(random.exponential(size=d.size)) for d in places}
            sizes |= share_sizes(places, units, wanted, plan.section.round_to, plan.floors, plan.fewest_blocks)
        config = resized(config, sizes)
        plan.follow({place: range(size) for place, size in sizes.items()})
        yield config


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_rounding_in_each_step_does_not_add_up(steps):
    """Of d_state 8, half in two steps is 4: the first one makes 6 of it, by rounding, and the second has that to do."""
    config = student_config(widths=(64, 48)).model_copy(update={"d_model": 64})
    blocks = tuple(block.model_copy(update={"d_state": 8}) for block in config.blocks)
    config = config.model_copy(update={"blocks": blocks})
    plan = planned(config, ratio=0.5, steps=steps, round_to=8, dimensions=("d_state", "d_inner", "d_model"))
    *_, last = steps_by(plan, config, steps)
    assert sum(block.d_state for block in last.blocks) == 8
    assert sum(block.d_inner for block in last.blocks) == 56
    assert last.d_model == 32


def test_blocks_that_have_gone_are_no_share_of_widths():
    config = student_config(widths=(64, 64))
    plan = planned(config, ratio=0.5, steps=2, round_to=8, dimensions=("blocks", "d_inner"))
    first, last = steps_by(plan, config, 2)
    assert len(first.blocks) == 1, "nearer to 1.4 of 2 than both"
    assert [block.d_inner for block in last.blocks] == [32]
    assert plan.removable(last, 2) == set()


def test_a_share_too_small_for_a_multiple_is_known_before():
    config = student_config(widths=(24, 32))
    assert planned(config, ratio=0.01, steps=1).removable(config, 1) == set()
    many = planned(config, ratio=0.3, steps=5, round_to=16)
    assert many.removable(config, 1) == set()
    assert many.removable(config, 5) == {"d_inner"}


# --- to the budget


def space(config, kinds=KINDS, round_to=2, largest_share=0.75):
    floors = share_floors(config, largest_share)
    return room(config, kinds, round_to, floors, fewest_blocks(config, largest_share))


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_both_limits_are_met_and_nothing_more_than_needed_goes(importance):
    config = mixed()
    model, now = trained_like(config), COSTING(config)
    target = Cost(round(0.6 * now.param_bytes), round(0.7 * now.macs))
    choice = choose_by_budget(model, squares, importance=importance, room=space(config), costing=COSTING, target=target)
    pruned = apply_choice(model, choice)
    found = COSTING(pruned.config)
    assert found.within(target)
    assert (choice.note["param_bytes"][1], choice.note["macs"][1]) == found
    assert found.param_bytes > 0.9 * target.param_bytes or found.macs > 0.9 * target.macs
    assert choice.note["importances"].keys() >= {"d_model", "layers.1.d_state", "stem.0.channels"}
    assert choice.note["measured"].keys() == space(config).sizes.keys()
    assert np.isfinite(mean_loss(pruned, squares))


# --- sensitivity


def test_every_dimension_is_tried_by_itself():
    config = mixed()
    model = trained_like(config)
    rooms = space(config)
    found = list(try_ratios(model, squares, importance="taylor", room=rooms, ratios=(0.25, 0.5), costing=COSTING))
    assert {one.place for one in found} == rooms.sizes.keys()
    assert all(0 < one.ratio <= 1 and one.new_size < one.size for one in found)
    assert all(one.cost.param_bytes < COSTING(config).param_bytes for one in found)
    (block,) = (one for one in found if one.place == "layers.3")
    without = mean_loss(slice_model(model, {"layers.3": []}), squares) - mean_loss(model, squares)
    assert block.loss_increase == pytest.approx(without)


def test_unit_scores_take_one_of_each_lane():
    (dimension,) = (d for d in dimensions(student_config()) if d.place == "layers.0.d_state")
    assert dimension.lanes == 2
    assert unit_scores(dimension, np.array([4.0, 1, 2, 3, 40, 30, 20, 10])).tolist() == [11, 22, 33, 44]
