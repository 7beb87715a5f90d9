"""Budget of a pack of models, one for each device: every model has to be within the limits on its own. Torch-free.

In DCASE 2025 Task 1 a system may use a model of its own for each recording device that it knows. Only one of them runs
at a time, so their costs do not add up: the largest model decides.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aum_compress.budget.records import BudgetReport, excesses
from aum_compress.errors import AumError, BudgetExceeded, join_problems


@dataclass(frozen=True)
class PackReport:
    """The budgets of all models of a pack, each against its limits."""

    reports: Mapping[str, BudgetReport]
    """Name of the model, such as its device -> its budget; never empty."""

    @property
    def largest_by_bytes(self) -> str:
        """Name of the model that stores most; of equals, the first."""
        return max(self.reports, key=lambda name: self.reports[name].param_bytes)

    @property
    def largest_by_macs(self) -> str:
        """Name of the model that computes most for one second of audio; of equals, the first."""
        return max(self.reports, key=lambda name: self.reports[name].macs)

    @property
    def param_bytes(self) -> int:
        """Of the model that stores most."""
        return self.reports[self.largest_by_bytes].param_bytes

    @property
    def macs(self) -> int:
        """For one second of audio, of the model that computes most; it may be another than the one of `param_bytes`."""
        return self.reports[self.largest_by_macs].macs

    @property
    def models_over(self) -> tuple[str, ...]:
        """Names of the models that are over a limit."""
        return tuple(name for name, report in self.reports.items() if report.over)

    @property
    def over(self) -> bool:
        return bool(self.models_over)

    def to_dict(self) -> dict[str, Any]:
        """As JSON: `models` holds each model's report under the keys of DESIGN section 2."""
        return {
            "verdict": "over" if self.over else "within",
            "param_bytes": self.param_bytes,
            "macs": self.macs,
            "largest_by_bytes": self.largest_by_bytes,
            "largest_by_macs": self.largest_by_macs,
            "models_over": list(self.models_over),
            "models": {name: report.to_dict() for name, report in self.reports.items()},
        }


def pack_report(reports: Mapping[str, BudgetReport]) -> PackReport:
    """The budget of a pack.

    Args:
        reports: name of each model, such as the device that it is for -> its budget.

    Raises:
        AumError: no model at all.
    """
    if not reports:
        raise AumError("budget of a pack: found no model, wanted one for each device")
    return PackReport(dict(reports))


def enforce_pack(pack: PackReport) -> None:
    """Raises BudgetExceeded, naming each model that is over a limit with its largest layers."""
    problems = [f"{name}: {problem}" for name in pack.models_over for problem in excesses(pack.reports[name])]
    if problems:
        heading = (
            f"over budget: {len(pack.models_over)} of {len(pack.reports)} models of the pack, each of which has to fit "
            "on its own; prune or quantise them, or choose a smaller configuration:"
        )
        raise BudgetExceeded(join_problems(heading, problems))
