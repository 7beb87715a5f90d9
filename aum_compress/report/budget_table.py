"""A budget report for people: a table by layer, and lines that say how it stands to its limits."""

from rich.table import Table

from aum_compress.budget.records import BudgetReport, LayerCost

BAR_CELLS = 10


def budget_table(report: BudgetReport, top: int | None = None) -> Table:
    """One row a layer, with its share of all bytes and of all MACs.

    Args:
        top: only this many layers, those that take most of either limit; a last row sums the others up. All layers,
            in the model's order, when left out.
    """
    seconds = "" if report.clip_seconds == 1 else f" in {report.clip_seconds:g} s"
    table = Table(show_footer=True)
    table.add_column("layer", footer="total", overflow="fold")
    table.add_column("kind")
    table.add_column("bytes", footer=f"{report.param_bytes:,}", justify="right")
    table.add_column("share", justify="left")
    table.add_column(f"MACs{seconds}", footer=f"{report.macs_per_clip:,}", justify="right")
    table.add_column("share", justify="left")
    shown = report.layers if top is None else _largest(report, top)
    for layer in shown:
        _row(table, report, layer.name or "(the model itself)", layer.kind, layer.param_bytes, layer.macs)
    if len(shown) < len(report.layers):
        named = {layer.name for layer in shown}
        others = [layer for layer in report.layers if layer.name not in named]
        param_bytes, macs = sum(layer.param_bytes for layer in others), sum(layer.macs for layer in others)
        _row(table, report, f"{len(others)} others", "", param_bytes, macs)
    return table


def budget_lines(report: BudgetReport) -> list[str]:
    """The verdict in words: both gated figures against their limits, then all that is listed apart."""
    limits = report.limits
    lines = [
        _against("param bytes", report.param_bytes, limits.max_param_bytes),
        _against("MACs per second", report.macs, limits.max_macs),
        f"MACs counted alike by: {', '.join(report.witnesses)}",
    ]
    if report.dcase_bytes is not None and report.dcase_macs is not None:
        lines.append(
            f"what DCASE's script prints: {report.dcase_bytes:,} bytes, {report.dcase_macs:,} MACs a clip (not gated)"
        )
    if report.front_end_macs is not None:
        lines.append(f"log-mel front-end: about {report.front_end_macs:,} MACs per second (outside the budget)")
    operations = ", ".join(f"{kind} {count:,}" for kind, count in report.elementwise.items())
    lines.append(f"elementwise operations a clip: {operations or 'none'} (not gated)")
    return lines + [f"note: {note}" for note in report.notes]


def _against(what: str, found: int, limit: int) -> str:
    verdict = f"OVER by {found - limit:,}" if found > limit else f"within, {limit - found:,} left"
    return f"{what}: {found:,} of {limit:,} ({found / limit:.1%}): {verdict}"


def _largest(report: BudgetReport, top: int) -> list[LayerCost]:
    def share(layer: LayerCost) -> float:
        by_bytes = layer.param_bytes / report.limits.max_param_bytes
        return max(by_bytes, layer.macs / report.clip_seconds / report.limits.max_macs)

    return sorted(report.layers, key=share, reverse=True)[:top]


def _row(table: Table, report: BudgetReport, name: str, kind: str, param_bytes: int, macs: int) -> None:
    table.add_row(
        name,
        kind,
        f"{param_bytes:,}",
        _bar(param_bytes, report.param_bytes),
        f"{macs:,}",
        _bar(macs, report.macs_per_clip),
    )


def _bar(part: int, whole: int) -> str:
    share = part / whole if whole else 0.0
    return f"{share:6.1%} {'█' * round(share * BAR_CELLS)}"
