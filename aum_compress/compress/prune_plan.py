"""What a model costs, how small it has to become, and how far each of its dimensions may give way for it.

All of it from exact counts alone (`budget.analytic`, `budget.analytic_bytes`): no model is built.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, NamedTuple

from aum_compress.budget.analytic import analytic_macs
from aum_compress.budget.analytic_bytes import Precision, analytic_storable, analytic_stored
from aum_compress.budget.records import Limits, per_second
from aum_compress.compress.prune_dimensions import Dimension, dimensions, resized
from aum_compress.compress.quantize import storages_by
from aum_compress.errors import AumError, BudgetExceeded
from aum_compress.models.config import AudioMambaConfig
from aum_compress.models.factory import folded_config
from aum_compress.recipe_schema import PruneSection, QuantizeSection

STATE_MULTIPLE = 2
SINGLE = ("blocks", "directions")
"""Kinds of which each is one member that stays or goes."""
CHOICES: dict[str, tuple[str, ...]] = {
    "d_inner": ("d_inner", "head_dim"),
    "d_model": ("d_model",),
    "d_state": ("d_state",),
    "dt_rank": ("dt_rank",),
    "directions": ("directions",),
    "blocks": ("blocks",),
    "stem": ("channels", "hidden"),
}
"""What a recipe names -> kinds of dimensions."""


class Cost(NamedTuple):
    param_bytes: int
    macs: int
    """For one second of audio."""

    def within(self, limits: "Cost") -> bool:
        return self.param_bytes <= limits.param_bytes and self.macs <= limits.macs

    def text(self) -> str:
        return f"{self.param_bytes:,} bytes and {self.macs:,} MACs"


@dataclass(frozen=True)
class Costing:
    """What a configuration will cost in the file that ships."""

    precision: Precision | Literal["mixed"]
    clip_seconds: float
    quantize: QuantizeSection | None = None
    """How each layer of the file is stored; as `precision` stores it by default where there is none."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values: all that costs depend on."""
        keys = {"weights", "layers", "keep_float", "smoothing", "scan_inputs"}
        section = self.quantize and self.quantize.model_dump(mode="json", include=keys)
        return {**vars(self), "quantize": section}

    def __call__(self, config: AudioMambaConfig) -> Cost:
        config = folded_config(config)
        if self.quantize:
            stored = analytic_stored(config, "mixed", storages_by(self.quantize, analytic_storable(config)))
        else:
            stored = analytic_stored(config, self.precision)
        macs = per_second(sum(analytic_macs(config).values()), self.clip_seconds)
        return Cost(sum(layer.param_bytes for layer in stored.values()), macs)


class Heads(NamedTuple):
    """Of a Mamba-2 block: both their number and their width may give way, and d_inner is the product."""

    number: int
    width: int
    fewest_channels: int
    """That both together may leave of d_inner."""


@dataclass(frozen=True)
class Room:
    """How far each dimension of one model may give way."""

    sizes: Mapping[str, tuple[int, ...]]
    """Place -> sizes that it may have, the present one first, descending."""
    fewest_blocks: int
    heads: Mapping[str, Heads]
    """Place of a Mamba-2 block -> its heads."""

    @property
    def smallest(self) -> dict[str, int]:
        """Every size at its end, blocks apart."""
        found = {place: sizes[-1] for place, sizes in self.sizes.items() if sizes[-1] > 0}
        for block, heads in self.heads.items():
            own = {f"{block}.d_inner": (heads.number,), f"{block}.head_dim": (heads.width,)}
            pairs = product(*(self.sizes.get(place, now) for place, now in own.items()))
            enough = [pair for pair in pairs if math.prod(pair) >= heads.fewest_channels]
            found |= dict(zip(own, min(enough, key=lambda pair: (math.prod(pair), pair))))
        return found

    def allows(self, sizes: Mapping[str, int]) -> bool:
        """Whether places, each within its own sizes, leave enough together."""
        return all(
            sizes.get(f"{block}.d_inner", heads.number) * sizes.get(f"{block}.head_dim", heads.width)
            >= heads.fewest_channels
            for block, heads in self.heads.items()
        )


def target_limits(limits: Limits) -> Cost:
    """Both limits; one that is not set holds nothing back."""
    return Cost(2**62 if limits.max_param_bytes is None else limits.max_param_bytes, limits.max_macs)


