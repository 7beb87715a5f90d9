"""What can be cut out of a model, and which entries of which tensors go with each piece. Torch-free.

A *dimension* has a number of members (channels, states, ranks); removing a member removes all entries that it has in
any tensor, and nothing that stays changes. So a pruned model computes what the whole one computes with the member's
entries at zero and its norms taken over the channels that are left. Couplings: letters of DESIGN section 2.

    d_model     residual stream: stem and positions out, every norm, in_proj in, out_proj out, head in; not with rotary
                positions, whose angles follow from the width
    d_inner     mamba, conv: in_proj rows i and i+D, convolution, x_proj and out_proj columns, dt_proj row, A, D
                mamba2: whole heads
    head_dim    mamba2: as many channels of every head
    d_state     rows of B and C, column of A: for each direction that has its own weights its own states
    dt_rank     row of x_proj, column of dt_proj, in the basis of their product's singular vectors (`prune_slice`)
    directions  the backward scan of v2 (with its weights) or v1 (its A); the sum's half of v2 moves into out_proj
    blocks      a whole residual block
    channels    of the stem's stages that a shortcut holds together
    hidden      between expansion and projection of one stage
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from aum_compress.models.config import (
    AudioMambaConfig,
    Block,
    BlockConfig,
    ConvStage,
    ConvStem,
    Mamba2BlockConfig,
    stem_grid,
)

Kind = Literal["d_model", "d_inner", "head_dim", "d_state", "dt_rank", "directions", "blocks", "channels", "hidden"]


@dataclass(frozen=True, eq=False)
class Slice:
    """The entries that members have along one axis of one tensor."""

    tensor: str
    """Name in the state dict."""
    axis: int
    members: np.ndarray
    """(m,) numbers of the members that have entries here."""
    entries: np.ndarray
    """(m,e) places along the axis, of each of them."""
    reads: bool = False
    """These weights, and no others, take the member's values further: without them it has no effect."""


@dataclass(frozen=True, eq=False)
class Dimension:
    """Something that can be made smaller."""

    place: str
    """`d_model`, `layers.3.d_inner`, `layers.3` (the block), `stem.0.channels`, ..."""
    kind: Kind
    size: int
    """Members of each lane."""
    smallest: int = 1
    lanes: int = 1
    """Equal parts (directions, heads) of which each keeps as many members as any other; lane l has the members from
    l * size on."""
    width: int = 1
    """Channels that one member is."""
    slices: tuple[Slice, ...] = ()
    """None of `blocks` and `directions`, where whole tensors go."""
    block: int | None = None


def dimensions(config: AudioMambaConfig) -> tuple[Dimension, ...]:
    """All that `config` has, those that exclude each other not: any sizes of all of them make a model together."""
    return (*_stem(config), *_stream(config), *_blocks(config))


def resized(config: AudioMambaConfig, sizes: Mapping[str, int]) -> AudioMambaConfig:
    """The configuration with new sizes, by place; places that are not named keep theirs. It is not validated again."""
    blocks = tuple(
        _resized_block(block, f"layers.{number}", sizes)
        for number, block in enumerate(config.blocks)
        if sizes.get(f"layers.{number}", 1)
    )
    changes: dict[str, Any] = {"blocks": blocks, "d_model": sizes.get("d_model", config.d_model)}
    if any(place.startswith("stem.") for place in sizes):
        changes["stem"] = _resized_stem(config.stem, sizes)
    return config.model_copy(update=changes)


def _resized_block(block: Block, name: str, sizes: Mapping[str, int]) -> Block:
    found = {key: sizes[place] for key in ("d_inner", "d_state", "dt_rank") if (place := f"{name}.{key}") in sizes}
    if isinstance(block, Mamba2BlockConfig):
        heads, found["head_dim"] = found.get("d_inner", block.n_heads), sizes.get(f"{name}.head_dim", block.head_dim)
        found["d_inner"] = heads * found["head_dim"]
    if sizes.get(f"{name}.directions", 2) == 1 and isinstance(block, BlockConfig):
        found["block_type"] = "none"
    return block.model_copy(update=found) if found else block


def _resized_stem(stem: ConvStem, sizes: Mapping[str, int]) -> ConvStem:
    """What `hidden` and `shortcut` were follows from the old widths, so that they have to be said of the new ones."""
    stages: list[ConvStage] = []
    inputs, group = 1, 0
    for number, stage in enumerate(stem.stages):
        group = group if stage.has_shortcut(inputs) else number
        changes: dict[str, Any] = {"channels": sizes.get(f"stem.{group}.channels", stage.channels)}
        if stage.expansion:
            changes["hidden"] = sizes.get(f"stem.{number}.hidden", stage.hidden_channels(inputs))
            changes["shortcut"] = stage.has_shortcut(inputs)
        stages.append(stage.model_copy(update=changes))
        inputs = stage.channels
    return stem.model_copy(update={"stages": tuple(stages)})


