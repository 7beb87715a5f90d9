"""What each tensor costs when it alone is quantised: the signal-to-noise ratio of the logits, and accuracy."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aum_compress.compress.quantize import in_float, prepare, signal_to_noise_db
from aum_compress.models.factory import Model
from aum_compress.models.fake_quantized import (
    FakeQuantize,
    FakeQuantizedLayer,
    round_rest_to_half_,
    top_of,
)
from aum_compress.models.integer_inputs import slots_made_by
from aum_compress.models.mamba import SCAN_SLOTS
from aum_compress.models.quantized import quantizable_layers
from aum_compress.models.storage import QUANTISED_INPUTS, WeightStorage
from aum_compress.recipe_schema import QuantizeSection

REST = "everything else"
EXACT_DB = 300.0
"""Stands for no difference at all."""
MOST_BATCH = 64


@dataclass(frozen=True)
class Judge:
    """Clips that say what quantisation costs."""

    part: str
    """Whose they are: `validation` or `train`."""
    features: Tensor
    """(n,1,F,T), normalised."""
    accuracy: Callable[[np.ndarray], float]
    """Of (n,C) logits, in percent, macro over the classes."""

    def logits(self, model: Model) -> np.ndarray:
        """(n,C) float32."""
        with torch.inference_mode():
            return np.concatenate([model(batch).float().numpy() for batch in self.features.split(MOST_BATCH)])


@dataclass(frozen=True)
class Cost:
    """One tensor quantised, all others in float32."""

    tensor: str
    """Name of a layer, of an input of a scan, or `everything else`: biases, norms, A, D, positions."""
    what: str
    """`weights`, `inputs` or `values`."""
    storage: str
    values: int
    """In the weights; 0 for what is not stored."""
    sqnr_db: float
    accuracy_drop: float
    """In percentage points; below zero where accuracy rose."""

    @property
    def noise(self) -> float:
        """Energy of the error, as a share of that of the logits."""
        return 0.0 if self.sqnr_db >= EXACT_DB else 10 ** (-self.sqnr_db / 10)


@dataclass(frozen=True)
class Sensitivity:
    """Costs of all tensors, in the order of the model."""

    part: str
    clips: int
    float_accuracy: float
    costs: tuple[Cost, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "costs": [asdict(cost) for cost in self.costs]}

    def noise(self, tensor: str, what: str, storage: str | None = None) -> float:
        """Of one tensor; 0 where it was not measured, because there is nothing to quantise."""
        fitting = (c for c in self.costs if (c.tensor, c.what) == (tensor, what) and storage in (None, c.storage))
        return next((cost.noise for cost in fitting), 0.0)


def rehearsal(model: Model, calibration: Iterable[Tensor], section: QuantizeSection) -> Model:
    """A fake-quantised model with every layer and every input of a scan ready to be quantised, whatever `section` says
    of single layers."""
    layers = dict.fromkeys(quantizable_layers(model), "int8")  # those too that are as small as float16
    whole = {"layers": layers, "keep_float": (), "scan_inputs": SCAN_SLOTS}
    return prepare(model, calibration, section.model_copy(update=whole))


def sensitivity(
    model: Model,
    calibration: Iterable[Tensor],
    judge: Judge,
    section: QuantizeSection | None = None,
    *,
    storages: Iterable[WeightStorage] = ("int8", "int4-weight"),
    advance: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """Quantises one tensor at a time.

    Args:
        model: float, in evaluation mode.
        calibration: as `compress.quantize.prepare`.
        storages: of weights that are tried.
        advance: called with (done, total).

    Raises:
        AumError: as `prepare`.
    """
    section = section or QuantizeSection()
    reference = judge.logits(model)
    float_accuracy = judge.accuracy(reference)
    prepared = rehearsal(model, list(calibration), section)
    trials = list(_trials(prepared, section, tuple(dict.fromkeys(storages))))
    costs = []
    for done, (tensor, what, storage, values, quantised) in enumerate(trials, start=1):
        with in_float(prepared), quantised():
            found = judge.logits(prepared)
        drop = float_accuracy - judge.accuracy(found)
        costs.append(Cost(tensor, what, storage, values, min(EXACT_DB, signal_to_noise_db(reference, found)), drop))
        if advance:
            advance(done, len(trials))
    return Sensitivity(judge.part, len(judge.features), float_accuracy, tuple(costs))


Trial = tuple[str, str, str, int, Callable[[], Any]]


def _trials(model: Model, section: QuantizeSection, storages: tuple[WeightStorage, ...]) -> Iterator[Trial]:
    """Tensor, what of it, how, how many values, and a context in which it is quantised."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, FakeQuantizedLayer)}
    for name, layer in layers.items():
        values = layer.weight.numel()
        for storage in storages:
            top = top_of(storage, section.weight_bits)
            yield name, "weights", storage, values, lambda layer=layer, top=top: _with(layer, "top", top)
        if layer.input is not None:
            yield name, "inputs", "uint8", 0, lambda layer=layer: _with(layer.input, "active", True)
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantize) and name.rpartition(".")[0] not in layers:
            yield name, "inputs", "uint8", 0, lambda module=module: _with(module, "active", True)
    rest = sum(parameter.numel() for parameter in model.parameters()) - sum(m.weight.numel() for m in layers.values())
    yield REST, "values", "fp16", rest, lambda: _rest_in_half(model)


@contextmanager
def _rest_in_half(model: Model) -> Iterator[None]:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    round_rest_to_half_(model)
    try:
        yield
    finally:
        model.load_state_dict(before)


@contextmanager
def _with(module: Any, switch: str, value: Any) -> Iterator[None]:
    before = getattr(module, switch)
    setattr(module, switch, value)
    try:
        yield
    finally:
        setattr(module, switch, before)


@contextmanager
def stored_as(model: Model, section: QuantizeSection, chosen: Mapping[str, WeightStorage | str]) -> Iterator[None]:
    """A `rehearsal` in which each layer is stored as `chosen` says, and the inputs of scans as `section` does."""
    own = dict(chosen)
    for name, storage in chosen.items():
        if storage in QUANTISED_INPUTS:
            own |= dict.fromkeys(slots_made_by(name, section.scan_inputs), "uint8")
    with in_float(model):
        for name, module in model.named_modules():
            if isinstance(module, FakeQuantizedLayer) and own.get(name, "fp16") != "fp16":
                module.top = top_of(own[name], section.weight_bits)
                if module.input is not None:
                    module.input.active = own[name] in QUANTISED_INPUTS
            elif own.get(name) == "uint8":
                module.active = True
        yield
