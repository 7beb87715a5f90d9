"""What a budget check finds, and its verdict. Torch-free; words and units are those of DESIGN section 2."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aum_compress.errors import AumError, BudgetExceeded, join_problems

LARGEST_NAMED = 3
"""How many of the largest layers a failed budget names."""


@dataclass(frozen=True)
class Limits:
    """Largest values that still pass; the defaults are DCASE 2025 Task 1's. None: no limit of that kind."""

    max_param_bytes: int | None = 128_000
    max_macs: int = 30_000_000
    """For one second of audio."""
    max_params: int | None = None
    """Values in weights, whatever their width."""
    int8_weights: bool = False
    """No weight of more than one axis is stored in more than 8 bits; biases may be wider."""

    def __post_init__(self) -> None:
        for name in ("max_param_bytes", "max_macs", "max_params"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise AumError(f"budget limit {name}: found {value}, wanted a positive number")

    def to_dict(self) -> dict[str, int | bool]:
        """As JSON: what is limited, and nothing else."""
        return {name: value for name, value in vars(self).items() if value is not None and value is not False}


@dataclass(frozen=True)
class Operations:
    """What one layer computes in one run of the graph, as one witness counted it."""

    macs: int = 0
    elementwise: Mapping[str, int] = field(default_factory=dict)
    """Operation -> results written (for reductions: values read)."""
    kind: str = ""
    """What most of the MACs come from, where the witness can tell: linear, conv, scan."""


@dataclass(frozen=True)
class Stored:
    """What is stored of one layer."""

    param_bytes: int = 0
    params: int = 0
    wide_params: int = 0
    """Values of weights that have more than one axis and are stored in more than 8 bits."""

    def __add__(self, other: "Stored") -> "Stored":
        return Stored(
            self.param_bytes + other.param_bytes,
            self.params + other.params,
            self.wide_params + other.wide_params,
        )


def wide_values(shape: Sequence[int], bits: int) -> int:
    """How many values of a weight count as wide: none of a vector, whose other axes have size 1, nor in 8 bits."""
    return math.prod(shape) if bits > 8 and sum(size > 1 for size in shape) > 1 else 0


@dataclass(frozen=True)
class LayerCost:
    """One layer: a module that owns tensors or computes something, named by its path in the model."""

    name: str
    kind: str
    param_bytes: int
    params: int
    """Values in its weights; batch-norm statistics, scales and zero points are in `param_bytes` alone."""
    macs: int
    """For one clip."""
    elementwise: Mapping[str, int]
    """For one clip, operation -> results written."""
    wide_params: int = 0
    """Values of weights that have more than one axis and are stored in more than 8 bits."""


@dataclass(frozen=True)
class BudgetReport:
    """The cost of one model against its limits. `macs` is for one second of audio, what layers list is for one clip."""

    layers: tuple[LayerCost, ...]
    limits: Limits
    clip_seconds: float
    witnesses: tuple[str, ...]
    """Who counted the MACs; all agreed, else there is no report."""
    dcase_bytes: int | None = None
    """What DCASE's script prints; None where there is no torch model to give it."""
    dcase_macs: int | None = None
    """What DCASE's script (torchinfo 1.8.0) prints for one clip."""
    front_end_macs: int | None = None
    """Of the log-mel front-end for one second of audio, outside the budget; None where the front-end is unknown."""
    front_end_bytes: int | None = None
    """Tensors of a front-end that is part of the file, outside the budget; None where the file has none."""
    peak_activation_bytes: int | None = None
    """Most bytes of values alive at once in one run, inputs and outputs included, weights not; not gated."""
    file_bytes: int | None = None
    """Of the ONNX file, with the data that it keeps in files beside it; None for a torch model."""
    notes: tuple[str, ...] = ()

    @property
    def param_bytes(self) -> int:
        """Bytes of every tensor that the deployed model stores, at its stored width."""
        return sum(layer.param_bytes for layer in self.layers)

    @property
    def params(self) -> int:
        return sum(layer.params for layer in self.layers)

    @property
    def wide_params(self) -> int:
        """Values of matrices, kernels and tables that are stored in more than 8 bits."""
        return sum(layer.wide_params for layer in self.layers)

    @property
    def macs_per_clip(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def macs(self) -> int:
        """For one second of audio, rounded up."""
        return per_second(self.macs_per_clip, self.clip_seconds)

    @property
    def elementwise(self) -> dict[str, int]:
        """Operation -> results written for one clip, largest first."""
        total: Counter[str] = Counter()
        for layer in self.layers:
            total.update(layer.elementwise)
        return dict(total.most_common())

    @property
    def over(self) -> bool:
        return bool(excesses(self))

    def to_dict(self) -> dict[str, Any]:
        """As JSON, under the keys of DESIGN section 2."""
        return {
            "verdict": "over" if self.over else "within",
            "param_bytes": self.param_bytes,
            "params": self.params,
            "wide_params": self.wide_params,
            "macs": self.macs,
            "macs_per_clip": self.macs_per_clip,
            "clip_seconds": self.clip_seconds,
            "witnesses": list(self.witnesses),
            "elementwise": self.elementwise,
            "dcase_bytes": self.dcase_bytes,
            "dcase_macs": self.dcase_macs,
            "front_end_macs": self.front_end_macs,
            "front_end_bytes": self.front_end_bytes,
            "peak_activation_bytes": self.peak_activation_bytes,
            "file_bytes": self.file_bytes,
            "limits": self.limits.to_dict(),
            "notes": list(self.notes),
            "layers": [vars(layer) | {"elementwise": dict(layer.elementwise)} for layer in self.layers],
        }


def per_second(macs_per_clip: int, clip_seconds: float) -> int:
    """MACs for one second of audio, rounded up so that rounding never lets a model pass."""
    return math.ceil(macs_per_clip / clip_seconds)


def enforce(report: BudgetReport) -> None:
    """Raises BudgetExceeded, with the excess and the largest layers, when the report is over a limit."""
    if problems := excesses(report):
        raise BudgetExceeded(
            join_problems("over budget; prune or quantise the model, or choose a smaller configuration:", problems)
        )


def excesses(report: BudgetReport) -> list[str]:
    """In words, each limit that the report is over, by how much, and the largest layers; empty when within."""
    limits, layers = report.limits, report.layers
    clip = "" if report.clip_seconds == 1 else f" in a clip of {report.clip_seconds:g} s"
    gates = (
        (
            "bytes of parameters",
            report.param_bytes,
            limits.max_param_bytes,
            "",
            {x.name: x.param_bytes for x in layers},
        ),
        ("parameters", report.params, limits.max_params, "", {x.name: x.params for x in layers}),
        ("MACs for one second of audio", report.macs, limits.max_macs, clip, {x.name: x.macs for x in layers}),
    )
    problems = [
        f"{found:,} {what}, budget is {limit:,} (over by {found - limit:,}); largest{where}: {_largest(cost)}"
        for what, found, limit, where, cost in gates
        if limit is not None and found > limit
    ]
    if limits.int8_weights and report.wide_params:
        largest = _largest({x.name: x.wide_params for x in layers if x.wide_params})
        problems.append(
            f"{report.wide_params:,} values of weights are stored in more than 8 bits, and int8 is mandatory; "
            f"largest: {largest}"
        )
    return problems


def _largest(cost: Mapping[str, int]) -> str:
    names = sorted(cost, key=cost.__getitem__, reverse=True)[:LARGEST_NAMED]
    return ", ".join(f"{name or 'the model itself'} {cost[name]:,}" for name in names)


def agree(witnesses: Mapping[str, Mapping[str, int]]) -> None:
    """Raises AumError, naming the layers, unless all witnesses counted the same MACs in every layer.

    Args:
        witnesses: name of the witness -> layer -> MACs; a layer without MACs may be absent.
    """
    (first, reference), *others = witnesses.items()
    for name, counted in others:
        pairs = {layer: (reference.get(layer, 0), counted.get(layer, 0)) for layer in reference.keys() | counted.keys()}
        problems = [
            f"{layer or 'the model itself'}: {one:,} and {two:,}"
            for layer, (one, two) in sorted(pairs.items())
            if one != two
        ]
        if problems:
            heading = f"MACs by the {first} and by the {name} differ, so neither can be believed:"
            raise AumError(join_problems(heading, problems) + "\nPlease report this with the model's configuration")
