"""Which students fit a budget: thousands of configurations, each counted exactly, in seconds. Torch-free.

Bytes and MACs are those of `analytic_bytes` and `analytic`; what one more equal block costs is the difference between
two such counts, so that nothing is counted by a formula of its own here.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from aum_compress.budget.analytic import analytic_macs
from aum_compress.budget.analytic_bytes import Precision, analytic_stored
from aum_compress.budget.latency import estimated_ms
from aum_compress.budget.plan_space import DEPTHS, MIXERS, WIDTHS, Stem, blocks, stems, student_config
from aum_compress.budget.records import Limits, per_second
from aum_compress.errors import AumError, BudgetExceeded
from aum_compress.models.config import AudioMambaConfig, Block, ConvStem, Grid, token_grid
from aum_compress.models.presets import PRESET_FRAMES, PRESET_MELS

FULL = 0.95
"""Share of a limit from which on that limit is taken to bind."""


@dataclass(frozen=True)
class Wanted:
    """What a student has to be."""

    fewest_tokens: int = 64
    most_tokens: int = 400
    precision: Precision = "int8"
    mixers: tuple[str, ...] = ("mamba",)
    limits: Limits = field(default_factory=Limits)
    max_ms: float | None = None
    """Estimated time for one clip on one core."""
    n_mels: int = PRESET_MELS
    n_frames: int = PRESET_FRAMES
    n_classes: int = 10
    clip_seconds: float = 1.0

    def __post_init__(self) -> None:
        problems = [
            f"{name}: found {getattr(self, name)}, wanted a positive number"
            for name in ("fewest_tokens", "n_mels", "n_frames", "clip_seconds")
            if getattr(self, name) <= 0
        ]
        if self.most_tokens < self.fewest_tokens:
            problems.append(f"tokens: found {self.fewest_tokens}..{self.most_tokens}, wanted FEWEST..MOST")
        problems += [
            f"mixer: found {mixer!r}, wanted one of {', '.join(MIXERS)}" for mixer in self.mixers if mixer not in MIXERS
        ]
        if problems:
            raise AumError("budget plan: " + "; ".join(problems))


class Cost(NamedTuple):
    """Of one model, or of a part of it."""

    param_bytes: int
    params: int
    wide_params: int
    macs: int
    """For one clip."""
    ms: float
    """Estimated, for one clip."""

    def plus(self, other: "Cost", times: int = 1) -> "Cost":
        return Cost(*(mine + times * its for mine, its in zip(self, other)))


@dataclass(frozen=True)
class Student:
    """A configuration and what it costs."""

    wanted: Wanted
    stem: Stem
    d_model: int
    block: Block
    depth: int
    cost: Cost

    @property
    def grid(self) -> Grid:
        """Rows and columns of its tokens."""
        return token_grid(self.stem, self.wanted.n_mels, self.wanted.n_frames)

    @property
    def n_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def tokens_are(self) -> str:
        """patch, frame or cell."""
        return self.stem.token if isinstance(self.stem, ConvStem) else "patch"

    @property
    def macs(self) -> int:
        """For one second of audio."""
        return per_second(self.cost.macs, self.wanted.clip_seconds)

    @cached_property
    def shares(self) -> dict[str, float]:
        """Limit -> how much of it is used."""
        limits = self.wanted.limits
        found = {"MACs": self.macs / limits.max_macs}
        if limits.max_param_bytes is not None:
            found["bytes"] = self.cost.param_bytes / limits.max_param_bytes
        if limits.max_params is not None:
            found["parameters"] = self.cost.params / limits.max_params
        return found

    @property
    def binding(self) -> str:
        """The limit that the student comes closest to."""
        return max(self.shares, key=self.shares.__getitem__)

    @property
    def use(self) -> float:
        """Geometric mean of the shares of all limits: 1 where nothing of the budget is left over."""
        return math.prod(self.shares.values()) ** (1 / len(self.shares))

    @property
    def config(self) -> AudioMambaConfig:
        return _config(self.wanted, self.stem, self.d_model, self.block, self.depth)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "tokens": self.n_tokens,
            "token_grid": list(self.grid),
            "stem": self.stem.model_dump(),
            "d_model": self.d_model,
            "depth": self.depth,
            "block": self.block.model_dump(),
            "param_bytes": self.cost.param_bytes,
            "params": self.cost.params,
            "macs": self.macs,
            "estimated_ms": round(self.cost.ms, 3),
            "binding": self.binding,
            "shares": {limit: round(share, 4) for limit, share in self.shares.items()},
            "use": round(self.use, 4),
        }


SORTS: dict[str, Callable[[Student], Any]] = {
    "use": lambda student: (-student.use, student.cost.ms),
    "params": lambda student: (-student.cost.params, student.cost.ms),
    "macs": lambda student: (student.macs, -student.cost.params),
    "ms": lambda student: (student.cost.ms, -student.cost.params),
}
"""Criterion -> what is sorted by. `use`: geometric mean of the shares of all limits, largest first, which is the most
that one budget can give. `params`: most parameters first. `macs`, `ms`: fewest MACs, least time first."""


@dataclass(frozen=True)
class Plan:
    """What fits."""

    wanted: Wanted
    looked_at: int
    students: tuple[Student, ...]
    """Sorted."""

    def best_by_tokens(self) -> list[Student]:
        """The first student of each way to make tokens, by patch, frame or cell, and of each number of them."""
        found: dict[tuple, Student] = {}
        for student in self.students:
            found.setdefault((student.tokens_are, student.n_tokens), student)
        return list(found.values())

    def binding_by_tokens(self) -> dict[int, Counter[str]]:
        """Number of tokens -> limit -> students that use nearly all of that limit; fewest tokens first."""
        found: dict[int, Counter[str]] = {}
        for student in self.students:
            if student.shares[student.binding] >= FULL:
                found.setdefault(student.n_tokens, Counter())[student.binding] += 1
        return dict(sorted(found.items()))


def make_plan(wanted: Wanted, sort: str = "use") -> Plan:
    """All students of `plan_space` that fit.

    Raises:
        AumError: no such criterion.
        BudgetExceeded: nothing fits.
    """
    if sort not in SORTS:
        raise AumError(f"budget plan: sort: found {sort!r}, wanted one of {', '.join(SORTS)}")
    looked_at, fitting = 0, []
    for number, found in _families(wanted):
        looked_at += number
        fitting += found
    if not fitting:
        raise BudgetExceeded(_nothing_fits(wanted, looked_at))
    return Plan(wanted, looked_at, tuple(sorted(fitting, key=SORTS[sort])))


def first_rows(plan: Plan, top: int, every: bool) -> list[Student]:
    """The first `top` students: of all, or of the best for each way to make tokens and each number of them."""
    return list(plan.students if every else plan.best_by_tokens())[:top]


def token_range(text: str) -> tuple[int, int]:
    """FEWEST..MOST, or one number for both.

    Raises:
        AumError: anything else.
    """
    fewest, dots, most = text.partition("..")
    if not (fewest.isdecimal() and (most.isdecimal() if dots else not most)):
        raise AumError(f"tokens {text}: wanted FEWEST..MOST, such as 64..400, or one number")
    return int(fewest), int(most if dots else fewest)


def _nothing_fits(wanted: Wanted, looked_at: int) -> str:
    limits = ", ".join(f"{name} {value:,}" for name, value in wanted.limits.to_dict().items() if name != "int8_weights")
    text = (
        f"budget plan: none of {looked_at:,} configurations with {wanted.fewest_tokens}..{wanted.most_tokens} tokens "
        f"at {wanted.precision} fits: {limits}"
    )
    text += f", estimated ms {wanted.max_ms:g}" if wanted.max_ms is not None else ""
    if wanted.limits.int8_weights:
        text += (
            ", int8 for every weight of more than one axis (the state matrices of mixer mamba are stored in float16)"
        )
    return f"{text}. Allow other numbers of tokens, another mixer or precision, or raise a limit"


def _fits(wanted: Wanted, cost: Cost) -> bool:
    limits = wanted.limits
    return (
        per_second(cost.macs, wanted.clip_seconds) <= limits.max_macs
        and (limits.max_param_bytes is None or cost.param_bytes <= limits.max_param_bytes)
        and (limits.max_params is None or cost.params <= limits.max_params)
        and not (limits.int8_weights and cost.wide_params)
        and (wanted.max_ms is None or cost.ms <= wanted.max_ms)
    )


def _families(wanted: Wanted) -> Iterator[tuple[int, list[Student]]]:
    """Of students that make the same tokens of the same width: how many there are, and those that fit."""
    by_grid: dict[Grid, list[Stem]] = {}
    for stem in stems(wanted.n_mels, wanted.n_frames, wanted.fewest_tokens, wanted.most_tokens):
        by_grid.setdefault(token_grid(stem, wanted.n_mels, wanted.n_frames), []).append(stem)
    for grid_stems in by_grid.values():
        for d_model in WIDTHS:
            for mixer in wanted.mixers:
                yield _family(wanted, grid_stems, d_model, list(blocks(mixer, d_model)))


def _family(wanted: Wanted, alike: list[Stem], d_model: int, choices: list[Block]) -> tuple[int, list[Student]]:
    """Every one of the stems, which make the same tokens, with every one of the blocks at every depth."""
    # what a block costs depends on its tokens, not on who made them; what is around it depends on no block
    one, two = (_cost(wanted, alike[0], d_model, choices[0], depth) for depth in (1, 2))
    around = one.plus(two.plus(one, -1), -1)
    each = [_cost(wanted, alike[0], d_model, block, 1).plus(around, -1) for block in choices]
    fitting = []
    for stem in alike:
        rest = _cost(wanted, stem, d_model, choices[0], 1).plus(each[0], -1)
        for block, more in zip(choices, each):
            for depth in DEPTHS:
                cost = rest.plus(more, depth)
                if not _fits(wanted, cost):  # nor does any deeper one
                    break
                fitting.append(Student(wanted, stem, d_model, block, depth, cost))
    return len(alike) * len(choices) * len(DEPTHS), fitting


def _config(wanted: Wanted, stem: Stem, d_model: int, block: Block, depth: int) -> AudioMambaConfig:
    sizes = {"n_mels": wanted.n_mels, "n_frames": wanted.n_frames, "n_classes": wanted.n_classes}
    return student_config(stem, d_model, block, depth, **sizes)


def _cost(wanted: Wanted, stem: Stem, d_model: int, block: Block, depth: int) -> Cost:
    config = _config(wanted, stem, d_model, block, depth)
    stored = analytic_stored(config, wanted.precision, every_weight=wanted.limits.int8_weights).values()
    return Cost(
        sum(layer.param_bytes for layer in stored),
        sum(layer.params for layer in stored),
        sum(layer.wide_params for layer in stored),
        sum(analytic_macs(config).values()),
        estimated_ms(config),
    )
