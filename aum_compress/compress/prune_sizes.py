"""Which dimensions give way, and how far: to a budget, by what each is expected to cost, or by a ratio."""

import heapq
import math
from collections.abc import Mapping, Sequence

import numpy as np

from aum_compress.compress.prune_dimensions import Dimension, resized
from aum_compress.compress.prune_plan import (
    SINGLE,
    Cost,
    Costing,
    Room,
    least_sizes,
    multiple_of,
    smallest_size,
)
from aum_compress.errors import BudgetExceeded
from aum_compress.models.config import AudioMambaConfig


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
        if not room.allows(smaller := sizes | {place: room.sizes[place][at]}):
            return math.inf
        then = costing(resized(config, smaller))
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
        else:  # of heads and their width, one gave way so far that the other's multiples are too coarse
            least = least_sizes(config, room, costing, target)
            if costing(resized(config, least)).within(target):
                place_in = {place: own.index(least.get(place, own[0])) for place, own in room.sizes.items()}
                break
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
    wanted: float,
    round_to: int,
    floors: Mapping[str, int],
    fewest: int,
) -> dict[str, int]:
    """Sizes with which about `wanted` channels (blocks, directions) of one kind are gone, the units ranked over all
    dimensions of that kind together: to the nearest multiple where there is room for it.

    Args:
        units: place -> ascending scores, comparable between places. floors: as `room`. fewest: blocks that have to
            stay.
    """
    if not places or wanted <= 0:
        return {}
    single = places[0].kind in SINGLE
    multiples = {d.place: 1 if single else multiple_of(d, round_to) for d in places}
    floor = {d.place: 1 if single else smallest_size(d, round_to, floors) for d in places}
    limit = {d.place: 1 if single else max(0, d.size - floor[d.place]) for d in places}
    # a head of Mamba-2 is as many channels as it is wide
    pool = sorted((float(units[d.place][n]) / d.width, d.place, d.width) for d in places for n in range(limit[d.place]))
    if places[0].kind == "blocks":
        wanted = min(wanted, len(places) - fewest)
    gone, left = dict.fromkeys(limit, 0), wanted
    for _, place, width in pool:
        if left < width / 2:  # nearer to the ratio without it
            break
        gone[place] += 1
        left -= width
    if single:
        return {d.place: d.size - 1 for d in places if gone[d.place]}
    sizes = {}
    for d in places:
        rounded = round((d.size - gone[d.place]) / multiples[d.place]) * multiples[d.place]
        sizes[d.place] = min(d.size, max(rounded, floor[d.place]))
    while True:  # what rounding has left is taken where most of it was to go
        missing = wanted - sum((d.size - sizes[d.place]) * d.width for d in places)
        smaller = {d.place: (sizes[d.place] - 1) // multiples[d.place] * multiples[d.place] for d in places}
        able = [
            d
            for d in places
            if smaller[d.place] >= floor[d.place] and missing >= (sizes[d.place] - smaller[d.place]) * d.width / 2
        ]
        if not able:
            return {d.place: sizes[d.place] for d in places if sizes[d.place] < d.size}
        most = max(able, key=lambda d: gone[d.place] - (d.size - sizes[d.place]))
        sizes[most.place] = smaller[most.place]
