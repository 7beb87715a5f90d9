"""A pruned model computes what the whole one computes with the removed members at zero, for all that can be pruned."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_configs import MIXERS as MIXED
from model_configs import audio_mambas
from tiny import aum_config, features, student_config, trained_like
from torch import nn

from aum_compress.budget.analytic_bytes import analytic_stored
from aum_compress.compress.prune_dimensions import dimensions, resized
from aum_compress.compress.prune_slice import merge_ranks_, slice_model
from aum_compress.models.audio_mamba import AudioMamba
from aum_compress.models.config import (
    BlockConfig,
    ConvBlockConfig,
    ConvStage,
    ConvStem,
    Mamba2BlockConfig,
)
from aum_compress.models.scan import selective_scan_oracle
from aum_compress.train.module import parameter_groups


def prepared(config, seed=0):
    """A model none of whose tensors is at rest, in float64, so that only what is wrong differs."""
    torch.manual_seed(seed)
    model = AudioMamba(config).double().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.3 if "running_var" in name else 0.5 * torch.randn_like(tensor))
    return model


def inputs(config, count=2):
    return torch.randn(count, 1, config.n_mels, config.n_frames, generator=torch.Generator().manual_seed(1)).double()


class CountingNorm(nn.Module):
    """RMSNorm or LayerNorm over the channels that stay, zero elsewhere."""

    def __init__(self, norm, stay):
        super().__init__()
        self.norm, self.stay = norm, stay

    def forward(self, x):
        kept = x[..., self.stay]
        if isinstance(self.norm, nn.LayerNorm):
            kept = kept - kept.mean(-1, keepdim=True)
        y = torch.zeros_like(x)
        scaled = kept * torch.rsqrt(kept.pow(2).mean(-1, keepdim=True) + self.norm.eps) * self.norm.weight[self.stay]
        y[..., self.stay] = scaled + (self.norm.bias[self.stay] if isinstance(self.norm, nn.LayerNorm) else 0)
        return y


class WithoutBackward(nn.Module):
    """A v1 mixer less what its backward scan, by the definition, has added."""

    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, tokens):
        mixer = self.mixer
        x, z = mixer.in_proj(tokens).transpose(1, 2).chunk(2, dim=1)
        parts = [part.flip(-1) for part in (*mixer.scan_inputs(x, ""), z)]
        u, delta, b, c, z = parts
        rates = -torch.exp(mixer.A_b_log.float()).double()
        added = selective_scan_oracle(u, delta, rates, b, c, mixer.D, z, delta_softplus=True).flip(-1)
        return mixer(tokens) - mixer.out_proj(added.transpose(1, 2))


def mask(model, dimension, gone):
    """Sets to zero what reads the members `gone`, by hand: written without the tables that pruning uses."""
    lanes = [
        [m - lane * dimension.size for m in gone if m // dimension.size == lane] for lane in range(dimension.lanes)
    ]
    stay = [m for m in range(dimension.lanes * dimension.size) if m not in gone]
    layer = None if dimension.block is None else model.layers[dimension.block]
    kind = dimension.kind
    if kind == "blocks":
        layer.mixer.out_proj.weight.zero_()
    elif kind == "directions":
        mixer = layer.mixer
        if mixer.config.block_type == "v2":
            mixer.D_b.zero_()
            mixer.x_proj_b.weight[mixer.config.dt_rank + mixer.config.d_state :].zero_()  # C
        else:
            layer.mixer = WithoutBackward(mixer)
    elif kind == "d_model":
        for block in model.layers:
            block.norm = CountingNorm(block.norm, stay)
            block.mixer.out_proj.weight[gone] = 0
        model.norm_f = CountingNorm(model.norm_f, stay)
        if model.config.head == "mlp":
            model.head.norm = CountingNorm(model.head.norm, stay)
    elif kind in ("d_inner", "head_dim"):
        mixer = layer.mixer
        width = dimension.width
        columns = [m * width + place for m in gone for place in range(width)]
        mixer.out_proj.weight[:, columns] = 0
        if isinstance(mixer.config, BlockConfig):
            for suffix in mixer.config.projections:
                getattr(mixer, f"x_proj{suffix}").weight[:, columns] = 0
        if isinstance(mixer.config, Mamba2BlockConfig):
            mixer.norm = CountingNorm(mixer.norm, [i for i in range(mixer.config.d_inner) if i not in columns])
    elif kind == "d_state" and isinstance(layer.mixer.config, BlockConfig):
        for suffix, states in zip(layer.mixer.config.projections, lanes):
            rank = layer.mixer.config.dt_rank
            getattr(layer.mixer, f"x_proj{suffix}").weight[[rank + n for n in states]] = 0  # B
    elif kind == "d_state":
        rows = [2 * layer.mixer.config.d_inner + n for n in gone]
        layer.mixer.in_proj.weight[rows] = 0
        layer.mixer.conv1d.bias[[row - layer.mixer.config.d_inner for row in rows]] = 0
    elif kind == "dt_rank":
        for suffix, ranks in zip(layer.mixer.config.projections, lanes):
            getattr(layer.mixer, f"dt_proj{suffix}").weight[:, ranks] = 0
    else:
        number = int(dimension.place.split(".")[1])
        stages = model.patch_embed.stages
        places = [stages[number].layers[0] if kind == "hidden" else stages[number]]
        while kind == "channels" and number + 1 < len(stages) and getattr(stages[number + 1], "shortcut", False):
            number += 1
            places.append(stages[number])
        for place in places:  # as if the stage had never made them
            place.register_forward_hook(lambda module, args, y: y.index_fill(1, torch.tensor(gone), 0))
        if kind == "hidden":  # behind the depthwise convolution, whose bias would fill it again
            stages[number].layers[1].register_forward_hook(
                lambda module, args, y: y.index_fill(1, torch.tensor(gone), 0)
            )


def chosen(data, dimension, size):
    """`size` members of each lane."""
    kept = []
    for lane in range(dimension.lanes):
        members = st.permutations(range(dimension.size)) if dimension.kind != "directions" else st.just(range(2))
        kept += [lane * dimension.size + member for member in sorted(list(data.draw(members))[:size])]
    return kept


def checked(data, config, dimension):
    """One dimension of one model, pruned and masked."""
    kept = chosen(data, dimension, data.draw(st.integers(dimension.smallest, dimension.size - 1)))
    pruned = slice_model(prepared(config), {dimension.place: kept})
    whole = prepared(config)
    gone = [member for member in range(dimension.lanes * dimension.size) if member not in kept]
    with torch.no_grad():
        mask(whole, dimension, gone)
        torch.testing.assert_close(pruned(inputs(config)), whole(inputs(config)), rtol=1e-5, atol=1e-5)
    for precision in ("fp32", "int8"):
        before, after = (
            sum(layer.param_bytes for layer in analytic_stored(c, precision).values()) for c in (config, pruned.config)
        )
        assert after < before
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in whole.parameters())


BLOCKS = {
    **{
        f"mamba-{kind}": st.builds(BlockConfig.model_copy, MIXED["mamba"], update=st.just({"block_type": kind}))
        for kind in ("none", "v1", "v2")
    },
    **{
        f"mamba2-{way}": st.builds(Mamba2BlockConfig.model_copy, MIXED["mamba2"], update=st.just({"two_way": way}))
        for way in (True, False)
    },
    "conv": MIXED["conv"],
}
"""Every mixer and direction count -> blocks of it."""


@pytest.mark.parametrize("mixer", BLOCKS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_pruned_model_equals_masked_model(mixer, data):
    """Any model of this mixer, each of its dimensions, any members."""
    config = data.draw(audio_mambas(BLOCKS[mixer]))
    for dimension in dimensions(config):
        if dimension.size > dimension.smallest:
            checked(data, config, dimension)


@pytest.mark.parametrize("mixer", BLOCKS)
def test_every_mixer_has_its_dimensions(mixer):
    name, _, way = mixer.partition("-")
    blocks = {
        "mamba": BlockConfig(d_inner=12, d_state=4, dt_rank=3, block_type=way if name == "mamba" else "none"),
        "mamba2": Mamba2BlockConfig(d_inner=12, d_state=4, head_dim=4),
        "conv": ConvBlockConfig(d_inner=12, d_conv=5),
    }
    config = student_config().model_copy(update={"blocks": (blocks[name],) * 2})
    found = {d.place.removeprefix("layers.1.") for d in dimensions(config) if d.block == 1}
    wanted = {"mamba": {"d_inner", "d_state", "dt_rank"}, "mamba2": {"d_inner", "head_dim", "d_state"}}
    both = {"directions"} if way in ("v1", "v2") else set()
    assert found == wanted.get(name, {"d_inner"}) | both | {"layers.1"}


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_all_dimensions_at_once_are_one_after_the_other(data):
    config = data.draw(audio_mambas())
    kept, sizes = {}, {}
    for dimension in dimensions(config):
        if dimension.kind == "blocks" and any(p.count(".") == 1 for p in kept):
            continue  # one of up to three blocks
        sizes[dimension.place] = data.draw(st.integers(dimension.smallest, dimension.size))
        kept[dimension.place] = chosen(data, dimension, sizes[dimension.place])
    pruned = slice_model(prepared(config), kept)
    assert pruned.config == resized(config, sizes)
    one_by_one = prepared(config)
    # what changes the numbers of other members goes last: heads those of their channels, directions those of states
    order = {"head_dim": 0, "d_inner": 1, "directions": 2, "blocks": 3}
    for dimension in sorted(dimensions(config), key=lambda dimension: order.get(dimension.kind, 0)):
        place = dimension.place
        if place not in kept:
            continue
        one_by_one = slice_model(one_by_one, {place: kept[place]})
    torch.testing.assert_close(pruned(inputs(config)), one_by_one(inputs(config)), rtol=1e-9, atol=1e-9)


def test_shortcuts_stay_what_they_were():
    """Widths that become equal make no shortcut, and expansion's hidden channels do not follow the inputs."""
    stages = (
        ConvStage(channels=8, expansion=0),
        ConvStage(channels=12, stride_mels=1),
        ConvStage(channels=12, stride_mels=1),
    )
    config = student_config().model_copy(update={"stem": ConvStem(stages=stages)})
    pruned = slice_model(prepared(config), {"stem.1.channels": range(8)})
    assert [stage.shortcut for stage in pruned.config.stem.stages] == [None, False, True]
    assert [stage.hidden for stage in pruned.config.stem.stages] == [None, 16, 24]
    again = slice_model(pruned, {"stem.1.channels": range(4), "stem.1.hidden": range(8)})
    whole = slice_model(prepared(config), {"stem.1.channels": range(4), "stem.1.hidden": range(8)})
    torch.testing.assert_close(again(inputs(config)), whole(inputs(config)))


