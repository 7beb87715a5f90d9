"""Students that fit a budget, for people."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from aum_compress.budget.plan import FULL, Plan, Student
from aum_compress.models.config import ConvStem


def plan_table(students: Sequence[Student]) -> Table:
    """One row a student, numbered from 1."""
    table = Table()
    right = ("#", "tokens", "d_model", "depth", "d_inner", "d_state", "param bytes", "MACs/s", "est. ms", "use")
    for heading in ("#", "tokens", "tokens are", "stem channels", "d_model", "depth", "block", "d_inner", "d_state"):
        table.add_column(heading, justify="right" if heading in right else "left")
    for heading in ("param bytes", "MACs/s", "binds", "use", "est. ms"):
        table.add_column(heading, justify="right" if heading in right else "left")
    for number, student in enumerate(students, start=1):
        rows, columns = student.grid
        stem, block = student.stem, student.block
        channels = " ".join(str(stage.channels) for stage in stem.stages) if isinstance(stem, ConvStem) else ""
        patch = "" if isinstance(stem, ConvStem) else f"{stem.patch_mels}x{stem.patch_frames} "
        table.add_row(
            str(number),
            str(student.n_tokens),
            f"{patch}{student.tokens_are} {rows}x{columns}",
            channels,
            str(student.d_model),
            str(student.depth),
            _block(student),
            str(block.d_inner),
            str(getattr(block, "d_state", "")),
            f"{student.cost.param_bytes:,}",
            f"{student.macs:,}",
            f"{student.binding} {student.shares[student.binding]:.1%}",
            f"{student.use:.1%}",
            f"{student.cost.ms:.1f}",
        )
    return table


def plan_lines(plan: Plan, shown: int) -> list[str]:
    """How many fit, and which limit binds at which number of tokens."""
    lines = [f"{len(plan.students):,} of {plan.looked_at:,} configurations fit; {shown} shown"]
    binding = plan.binding_by_tokens()
    for limit in ("bytes", "parameters", "MACs"):
        alone = [str(tokens) for tokens, counts in binding.items() if counts.most_common(1)[0][0] == limit]
        if alone:
            lines.append(f"{limit} bind most students that use {FULL:.0%} of a limit at {', '.join(alone)} tokens")
    lines.append(
        "use: geometric mean of the shares of all limits; est. ms: one clip, fp32 file, one x86 core, an "
        "estimate (docs/budgets.md)"
    )
    return lines


def plan_dict(plan: Plan, rows: Sequence[Student]) -> dict[str, Any]:
    """As JSON: what was wanted, how many fit, and the rows."""
    wanted = vars(plan.wanted) | {"mixers": list(plan.wanted.mixers), "limits": plan.wanted.limits.to_dict()}
    return {
        "wanted": wanted,
        "looked_at": plan.looked_at,
        "fitting": len(plan.students),
        "binding_by_tokens": {tokens: dict(counts) for tokens, counts in plan.binding_by_tokens().items()},
        "students": [student.to_dict() for student in rows],
    }


def _block(student: Student) -> str:
    block = student.block
    if block.mixer == "mamba":
        return f"mamba {block.block_type}"
    if block.mixer == "mamba2":
        return f"mamba2 {'two' if block.two_way else 'one'}-way"
    return f"conv {block.d_conv} taps"
