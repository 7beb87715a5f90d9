"""The report's section on quantisation: what is stored how, and what a CPU without VNNI makes of it. Torch-free."""

from collections import Counter

from aum_compress.report.content import Cell, Section, Table, figure, names, numbers
from aum_compress.report.schema import Quantisation, Report

STORED = {
    "int8": "int8 weights, uint8 inputs",
    "int8-smooth": "int8 weights, uint8 inputs smoothed by a factor a channel",
    "int8-weight": "int8 weights, float32 inputs",
    "int4-weight": "int4 weights, float32 inputs",
    "uint8": "uint8 inputs of a scan",
}


def quantisation_section(report: Report) -> Section | None:
    """None where nothing was quantised, and for reports from before there was this section."""
    if (found := report.get("quantisation")) is None:
        return None
    counts = Counter(found["layers"].values())
    rows = tuple((Cell(STORED.get(storage, storage)), Cell(f"{count}")) for storage, count in counts.items())
    table = Table("Layers", (*names("stored as"), *numbers("layers")), rows)
    text = (
        f"SQNR of the logits against float32: {figure(found['sqnr_db'], '.1f')} dB. What is not listed is float16; "
        "scans run in float32."
    )
    paragraphs = [text, saturation_line(found)]
    if searched := found["search"]:
        undone = ", ".join(searched["rolled_back"])
        paragraphs.append(
            f"The mixture was searched for: {searched['param_bytes']:,} bytes, {searched['accuracy_drop']:+.2f} points "
            f"lost on {searched['clips']} {searched['part']} clips" + (f"; rolled back: {undone}." if undone else ".")
        )
    return Section("quantisation", "Quantisation", tuple(paragraphs), (table,))


def saturation_line(found: Quantisation) -> str:
    """Whether int8 kernels of x86 CPUs without VNNI give the same."""
    if not {"int8", "int8-smooth"} & set(found["layers"].values()):
        return "No layer multiplies integers, so nothing can saturate on CPUs without VNNI."
    if pairs := found["saturating_pairs"]:
        return (
            f"{pairs:,} pairs of weights can leave 16 bits: on x86 CPUs without VNNI, int8 kernels saturate there and "
            "logits are wrong. VNNI and ARM compute them right; quantize.weight_bits: 7 avoids it everywhere."
        )
    return (
        f"Weights of {found['weight_bits']} bits: no sum of two products leaves 16 bits, so int8 kernels of x86 CPUs "
        "without VNNI cannot saturate."
    )