def room(
    config: AudioMambaConfig,
    kinds: Iterable[str],
    round_to: int,
    floors: Mapping[str, int],
    fewest_blocks: int,
) -> Room:
    """What may be taken from `config`.

    Args:
        kinds: of dimensions. floors: place -> smallest size, `share_floors` of the model that pruning began with.
    """
    chosen = set(kinds)
    found, heads = {}, {}
    for dimension in dimensions(config):
        if dimension.kind == "head_dim":
            block = dimension.place.removesuffix(".head_dim")
            heads[block] = Heads(dimension.lanes, dimension.size, floors.get(f"{block}.d_inner", 0))
        if dimension.kind in chosen:
            multiple = multiple_of(dimension, round_to)
            floor = max(dimension.smallest, fewest_members(dimension, floors))
            below = range((dimension.size - 1) // multiple * multiple, floor - 1, -multiple)
            found[dimension.place] = (dimension.size, *below)
    return Room({place: sizes for place, sizes in found.items() if len(sizes) > 1}, fewest_blocks, heads)


def share_floors(config: AudioMambaConfig, largest_share: float) -> dict[str, int]:
    """Place -> smallest size, in channels or what it counts, with which no more than `largest_share` of it is gone.

    Widths of heads have none of their own: they and the number of heads have that of d_inner.
    """
    no_share = ("blocks", "directions", "head_dim")
    return {
        d.place: math.ceil(d.size * d.width * (1 - largest_share) - 1e-9)
        for d in dimensions(config)
        if d.kind not in no_share
    }


def fewest_members(dimension: Dimension, floors: Mapping[str, int]) -> int:
    """With which `floors` hold where no other dimension gives way; 0 where there is none."""
    if dimension.kind == "head_dim":
        channels = floors.get(dimension.place.replace(".head_dim", ".d_inner"), 0)
        return math.ceil(channels / dimension.lanes)
    return math.ceil(floors.get(dimension.place, 0) / dimension.width)


def fewest_blocks(config: AudioMambaConfig, largest_share: float) -> int:
    return max(1, math.ceil(len(config.blocks) * (1 - largest_share) - 1e-9))


def smallest_size(dimension: Dimension, round_to: int, floors: Mapping[str, int]) -> int:
    """The least multiple with which `floors` hold, or its own size where that is less."""
    multiple = multiple_of(dimension, round_to)
    least = max(dimension.smallest, fewest_members(dimension, floors))
    return min(dimension.size, math.ceil(least / multiple) * multiple)


class RatioPlan:
    """What pruning by a ratio leaves of each kind of dimension, step by step.

    Each step leaves (1 - ratio)^(step/steps) of what the model that pruning began with had, whatever rounding made of
    the steps before. Of blocks that have gone nothing counts.
    """

    def __init__(self, config: AudioMambaConfig, section: PruneSection) -> None:
        self.section = section
        self.floors = share_floors(config, section.max_block_ratio)
        self.fewest_blocks = fewest_blocks(config, section.max_block_ratio)
        self.n_blocks = len(config.blocks)
        self.whole = {d.place: d.size * d.width for d in dimensions(config)}
        # of Mamba-2, whole heads: a ratio of both heads and their channels would be taken twice
        self.kinds = [kind for kind in kinds_of(section.dimensions) if kind != "head_dim"]

    def follow(self, kept: Mapping[str, Sequence[int]]) -> None:
        """Blocks behind one that went have moved up."""
        self.floors, self.whole = floors_behind(self.floors, kept), floors_behind(self.whole, kept)

    def wanted(self, config: AudioMambaConfig, step: int) -> dict[str, float]:
        """Kind -> channels, blocks or directions that are still to go by the end of the `step`-th step, the first 1."""
        share = (1 - self.section.ratio) ** (step / self.section.steps)
        found = {}
        for kind in self.kinds:
            places = [d for d in dimensions(config) if d.kind == kind]
            now = len(places) if kind in SINGLE else sum(d.size * d.width for d in places)
            whole = sum(self.whole.get(d.place, d.size * d.width) for d in places)
            if kind == "blocks":
                whole = self.n_blocks
            elif kind == "directions":
                whole = sum(place.endswith(".directions") for place in self.whole)
            found[kind] = now - share * whole
        return found

    def removable(self, config: AudioMambaConfig, step: int) -> set[str]:
        """Kinds of which something goes in that step: there is room, and it is nearer to the goal."""
        wanted = self.wanted(config, step)
        found = set()
        for d in dimensions(config):
            if d.kind not in wanted:
                continue
            least = 1 if d.kind in SINGLE else self._least_loss(d)
            spare = d.kind != "blocks" or len(config.blocks) > self.fewest_blocks
            if least and spare and wanted[d.kind] >= least / 2:
                found.add(d.kind)
        return found

    def _least_loss(self, dimension: Dimension) -> int:
        """Channels that go with the next smaller multiple; 0 where there is none."""
        multiple = multiple_of(dimension, self.section.round_to)
        smaller = (dimension.size - 1) // multiple * multiple
        room = smaller >= smallest_size(dimension, self.section.round_to, self.floors)
        return (dimension.size - smaller) * dimension.width if room else 0


def multiple_of(dimension: Dimension, round_to: int) -> int:
    """Members by which a size may change, so that channels stay multiples of `round_to`."""
    if dimension.kind in ("d_model", "d_inner", "head_dim", "channels", "hidden"):
        return round_to // math.gcd(round_to, dimension.width)
    return STATE_MULTIPLE if dimension.kind == "d_state" and dimension.size > STATE_MULTIPLE else 1


def require_reachable(config: AudioMambaConfig, room: Room, costing: Costing, limits: Cost) -> None:
    """Before any training.

    Raises:
        AumError: the model is within the limits as it is.
        BudgetExceeded: nothing that pruning may leave is.
    """
    now = costing(config)
    if now.within(limits):
        raise AumError(
            f"prune.to_budget: the model is within the limits as it is ({now.text()} at {costing.precision}, limits "
            f"{_limits_text(limits)}): there is nothing to prune; start from a wider one or leave the section out"
        )
    least = costing(least_config(config, room, costing, limits))
    if not least.within(limits):
        raise BudgetExceeded(
            f"prune.to_budget: cannot be reached: of {now.text()} at {costing.precision} the smallest that pruning may "
            f"leave is {least.text()}, limits {_limits_text(limits)}. Raise prune.max_block_ratio, lower "
            "prune.round_to, name more prune.dimensions, or start from a smaller model"
        )


def kinds_of(names: Iterable[str]) -> list[str]:
    """Kinds of the dimensions that a recipe names."""
    return [kind for name in names for kind in CHOICES[name]]


def least_config(config: AudioMambaConfig, room: Room, costing: Costing, limits: Cost) -> AudioMambaConfig:
    """The smallest that pruning may leave; of the blocks, those that then use least of the limits."""
    return resized(config, least_sizes(config, room, costing, limits))


def _limits_text(limits: Cost) -> str:
    return f"{limits.macs:,} MACs" if limits.param_bytes >= 2**62 else limits.text()


def least_sizes(config: AudioMambaConfig, room: Room, costing: Costing, limits: Cost) -> dict[str, int]:
    """By place, those of `least_config`."""
    sizes = room.smallest
    removable = [place for place, own in room.sizes.items() if own[-1] == 0]
    whole = costing(resized(config, sizes))

    def use(place: str) -> float:
        without = costing(resized(config, sizes | {place: 0})) if len(config.blocks) > 1 else whole
        return sum((a - b) / limit for a, b, limit in zip(whole, without, limits))

    costly_first = sorted(removable, key=use, reverse=True)
    return sizes | dict.fromkeys(costly_first[: max(0, len(config.blocks) - room.fewest_blocks)], 0)


def step_target(now: Cost, limits: Cost, steps_left: int) -> Cost:
    """What this step has to come down to: the same share of what is over in each step that is left."""
    return Cost(
        *(
            limit if cost <= limit else math.ceil(limit * (cost / limit) ** (1 - 1 / steps_left) - 1e-6)
            for cost, limit in zip(now, limits)
        )
    )


def floors_behind(floors: Mapping[str, int], kept: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Floors of the model that a step leaves: blocks behind one that went have moved up."""
    gone = sorted(int(place.split(".")[1]) for place, members in kept.items() if not members)
    found = {}
    for place, floor in floors.items():
        kind, number, *rest = place.split(".") if place.startswith("layers.") else (place, None)
        if number is None:
            found[place] = floor
        elif int(number) not in gone:
            moved = int(number) - sum(one < int(number) for one in gone)
            found[".".join((kind, str(moved), *rest))] = floor
    return found
