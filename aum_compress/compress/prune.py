"""One step of structured pruning: which members go, by a ratio or to a budget, and the smaller model.

To a budget, importance ranks the members *within* a dimension; what a whole dimension is worth is measured: half of it
is left out, and the rise of the training loss shared out among its members by their scores. So scores of any kind, and
dimensions of any kind, compare.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from aum_compress.compress.prune_dimensions import Dimension, dimensions, resized
from aum_compress.compress.prune_importance import Importance, Losses, best_members, member_scores, unit_scores
from aum_compress.compress.prune_plan import SINGLE, Cost, Costing, RatioPlan, Room
from aum_compress.compress.prune_sizes import expected_losses, plan_sizes, share_sizes
from aum_compress.compress.prune_slice import merge_ranks_, slice_model
from aum_compress.errors import AumError
from aum_compress.models.audio_mamba import AudioMamba
from aum_compress.models.config import AudioMambaConfig, BlockConfig

LEAST_LOSS = 1e-4
"""Share of the loss that leaving out half of a dimension counts as, where measuring finds less or an improvement."""
DIGITS = 4
Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class Choice:
    """What one step takes away."""

    kept: Mapping[str, Sequence[int]]
    """Place -> members that stay, of the dimensions that give way."""
    note: Mapping[str, Any]
    """JSON: sizes, importances and what was measured."""


def apply_choice(model: AudioMamba, choice: Choice) -> AudioMamba:
    """The smaller model; `model` is used up."""
    if any(place.endswith(".dt_rank") for place in choice.kept):
        merge_ranks_(model)
    return slice_model(model, choice.kept)


def choose_by_budget(
    model: AudioMamba,
    losses: Losses,
    *,
    importance: Importance,
    room: Room,
    costing: Costing,
    target: Cost,
    advance: Advance | None = None,
) -> Choice:
    """Members whose absence brings the model down to `target` for the least expected loss (`plan_sizes`).

    Raises:
        BudgetExceeded: what may give way is not enough. AumError: nothing would go.
    """
    merge_ranks_(model)
    known = {d.place: d for d in dimensions(model.config) if d.place in room.sizes}
    scores = _scores(model, list(known.values()), importance, losses)
    base = mean_loss(model, losses)
    expected, measured = {}, {}
    for done, (place, dimension) in enumerate(known.items(), start=1):
        size = _half(room.sizes[place])
        kept = _kept(dimension, scores.get(place), size)
        rise = mean_loss(slice_model(model, {place: kept}), losses) - base
        measured[place] = {"size": size, "loss_increase": rise}
        units = unit_scores(dimension, scores[place]) if place in scores else np.ones(1)
        expected[place] = expected_losses(units, max(1, dimension.size - size), rise, LEAST_LOSS * base)
        if advance:
            advance(done, len(known))
    sizes = plan_sizes(model.config, room, expected, costing, target)
    return _choice(model, known, scores, sizes, {"loss": base, "measured": measured}, costing)


def choose_by_ratio(
    model: AudioMamba, losses: Losses, *, importance: Importance, plan: RatioPlan, step: int, costing: Costing
) -> Choice:
    """What `plan` takes of each kind of dimension in this step, the members ranked over all blocks together.

    Raises:
        AumError: nothing would go.
    """
    merge_ranks_(model)
    sizes: dict[str, int] = {}
    scores: dict[str, np.ndarray] = {}
    known: dict[str, Dimension] = {}
    removable = plan.removable(model.config, step)
    for kind, wanted in plan.wanted(model.config, step).items():
        if kind not in removable:
            continue
        places = [d for d in dimensions(model.config) if d.kind == kind]
        known |= {d.place: d for d in places}
        own = _scores(model, places, importance, losses)
        scores |= own
        if kind in SINGLE:
            units = _left_out(model, places, losses)
        else:
            units = {d.place: unit_scores(d, _comparable(own[d.place], importance)) for d in places}
        sizes |= share_sizes(places, units, wanted, plan.section.round_to, plan.floors, plan.fewest_blocks)
    return _choice(model, known, scores, sizes, {}, costing)


def mean_loss(model: AudioMamba, losses: Losses) -> float:
    """In evaluation mode, over all batches alike."""
    training = model.training
    model.eval()
    with torch.no_grad():
        found = [float(loss) for loss in losses(model)]
    model.train(training)
    return float(np.mean(found))


@dataclass(frozen=True)
class Tried:
    """One dimension left smaller."""

    place: str
    kind: str
    size: int
    """Of the whole model, in channels or what the dimension counts."""
    new_size: int
    loss_increase: float
    cost: Cost

    @property
    def ratio(self) -> float:
        """Share that is gone."""
        return 1 - self.new_size / self.size


def try_ratios(
    model: AudioMamba,
    losses: Losses,
    *,
    importance: Importance,
    room: Room,
    ratios: Sequence[float],
    costing: Costing,
    advance: Advance | None = None,
) -> Iterator[Tried]:
    """Every dimension in `room` by itself, at the sizes nearest to each of `ratios` gone; no training follows."""
    merge_ranks_(model)
    known = {d.place: d for d in dimensions(model.config) if d.place in room.sizes}
    scores = _scores(model, list(known.values()), importance, losses)
    base = mean_loss(model, losses)
    wanted = []
    for place, dimension in known.items():
        whole, *smaller = room.sizes[place]
        nearest = {min(smaller, key=lambda size, ratio=ratio: abs(size - whole * (1 - ratio))) for ratio in ratios}
        wanted += [(dimension, size) for size in sorted(nearest, reverse=True)]
    for done, (dimension, size) in enumerate(wanted, start=1):
        smaller = slice_model(model, {dimension.place: _kept(dimension, scores.get(dimension.place), size)})
        rise = mean_loss(smaller, losses) - base
        cost = costing(smaller.config)
        yield Tried(
            dimension.place, dimension.kind, dimension.size * dimension.width, size * dimension.width, rise, cost
        )
        if advance:
            advance(done, len(wanted))


def _scores(
    model: AudioMamba, wanted: Sequence[Dimension], importance: Importance, losses: Losses
) -> dict[str, np.ndarray]:
    members = [d for d in wanted if d.kind not in ("blocks", "directions")]
    return member_scores(model, members, importance, losses) if members else {}


def _left_out(model: AudioMamba, places: Sequence[Dimension], losses: Losses) -> dict[str, np.ndarray]:
    """Place -> (1,) what the loss is without it."""
    return {d.place: np.array([mean_loss(slice_model(model, {d.place: [0][: d.smallest]}), losses)]) for d in places}


def _comparable(scores: np.ndarray, importance: Importance) -> np.ndarray:
    """Between blocks: as they are where they are of the loss, else by the mean of their own dimension."""
    return scores if importance == "taylor" or not scores.any() else scores / scores.mean()


def _kept(dimension: Dimension, scores: np.ndarray | None, size: int) -> list[int]:
    return list(range(size)) if scores is None else best_members(dimension, scores, size)


def _half(sizes: Sequence[int]) -> int:
    """Of the sizes that a dimension may have, the largest that leaves out half or more, or else the last one."""
    return next((size for size in sizes[1:] if size <= sizes[0] / 2), sizes[-1])


def _choice(
    model: AudioMamba,
    known: Mapping[str, Dimension],
    scores: Mapping[str, np.ndarray],
    sizes: Mapping[str, int],
    measured: Mapping[str, Any],
    costing: Costing,
) -> Choice:
    gone = {place for place, size in sizes.items() if known[place].kind == "blocks"}
    sizes = {p: size for p, size in sizes.items() if p in gone or f"layers.{known[p].block}" not in gone}
    if not sizes:
        raise AumError("prune: this step would remove nothing; lower prune.steps or prune.round_to")
    after = resized(model.config, sizes)
    before, left, found = costing(model.config), costing(after), totals(after)
    note = {
        "before": widths(model.config),
        "after": widths(after),
        "kinds": {kind: [total, found[kind]] for kind, total in totals(model.config).items() if total != found[kind]},
        "sizes": {p: [known[p].size * known[p].width, size * known[p].width] for p, size in sizes.items()},
        "param_bytes": [before.param_bytes, left.param_bytes],
        "macs": [before.macs, left.macs],
        "precision": costing.precision,
        "model": after.model_dump(mode="json"),
        **_rounded(measured),
        "importances": {place: [_round(value) for value in found] for place, found in scores.items()},
    }
    kept = {place: _kept(known[place], scores.get(place), size) for place, size in sizes.items()}
    return Choice(kept, note)


def widths(config: AudioMambaConfig) -> list[int]:
    """d_inner of every block."""
    return [block.d_inner for block in config.blocks]


def totals(config: AudioMambaConfig) -> Counter[str]:
    """Kind of dimension -> its size, summed over blocks and stages."""
    found: Counter[str] = Counter()
    for dimension in dimensions(config):
        if dimension.kind not in ("blocks", "directions", "head_dim"):
            found[dimension.kind] += dimension.size * dimension.width
    scans = sum(len(block.scans) for block in config.blocks if isinstance(block, BlockConfig))
    return found + Counter({"directions": scans, "blocks": len(config.blocks)})


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return _round(value) if isinstance(value, float) else value


def _round(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