# --- the tables


def _span(
    tensor: str, axis: int, size: int, *starts: int, width: int = 1, first: int = 0, reads: bool = False
) -> Slice:
    """Members `first`... of which each has `width` entries in a row behind each of `starts`."""
    members = np.arange(size)
    blocks = [start + members[:, None] * width + np.arange(width) for start in starts]
    return Slice(tensor, axis, members + first, np.concatenate(blocks, axis=1), reads)


def _stream(config: AudioMambaConfig) -> Iterator[Dimension]:
    if config.position == "rope":
        return
    size = config.d_model
    found = [_span("patch_embed.proj.weight", 0, size, 0), _span("patch_embed.proj.bias", 0, size, 0)]
    if config.pool == "class_token":
        found.append(_span("cls_token", 2, size, 0))
    if config.position == "absolute":
        found.append(_span("pos_embed.pos_embed", 2, size, 0))
    if config.position == "factorised":
        found += [_span(f"pos_embed.{table}", 1, size, 0) for table in ("rows", "columns")]
    for number in range(len(config.blocks)):
        found += [
            _span(f"layers.{number}.norm.weight", 0, size, 0),
            _span(f"layers.{number}.mixer.in_proj.weight", 1, size, 0, reads=True),
            _span(f"layers.{number}.mixer.out_proj.weight", 0, size, 0),
        ]
    found.append(_span("norm_f.weight", 0, size, 0))
    if config.head == "mlp":
        found += [_span(f"head.norm.{tensor}", 0, size, 0) for tensor in ("weight", "bias")]
    head = "head.hidden.weight" if config.head == "mlp" else "head.weight"
    yield Dimension("d_model", "d_model", size, slices=(*found, _span(head, 1, size, 0, reads=True)))


def _blocks(config: AudioMambaConfig) -> Iterator[Dimension]:
    for number, block in enumerate(config.blocks):
        name = f"layers.{number}"
        widths = {"mamba": _mamba, "mamba2": _mamba2, "conv": _gated_conv}[block.mixer](f"{name}.mixer.", block)
        for kind, dimension in widths.items():
            yield Dimension(f"{name}.{kind}", kind, block=number, **dimension)
        if isinstance(block, BlockConfig) and len(block.scans) == 2:
            yield Dimension(f"{name}.directions", "directions", 2, block=number)
        # with rotary positions, what the last block adds is not turned: another one cannot take its place
        if len(config.blocks) > 1 and not (config.position == "rope" and number == len(config.blocks) - 1):
            yield Dimension(name, "blocks", 1, smallest=0, block=number)


def _mamba(name: str, block: BlockConfig) -> dict[Kind, dict[str, Any]]:
    d_inner, d_state, dt_rank = block.d_inner, block.d_state, block.dt_rank
    inner = [_span(f"{name}in_proj.weight", 0, d_inner, 0, d_inner)]
    inner += [_span(f"{name}A{suffix}_log", 0, d_inner, 0) for suffix in block.scans]
    states, ranks = [], []
    for lane, suffix in enumerate(block.projections):
        rows = ("conv1d{}.weight", "conv1d{}.bias", "dt_proj{}.weight", "dt_proj{}.bias", "D{}")
        inner += [_span(f"{name}{row.format(suffix)}", 0, d_inner, 0) for row in rows]
        x_proj, dt_proj = f"{name}x_proj{suffix}.weight", f"{name}dt_proj{suffix}.weight"
        inner.append(_span(x_proj, 1, d_inner, 0, reads=True))
        first = lane * d_state
        states.append(_span(x_proj, 0, d_state, dt_rank, first=first))
        states.append(_span(x_proj, 0, d_state, dt_rank + d_state, first=first, reads=True))
        # v1's directions share B and C, and with them the choice of states
        for scan in block.scans if len(block.projections) == 1 else (suffix,):
            states.append(_span(f"{name}A{scan}_log", 1, d_state, 0, first=first))
        first = lane * dt_rank
        ranks += [_span(x_proj, 0, dt_rank, 0, first=first), _span(dt_proj, 1, dt_rank, 0, first=first, reads=True)]
    inner.append(_span(f"{name}out_proj.weight", 1, d_inner, 0, reads=True))
    lanes = len(block.projections)
    return {
        "d_inner": {"size": d_inner, "slices": tuple(inner)},
        "d_state": {"size": d_state, "lanes": lanes, "slices": tuple(states)},
        "dt_rank": {"size": dt_rank, "lanes": lanes, "slices": tuple(ranks)},
    }


