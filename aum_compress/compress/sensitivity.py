"""What each tensor costs when it alone is quantised: the signal-to-noise ratio of the logits, and accuracy."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
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


def _rehearsal(model: Model, calibration: list[Tensor], section: QuantizeSection, **changes: Any) -> Model:
    """A fake-quantised model with every layer ready to be quantised, whatever `section` says of single layers."""
    layers = dict.fromkeys(quantizable_layers(model), "int8")  # those too that are as small as float16
    return prepare(model, calibration, section.model_copy(update={"layers": layers, "keep_float": (), **changes}))


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
    calibration = list(calibration)
    int8 = _rehearsal(model, calibration, section)
    # an out_proj whose weights alone are integers is not smoothed; what `section` leaves in float32 before a scan is
    # measured here, since in the other model x_proj may round what it reads for itself
    others = _rehearsal(model, calibration, section, smoothing=0.0, scan_inputs=SCAN_SLOTS)
    trials = list(_trials(int8, others, section, tuple(dict.fromkeys(storages))))
    costs = []
    for done, (tensor, what, storage, values, rehearsed, quantised) in enumerate(trials, start=1):
        with in_float(rehearsed), quantised():
            found = judge.logits(rehearsed)
        drop = float_accuracy - judge.accuracy(found)
        costs.append(Cost(tensor, what, storage, values, min(EXACT_DB, signal_to_noise_db(reference, found)), drop))
        if advance:
            advance(done, len(trials))
    return Sensitivity(judge.part, len(judge.features), float_accuracy, tuple(costs))


Trial = tuple[str, str, str, int, Model, Callable[[], Any]]


def _trials(
    int8: Model, others: Model, section: QuantizeSection, storages: tuple[WeightStorage, ...]
) -> Iterator[Trial]:
    """Tensor, what of it, how, how many values, one of both models and a context in which it is quantised there."""
    layers = {name: m for name, m in int8.named_modules() if isinstance(m, FakeQuantizedLayer)}
    for name, layer in layers.items():
        for storage in storages:
            model, top = int8 if storage in QUANTISED_INPUTS else others, top_of(storage, section.weight_bits)
            module = model.get_submodule(name)
            yield name, "weights", storage, layer.weight.numel(), model, partial(_with, module, "top", top)
        if layer.input is not None:
            yield name, "inputs", "uint8", 0, int8, partial(_with, layer.input, "active", True)
    for name, slot in others.named_modules():
        if isinstance(slot, FakeQuantize) and name.rpartition(".")[0] not in layers:
            yield name, "inputs", "uint8", 0, others, partial(_with, slot, "active", True)
    rest = sum(parameter.numel() for parameter in int8.parameters()) - sum(m.weight.numel() for m in layers.values())
    yield REST, "values", "fp16", rest, int8, partial(_rest_in_half, int8)


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
