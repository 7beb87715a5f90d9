"""How small a model has to become, and which of its dimensions give way for it.

Sizes are planned from exact counts alone (`budget.analytic`, `budget.analytic_bytes`): no model is built. What giving
way costs is told from outside, as the loss expected with each further unit of a dimension.
"""

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from aum_compress.budget.analytic import analytic_macs
from aum_compress.budget.analytic_bytes import Precision, analytic_storable, analytic_stored
from aum_compress.budget.records import Limits, per_second
from aum_compress.compress.prune_dimensions import Dimension, dimensions, resized
from aum_compress.compress.quantize import storages_by
from aum_compress.errors import AumError, BudgetExceeded
from aum_compress.models.config import AudioMambaConfig
from aum_compress.models.factory import folded_config
from aum_compress.recipe_schema import QuantizeSection

STATE_MULTIPLE = 2
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


@dataclass(frozen=True)
class Room:
    """How far each dimension of one model may give way."""

    sizes: Mapping[str, tuple[int, ...]]
    """Place -> sizes that it may have, the present one first, descending."""
    fewest_blocks: int

    @property
    def smallest(self) -> dict[str, int]:
        """Every size at its end, blocks apart."""
        return {place: sizes[-1] for place, sizes in self.sizes.items() if sizes[-1] > 0}


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
    found = {}
    for dimension in dimensions(config):
        if dimension.kind in chosen:
            multiple = multiple_of(dimension, round_to)
            floor = max(dimension.smallest, floors.get(dimension.place, 0))
            below = range((dimension.size - 1) // multiple * multiple, floor - 1, -multiple)
            found[dimension.place] = (dimension.size, *below)
    return Room({place: sizes for place, sizes in found.items() if len(sizes) > 1}, fewest_blocks)


def share_floors(config: AudioMambaConfig, largest_share: float) -> dict[str, int]:
    """Place -> smallest size with which no more than `largest_share` of it is gone."""
    whole = ("blocks", "directions")
    return {d.place: math.ceil(d.size * (1 - largest_share) - 1e-9) for d in dimensions(config) if d.kind not in whole}


def fewest_blocks(config: AudioMambaConfig, largest_share: float) -> int:
    return max(1, math.ceil(len(config.blocks) * (1 - largest_share) - 1e-9))


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
    return resized(config, _smallest(config, room, costing, limits))


def _limits_text(limits: Cost) -> str:
    return f"{limits.macs:,} MACs" if limits.param_bytes >= 2**62 else limits.text()


def _smallest(config: AudioMambaConfig, room: Room, costing: Costing, limits: Cost) -> dict[str, int]:
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


def plan_sizes(
    config: AudioMambaConfig,
    room: Room,
    losses: Mapping[str, np.ndarray],
    costing: Costing,
    target: Cost,
) -> dict[str, int]:
    """New sizes, by place, with which the model costs no more than `target`.

    Greedy: of all dimensions the one gives way, by one of its multiples, that has the least expected loss for each
    share of what is over the target and would be saved; what it would save beyond the target counts for nothing. At
    the end, what turned out not to be needed is given back, the most expensive first.

    Args:
        losses: place -> loss expected with each unit that goes, the first one first.

    Raises:
        BudgetExceeded: what may give way is not enough.
    """
    now = costing(config)
    over = Cost(*(max(0, cost - limit) for cost, limit in zip(now, target)))
    place_in = dict.fromkeys(room.sizes, 0)
    """Place -> position in its sizes."""
    sizes: dict[str, int] = {}
    blocks = len(config.blocks)

    def extra(place: str) -> float:
        first, own = room.sizes[place][0], room.sizes[place]
        at = place_in[place]
        return float(losses[place][first - own[at] : first - own[at + 1]].sum())

    def price(place: str) -> float:
        at = place_in[place] + 1
        if at >= len(room.sizes[place]) or (room.sizes[place][at] == 0 and blocks <= room.fewest_blocks):
            return math.inf
        then = costing(resized(config, sizes | {place: room.sizes[place][at]}))
        gain = sum(min(a - b, a - goal) / excess for a, b, excess, goal in zip(now, then, over, target) if a > goal)
        return extra(place) / gain if gain > 0 else math.inf

    # prices only rise as other dimensions give way, so that an old one is a lower bound
    queue = [(price(place), place) for place in room.sizes]
    heapq.heapify(queue)
    while not now.within(target):
        while queue:
            old, place = heapq.heappop(queue)
            found = price(place)
            if math.isinf(found):
                continue
            if found <= old * (1 + 1e-9) or not queue or found <= queue[0][0]:
                break
            heapq.heappush(queue, (found, place))
        else:
            raise BudgetExceeded(
                f"prune: {now.text()} is the least that may be left here, wanted {target.text()}; raise "
                "prune.max_block_ratio or prune.steps"
            )
        place_in[place] += 1
        sizes[place] = room.sizes[place][place_in[place]]
        blocks -= sizes[place] == 0
        now = costing(resized(config, sizes))
        heapq.heappush(queue, (price(place), place))
    return _given_back(config, room, losses, costing, target, place_in)


def _given_back(
    config: AudioMambaConfig,
    room: Room,
    losses: Mapping[str, np.ndarray],
    costing: Costing,
    target: Cost,
    place_in: dict[str, int],
) -> dict[str, int]:
    def sizes(changed: str | None = None) -> dict[str, int]:
        steps = {place: at - (place == changed) for place, at in place_in.items() if at}
        return {place: room.sizes[place][at] for place, at in steps.items() if at}

    def last_loss(place: str) -> float:
        own, at = room.sizes[place], place_in[place]
        return float(losses[place][own[0] - own[at - 1] : own[0] - own[at]].sum())

    waiting = sorted((place for place, at in place_in.items() if at), key=last_loss, reverse=True)
    while waiting:
        place = waiting.pop(0)
        if place_in[place] and costing(resized(config, sizes(place))).within(target):
            place_in[place] -= 1
            waiting = sorted((*waiting, place), key=lambda p: last_loss(p) if place_in[p] else -1.0, reverse=True)
    return sizes()


def expected_losses(units: np.ndarray, tried: int, measured: float, least: float) -> np.ndarray:
    """(size,) losses with each unit that goes, where the first `tried` together were measured to cost `measured`.

    They are shared out by importance: what the other units cost follows from their scores.

    Args:
        units: ascending scores. least: what even a loss too small to measure, or below zero, counts as.
    """
    measured = max(measured, least)
    known = units[:tried].sum()
    if known <= 0:  # nothing that was tried matters to this importance
        known, units = float(tried), units + 1.0
    return units * (measured / known)


def share_sizes(
    places: Sequence[Dimension],
    units: Mapping[str, np.ndarray],
    ratio: float,
    round_to: int,
    largest_share: float,
    fewest: int,
) -> dict[str, int]:
    """Sizes with which about `ratio` of dimensions of one kind is gone, their units ranked over all of them together.

    Args:
        units: place -> ascending scores, comparable between places. fewest: blocks that have to stay.
    """
    kind = places[0].kind
    single = kind in ("blocks", "directions")  # one unit each
    limit = {d.place: 1 if single else math.floor(largest_share * d.size + 1e-9) for d in places}
    # a head of Mamba-2 is as many channels as it is wide
    pool = sorted((float(units[d.place][n]) / d.width, d.place, d.width) for d in places for n in range(limit[d.place]))
    wanted = ratio * sum(1 if single else d.size * d.width for d in places)
    if kind == "blocks":
        wanted = min(wanted, len(places) - fewest)
    gone = dict.fromkeys(limit, 0)
    for _, place, width in pool:
        if wanted < width / 2:  # nearer to the ratio without it
            break
        gone[place] += 1
        wanted -= width
    sizes = {}
    for dimension in places:
        multiple = 1 if single else multiple_of(dimension, round_to)
        size = round((dimension.size - gone[dimension.place]) / multiple) * multiple
        if not single:  # rounding must not go below what may be left, nor to nothing
            floor = max(1, dimension.size - limit[dimension.place])
            size = min(dimension.size, max(size, math.ceil(floor / multiple) * multiple))
        if size < dimension.size:
            sizes[dimension.place] = size
    return sizes


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