def test_stems_that_were_never_pruned_are_written_as_before():
    stage = ConvStage(channels=8, expansion=0)
    assert stage.model_dump().keys() == {"channels", "stride_mels", "stride_frames", "expansion"}
    pruned = slice_model(prepared(student_config()), {"stem.2.hidden": range(8)}).config
    assert type(pruned).model_validate_json(pruned.model_dump_json()) == pruned


@pytest.mark.parametrize(
    ("stage", "wrong"),
    [
        ({"channels": 8, "expansion": 0, "hidden": 8}, "expansion 0 is a plain convolution"),
        ({"channels": 8, "stride_mels": 2, "shortcut": True}, "shortcut: needs strides of 1"),
        ({"channels": 12, "stride_mels": 1, "shortcut": True}, "adds 8 channels to 12; wanted as many"),
    ],
)
def test_stems_that_do_not_fit_are_refused(stage, wrong):
    with pytest.raises(ValueError, match=wrong):
        ConvStem.model_validate({"stages": [{"channels": 8, "expansion": 0}, stage]})


@pytest.mark.parametrize("block_type", ["none", "v1", "v2"])
@pytest.mark.parametrize("dt_rank", [1, 3, 40])
def test_merged_ranks_compute_the_same(block_type, dt_rank):
    blocks = (BlockConfig(d_inner=24, d_state=4, dt_rank=dt_rank, block_type=block_type),)
    config = student_config().model_copy(update={"blocks": blocks})
    model, merged = trained_like(config), trained_like(config)
    merge_ranks_(merged)
    torch.testing.assert_close(merged(features()), model(features()), rtol=1e-5, atol=1e-5)
    weight = merged.layers[0].mixer.dt_proj.weight
    lengths = weight.norm(dim=0)
    assert (lengths[1:] <= lengths[:-1] + 1e-6).all()
    if dt_rank == 40:  # more ranks than channels: those behind are empty, and go for nothing
        pruned = slice_model(
            merged, {"layers.0.dt_rank": [lane * 40 + r for lane in range(1 + (block_type == "v2")) for r in range(24)]}
        )
        torch.testing.assert_close(pruned(features()), model(features()), rtol=1e-5, atol=1e-5)