def _gated_conv(name: str, block: Block) -> dict[Kind, dict[str, Any]]:
    size = block.d_inner
    slices = (
        _span(f"{name}in_proj.weight", 0, size, 0, size),
        _span(f"{name}conv1d.weight", 0, size, 0),
        _span(f"{name}conv1d.bias", 0, size, 0),
        _span(f"{name}out_proj.weight", 1, size, 0, reads=True),
    )
    return {"d_inner": {"size": size, "slices": slices}}


def _mamba2(name: str, block: Mamba2BlockConfig) -> dict[Kind, dict[str, Any]]:
    d_inner, d_state, heads, width = block.d_inner, block.d_state, block.n_heads, block.head_dim
    in_proj, mixed = f"{name}in_proj.weight", ("conv1d.weight", "conv1d.bias")
    b, c, steps = 2 * d_inner, 2 * d_inner + d_state, 2 * (d_inner + d_state)  # rows of in_proj behind z and x

    def channels(members: int, each: int) -> list[Slice]:
        return [
            _span(in_proj, 0, members, 0, d_inner, width=each),
            *(_span(f"{name}{tensor}", 0, members, 0, width=each) for tensor in (*mixed, "norm.weight")),
            _span(f"{name}out_proj.weight", 1, members, 0, width=each, reads=True),
        ]

    by_head = [_span(in_proj, 0, heads, steps)]
    by_head += [_span(f"{name}{tensor}", 0, heads, 0) for tensor in ("dt_bias", "A_log", "D")]
    states = [_span(in_proj, 0, d_state, b, c)]
    for tensor in mixed:
        states.append(_span(f"{name}{tensor}", 0, d_state, d_inner))
        states.append(_span(f"{name}{tensor}", 0, d_state, d_inner + d_state, reads=True))
    return {
        "d_inner": {"size": heads, "width": width, "slices": (*channels(heads, width), *by_head)},
        "head_dim": {"size": width, "lanes": heads, "slices": tuple(channels(d_inner, 1))},
        "d_state": {"size": d_state, "slices": tuple(states)},
    }


def _stem(config: AudioMambaConfig) -> Iterator[Dimension]:
    stem = config.stem
    if not isinstance(stem, ConvStem):
        return
    inputs, group, channels = 1, 0, []
    last = len(stem.stages) - 1
    for number, stage in enumerate(stem.stages):
        place, size = f"patch_embed.stages.{number}.", stage.channels
        if not stage.has_shortcut(inputs):
            if channels:
                yield Dimension(f"stem.{group}.channels", "channels", inputs, slices=tuple(channels))
            group, channels = number, []
        channels += _convolution(f"{place}layers.2" if stage.expansion else place[:-1], size, stem.folded)
        if number < last:
            inside = "layers.0.0.weight" if stem.stages[number + 1].expansion else "0.weight"
            channels.append(_span(f"patch_embed.stages.{number + 1}.{inside}", 1, size, 0, reads=True))
        else:
            # a frame's token reads all rows of a channel one behind the other
            rows = stem_grid(stem, config.n_mels, config.n_frames)[0] if stem.token == "frame" else 1
            channels.append(_span("patch_embed.proj.weight", 1, size, 0, width=rows, reads=True))
        if stage.expansion:
            hidden = stage.hidden_channels(inputs)
            inside = [*_convolution(f"{place}layers.0", hidden, stem.folded)]
            inside += _convolution(f"{place}layers.1", hidden, stem.folded)
            inside.append(_span(f"{place}layers.2.0.weight", 1, hidden, 0, reads=True))
            yield Dimension(f"stem.{number}.hidden", "hidden", hidden, slices=tuple(inside))
        inputs = size
    yield Dimension(f"stem.{group}.channels", "channels", inputs, slices=tuple(channels))


def _convolution(name: str, outputs: int, folded: bool) -> list[Slice]:
    """Outputs of a convolution with its bias, or with the batch normalisation behind it."""
    norm = [f"1.{tensor}" for tensor in ("weight", "bias", "running_mean", "running_var")]
    return [_span(f"{name}.{tensor}", 0, outputs, 0) for tensor in ("0.weight", *(["0.bias"] if folded else norm))]
