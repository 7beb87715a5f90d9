"""How a matrix, a convolution or an activation of a quantised model is stored: the words of recipes, cards and budgets.

Torch-free. `models.quantized` has the layers that hold it.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

WeightStorage = Literal["int8", "int8-weight", "int4-weight"]
"""Of a layer's weights and what it reads: `int8` quantises both, the others the weights alone."""
Storage = Literal["int8", "int8-smooth", "int8-weight", "int4-weight", "uint8"]
"""The same, and `int8-smooth`: inputs are multiplied by a factor a channel before they are quantised; `uint8`: no
weights, an activation of the scan."""

WEIGHT_BITS: Mapping[Storage, int] = {"int8": 8, "int8-smooth": 8, "int8-weight": 8, "int4-weight": 4}
QUANTISED_INPUTS: tuple[Storage, ...] = ("int8", "int8-smooth")

QuantisedPrecision = Literal["int8", "int4", "mixed"]
QUANTISED: tuple[QuantisedPrecision, ...] = ("mixed", "int4", "int8")
"""What a quantised file is called: after its weights where they are alike."""

NamedStorages = Mapping[str, Storage] | Iterable[str]
"""Name of a layer -> storage; where only names are given, `int8`."""


@dataclass(frozen=True)
class Storable:
    """What of a model can be stored as integers, by name."""

    weights: Mapping[str, Sequence[int]]
    """Layer -> shape (outputs, ...) of its matrix or kernel."""
    smoothed: Collection[str]
    """The layers that smoothing gives a stored factor."""
    scan_slots: Collection[str]
    """Inputs of scans."""


def as_storages(layers: NamedStorages) -> dict[str, Storage]:
    return dict(layers) if isinstance(layers, Mapping) else dict.fromkeys(layers, "int8")


def saves_bytes(weight_shape: Sequence[int], storage: WeightStorage) -> bool:
    """Whether a matrix or kernel (outputs, ...) takes fewer bytes so than as float16. A scale takes 4 bytes an output:
    where an output has 4 weights or fewer (a convolution of 4 taps, a dt_proj of rank 4), int8 only costs digits, and
    time around it."""
    values = math.prod(weight_shape[1:])
    return values * WEIGHT_BITS[storage] / 8 + 4 < 2 * values
