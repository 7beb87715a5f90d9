"""Two budgets side by side: totals, and the layers that differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from aum_compress.budget.records import BudgetReport, LayerCost

ABSENT = LayerCost("", "", 0, 0, 0, {})


@dataclass(frozen=True)
class Difference:
    """One layer of two models; a layer that only one of them has costs the other nothing."""

    name: str
    before: LayerCost
    after: LayerCost

    @property
    def param_bytes(self) -> int:
        """How many more the second model stores."""
        return self.after.param_bytes - self.before.param_bytes

    @property
    def macs(self) -> int:
        """How many more the second model computes for one clip."""
        return self.after.macs - self.before.macs


def differences(before: BudgetReport, after: BudgetReport) -> list[Difference]:
    """Layers, by name, whose bytes or MACs differ; largest first, by share of the larger model's bytes or MACs."""
    old, new = ({layer.name: layer for layer in report.layers} for report in (before, after))
    pairs = [Difference(name, old.get(name, ABSENT), new.get(name, ABSENT)) for name in dict.fromkeys((*old, *new))]
    most_bytes = max(1, before.param_bytes, after.param_bytes)
    most_macs = max(1, before.macs_per_clip, after.macs_per_clip)

    def size(pair: Difference) -> float:
        return max(abs(pair.param_bytes) / most_bytes, abs(pair.macs) / most_macs)

    return sorted((pair for pair in pairs if pair.param_bytes or pair.macs), key=size, reverse=True)


def compare_table(before: BudgetReport, after: BudgetReport, top: int | None = None) -> Table:
    """One row for each layer that differs; A is the first model, B the second.

    Args:
        top: only this many rows; all when left out.
    """
    found = differences(before, after)
    table = Table(show_footer=True)
    left_out = len(found) - len(found[:top])
    table.add_column("layer", footer=f"total ({left_out} rows left out)" if left_out else "total", overflow="fold")
    for what, totals in (
        ("bytes", (before.param_bytes, after.param_bytes)),
        ("MACs", (before.macs_per_clip, after.macs_per_clip)),
    ):
        for heading, footer in zip((f"{what} A", f"{what} B", "difference"), _three(*totals)):
            table.add_column(heading, footer=footer, justify="right")
    for pair in found[:top]:
        table.add_row(
            pair.name or "(the model itself)",
            *_three(pair.before.param_bytes, pair.after.param_bytes),
            *_three(pair.before.macs, pair.after.macs),
        )
    return table


def compare_dict(before: BudgetReport, after: BudgetReport, names: Sequence[str]) -> dict[str, Any]:
    """As JSON: both reports, and what the second has more than the first."""
    return {
        "verdict": "over" if after.over else "within",
        "before": {"name": names[0], **before.to_dict()},
        "after": {"name": names[1], **after.to_dict()},
        "param_bytes_difference": after.param_bytes - before.param_bytes,
        "macs_difference": after.macs - before.macs,
        "layers": [
            {"name": pair.name, "param_bytes_difference": pair.param_bytes, "macs_difference": pair.macs}
            for pair in differences(before, after)
        ],
    }


def compare_lines(before: BudgetReport, after: BudgetReport, names: Sequence[str]) -> list[str]:
    """Totals in words, B's against its limits."""
    lines = [f"A: {names[0]}", f"B: {names[1]}"]
    for what, one, other, limit in (
        ("param bytes", before.param_bytes, after.param_bytes, after.limits.max_param_bytes),
        ("MACs per second", before.macs, after.macs, after.limits.max_macs),
    ):
        change = f" ({other / one - 1:+.1%})" if one else ""
        verdict = "" if limit is None else f"; B is {'OVER' if other > limit else 'within'} {limit:,}"
        lines.append(f"{what}: {one:,} -> {other:,}{change}{verdict}")
    if before.clip_seconds != after.clip_seconds:
        lines.append(f"note: MACs by layer are for clips of {before.clip_seconds:g} s and {after.clip_seconds:g} s")
    return lines


def _three(one: int, other: int) -> tuple[str, str, str]:
    return f"{one:,}", f"{other:,}", f"{other - one:+,}" if other != one else ""
