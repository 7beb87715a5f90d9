"""Which layer gets how many bits: the fewest bytes for a stated loss of accuracy, or the least loss for stated bytes.

Errors of small steps add up nearly independently, so each layer's share is measured once, alone
(`compress.sensitivity`). From every layer at its widest, the move that saves most bytes for the noise it adds comes
first, until all are at their narrowest. How far along this road a model may go is measured on what would ship, by
bisection. Behind the first move that costs too much the following ones are tried without it: the worst is rolled back,
the road is not ended.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor

from aum_compress.compress.quantize import layer_storages, quantize, with_layers
from aum_compress.compress.sensitivity import Judge, Sensitivity, sensitivity
from aum_compress.errors import AumError, BudgetExceeded
from aum_compress.models.factory import Model, fold_batch_norm
from aum_compress.models.integer_inputs import slots_made_by
from aum_compress.models.quantized import param_bytes_of, quantizable_layers
from aum_compress.models.storage import WeightStorage
from aum_compress.recipe_schema import QuantizeSection

Choice = WeightStorage | Literal["fp16"]


@dataclass(frozen=True)
class Found:
    """A mixture and what it was judged by."""

    layers: dict[str, Choice]
    """Name of every layer -> its storage: `quantize.layers` of a recipe that wants the same without a search."""
    param_bytes: int
    accuracy_drop: float
    """Against float32 on the judging clips, in percentage points."""
    rolled_back: tuple[str, ...]
    """Layers whose move cost too much and was undone."""
    measured: tuple[tuple[int, float], ...]
    """(param bytes, accuracy drop) of every mixture that was tried, in that order."""
    sensitivity: Sensitivity

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**vars(self), "sensitivity": self.sensitivity.to_dict()}


Move = tuple[str, Choice]
"""Layer and what it is to be stored as."""


def search(
    model: Model,
    calibration: Iterable[Tensor],
    judge: Judge,
    section: QuantizeSection,
    advance: Callable[[int, int], None] | None = None,
) -> Found:
    """The mixture that `section.search` asks for; layers that `section` names keep what it says.

    Args:
        model: float, in evaluation mode.
        calibration: as `compress.quantize.prepare`.
        advance: called with (done, total) while sensitivity is measured.

    Raises:
        BudgetExceeded: not even the narrowest mixture has as few bytes as wanted.
        AumError: no mixture loses as little accuracy as wanted; or as `prepare`.
    """
    wanted = section.search
    calibration = list(calibration)
    storages = tuple(storage for storage in wanted.candidates if storage != "fp16")
    costs = sensitivity(model, calibration, judge, section, storages=storages, advance=advance)
    folded = fold_batch_norm(model)
    options = _options(folded, section, wanted.candidates)
    measured: list[tuple[int, float]] = []

    def count(chosen: Mapping[str, Choice]) -> int:
        return param_bytes_of(folded, layer_storages(folded, with_layers(section, chosen)))

    def drop(chosen: Mapping[str, Choice]) -> float:
        quantized = quantize(model, calibration, with_layers(section, chosen))
        found = costs.float_accuracy - judge.accuracy(judge.logits(quantized))
        measured.append((count(chosen), found))
        return found

    start = {name: choices[0] for name, choices in options.items()}
    noise = partial(_noise, costs, section.scan_inputs)
    road = _road(start, options, noise, count)
    rolled_back: tuple[str, ...] = ()
    if wanted.max_param_bytes is not None:
        chosen = _least_loss(start, road, count, wanted.max_param_bytes)
        final = drop(chosen)
    else:
        chosen, final, rolled_back = _fewest_bytes(start, road, drop, wanted.max_drop)
    return Found(chosen, count(chosen), final, rolled_back, tuple(measured), costs)


def _options(model: Model, section: QuantizeSection, candidates: tuple[Choice, ...]) -> dict[str, tuple[Choice, ...]]:
    """Layer -> what it may be stored as, the first one first."""
    fixed = layer_storages(model, section.model_copy(update={"smoothing": 0.0, "scan_inputs": ()}))
    named = (*section.layers, *section.keep_float)
    return {
        name: (fixed.get(name, "fp16"),) if name.startswith(named) else tuple(dict.fromkeys(candidates))
        for name in quantizable_layers(model)
    }


def _road(
    start: Mapping[str, Choice],
    options: Mapping[str, tuple[Choice, ...]],
    noise: Callable[[str, Choice], float],
    count: Callable[[Mapping[str, Choice]], int],
) -> list[Move]:
    """Moves from `start` to all layers at their fewest bytes, those with the least noise for the bytes saved first."""
    size = {(name, choice): count({**start, name: choice}) for name in options for choice in options[name]}
    now, road = dict(start), []
    while True:
        moves = [
            ((noise(name, choice) - noise(name, now[name])) / saved, -saved, (name, choice))
            for name, choices in options.items()
            for choice in choices
            if (saved := size[name, now[name]] - size[name, choice]) > 0
        ]
        if not moves:
            return road
        *_, move = min(moves)
        now[move[0]] = move[1]
        road.append(move)


def _noise(costs: Sensitivity, scan_inputs: Iterable[str], layer: str, choice: Choice) -> float:
    """Of a layer stored so, with the inputs that become integers by it."""
    if choice == "fp16":
        return 0.0
    noise = costs.noise(layer, "weights", choice)
    if choice == "int8":
        slots = slots_made_by(layer, scan_inputs)
        noise += costs.noise(layer, "inputs") + sum(costs.noise(slot, "inputs") for slot in slots)
    return noise


def _along(start: Mapping[str, Choice], moves: Iterable[Move]) -> dict[str, Choice]:
    return dict(start) | dict(moves)


def _least_loss(
    start: Mapping[str, Choice], road: list[Move], count: Callable[[Mapping[str, Choice]], int], limit: int
) -> dict[str, Choice]:
    """The shortest way down to `limit` bytes."""
    for length in range(len(road) + 1):
        if count(chosen := _along(start, road[:length])) <= limit:
            return chosen
    raise BudgetExceeded(
        f"quantize.search: the narrowest mixture of candidates has {count(_along(start, road)):,} bytes, wanted at "
        f"most {limit:,}. Allow int4-weight among search.candidates, or make the model smaller"
    )


def _fewest_bytes(
    start: Mapping[str, Choice], road: list[Move], drop: Callable[[Mapping[str, Choice]], float], limit: float
) -> tuple[dict[str, Choice], float, tuple[str, ...]]:
    """The longest way that loses at most `limit` points, its loss, and the layers whose moves were left out of it."""
    final = drop(start)
    if final > limit:
        raise AumError(
            f"quantize.search: with all layers at the first of search.candidates accuracy falls by {final:.2f} "
            f"points, wanted at most {limit:g}. Put a wider one first (fp16), or raise max_drop"
        )
    good, bad = 0, len(road) + 1
    middle = len(road)  # perhaps all of it
    while bad - good > 1:
        if (found := drop(_along(start, road[:middle]))) <= limit:
            good, final = middle, found
        else:
            bad = middle
        middle = (good + bad) // 2
    chosen, rolled_back = _along(start, road[:good]), []
    for layer, choice in road[good:]:
        if layer in rolled_back:
            continue
        # the first one is known to cost too much
        if len(rolled_back) == 0 or (found := drop(_along(chosen, [(layer, choice)]))) > limit:
            rolled_back.append(layer)
        else:
            chosen, final = _along(chosen, [(layer, choice)]), found
    return chosen, final, tuple(rolled_back)