def test_fewer_ranks_are_the_best_approximation():
    model = trained_like(student_config(block_type="none"))
    mixer = model.layers[0].mixer
    product = (mixer.dt_proj.weight @ mixer.x_proj.weight[:2]).detach()
    merge_ranks_(model)
    small = slice_model(model, {"layers.0.dt_rank": [0]}).layers[0].mixer
    found = small.dt_proj.weight @ small.x_proj.weight[:1]
    values = torch.linalg.svdvals(product)
    torch.testing.assert_close((product - found).norm(), values[1], rtol=1e-4, atol=1e-6)  # Eckart and Young


def test_rotary_positions_keep_the_width_and_the_last_block():
    config = aum_config().model_copy(update={"position": "rope"})
    places = {dimension.place for dimension in dimensions(config)}
    assert "d_model" not in places
    assert {"layers.0", "layers.1"} & places == {"layers.0"}


def test_mode_and_weight_decay_are_those_of_the_whole_model():
    model = trained_like(student_config()).train()
    model.activation_checkpointing = True
    generator = torch.get_rng_state()
    pruned = slice_model(model, {"layers.0.d_inner": range(8), "d_model": range(8)})
    assert torch.equal(torch.get_rng_state(), generator)
    assert pruned.training
    assert pruned.activation_checkpointing
    assert not slice_model(model.eval(), {"d_model": range(8)}).training
    names = [{id(p): name for name, p in one.named_parameters()} for one in (model, pruned)]
    groups = [
        [[own[id(p)] for p in group["params"]] for group in parameter_groups(one, 0.05, 1e-3)]
        for one, own in zip((model, pruned), names)
    ]
    assert groups[0] == groups[1]
    assert all(p.requires_grad and p.is_leaf for p in pruned.parameters())
    pruned(features()).sum().backward()
    torch.optim.AdamW(parameter_groups(pruned, 0.05)).step()
    assert model.layers[0].mixer.D.shape == (24,), "the whole model is as it was"


@pytest.mark.parametrize(
    ("kept", "wrong"),
    [
        ({"layers.7.d_inner": [0]}, "no such dimension: layers.7.d_inner"),
        ({"d_model": [16]}, "d_model: has no member 16"),
        ({"layers.0.d_state": [0, 1, 4]}, r"\[2, 1\] of 4 members stay; wanted as many of each lane"),
        ({"d_model": []}, "at least 1"),
        ({"d_model": [1, 1]}, "each named once"),
    ],
)
def test_members_that_are_not_there_are_refused(kept, wrong):
    with pytest.raises(ValueError, match=wrong):
        slice_model(trained_like(student_config()), kept)
