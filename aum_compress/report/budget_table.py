"""A budget report for people: a table by layer, and lines that say how it stands to its limits."""

from collections.abc import Mapping

from rich.table import Table

from aum_compress.budget.pack import PackReport
from aum_compress.budget.records import BudgetReport, LayerCost

BAR_CELLS = 10


def budget_table(report: BudgetReport, top: int | None = None) -> Table:
    """One row a layer, with its share of all bytes and of all MACs.

    Args:
        top: only this many layers, those with the largest share of either; a last row sums the others up. All layers,
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


def parts_table(parts: Mapping[str, int]) -> Table:
    """One row a part of a file (`budget.onnx_parts`), with its share."""
    whole = sum(parts.values())
    table = Table(show_footer=True)
    table.add_column("part of the file", footer="total", overflow="fold")
    table.add_column("bytes", footer=f"{whole:,}", justify="right")
    table.add_column("share")
    for name, count in parts.items():
        table.add_row(name, f"{count:,}", _bar(count, whole))
    return table


def pack_table(pack: PackReport) -> Table:
    """One row a model of a pack, with its share of each limit."""
    table = Table()
    table.add_column("model", overflow="fold")
    for heading in ("bytes", "MACs per second"):
        table.add_column(heading, justify="right")
        table.add_column("of limit", justify="right")
    table.add_column("verdict")
    for name, report in pack.reports.items():
        limits = report.limits
        table.add_row(
            name,
            f"{report.param_bytes:,}",
            _percent(report.param_bytes, limits.max_param_bytes),
            f"{report.macs:,}",
            _percent(report.macs, limits.max_macs),
            "OVER" if report.over else "within",
        )
    return table


def pack_lines(pack: PackReport) -> list[str]:
    """The verdict on a pack in words."""
    over = f"OVER: {', '.join(pack.models_over)}" if pack.over else "within: every model fits on its own"
    return [
        f"largest by bytes: {pack.largest_by_bytes}, {pack.param_bytes:,}",
        f"largest by MACs per second: {pack.largest_by_macs}, {pack.macs:,}",
        over,
    ]


def budget_lines(report: BudgetReport) -> list[str]:
    """The verdict in words: the gated figures against their limits, then all that is listed apart."""
    limits = report.limits
    lines = [
        _against("param bytes", report.param_bytes, limits.max_param_bytes),
        _against("MACs per second", report.macs, limits.max_macs),
    ]
    if limits.max_params is not None:
        lines.insert(1, _against("parameters", report.params, limits.max_params))
    if limits.int8_weights:
        wide = report.wide_params
        lines.append(
            f"weights stored in more than 8 bits: {wide:,} values: {'OVER, none may be' if wide else 'within'}"
        )
    lines.append(f"MACs counted alike by: {', '.join(report.witnesses)}")
    if report.dcase_bytes is not None and report.dcase_macs is not None:
        lines.append(
            f"what DCASE's script prints: {report.dcase_bytes:,} bytes, {report.dcase_macs:,} MACs a clip (not gated)"
        )
    if report.peak_activation_bytes is not None:
        lines.append(f"peak activations: {report.peak_activation_bytes:,} bytes alive at once (not gated)")
    if report.file_bytes is not None:
        lines.append(f"file: {report.file_bytes:,} bytes (not gated)")
    if report.front_end_bytes is not None:
        lines.append(
            f"front-end inside the file: {report.front_end_macs:,} MACs per second, {report.front_end_bytes:,} bytes "
            "(outside the budget)"
        )
    elif report.front_end_macs is not None:
        lines.append(f"log-mel front-end: about {report.front_end_macs:,} MACs per second (outside the budget)")
    operations = ", ".join(f"{kind} {count:,}" for kind, count in report.elementwise.items())
    lines.append(f"elementwise operations a clip: {operations or 'none'} (not gated)")
    return lines + [f"note: {note}" for note in report.notes]


def _against(what: str, found: int, limit: int | None) -> str:
    if limit is None:
        return f"{what}: {found:,} (not limited)"
    verdict = f"OVER by {found - limit:,}" if found > limit else f"within, {limit - found:,} left"
    return f"{what}: {found:,} of {limit:,} ({found / limit:.1%}): {verdict}"


def _percent(found: int, limit: int | None) -> str:
    return "" if limit is None else f"{found / limit:.1%}"


def _largest(report: BudgetReport, top: int) -> list[LayerCost]:
    """By the larger of a layer's shares of the model's own bytes and MACs."""

    def share(layer: LayerCost) -> float:
        by_bytes = layer.param_bytes / max(1, report.param_bytes)
        return max(by_bytes, layer.macs / max(1, report.macs_per_clip))

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
