"""What quantising costs, layer by layer. Torch-free."""

from aum_compress.report.content import Cell, Section, Table, figure, names, numbers
from aum_compress.report.schema import Report


def signal_section(report: Report) -> Section | None:
    """The quantised layers, the one that loses most first; None where nothing was quantised."""
    layers = report.get("signal")
    if not layers:
        return None
    known = [layer for layer in layers if layer["output_sqnr_db"] is not None]
    exact = [layer for layer in layers if layer["output_sqnr_db"] is None]
    rows = tuple(
        (
            Cell(layer["name"]),
            Cell(figure(layer["output_sqnr_db"], ".1f")),
            Cell(figure(layer["weight_sqnr_db"], ".1f")),
        )
        for layer in [*sorted(known, key=lambda layer: layer["output_sqnr_db"]), *exact]
    )
    columns = (*names("layer"), *numbers("SQNR of its output, dB", "SQNR of its weights, dB"))
    text = (
        "Signal over quantisation noise against the float model, on training clips: 20 dB are an error of a tenth, 40 "
        "dB of a hundredth. An output has the errors of all layers before it in it."
    )
    return Section("signal", "What quantising costs", (text,), (Table("Quantised layers", columns, rows),))
