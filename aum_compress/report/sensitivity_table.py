"""What quantising each tensor costs, for people. Torch-free."""

from typing import Any

from rich.table import Table
from rich.text import Text

REST = "everything else"


def sensitivity_table(found: dict[str, Any]) -> Table:
    """Most harmful first. Args: found: `Sensitivity.to_dict()`."""
    table = Table(header_style="bold")
    for title, right in (("tensor", False), ("what", False), ("as", False), ("values", True), ("SQNR, dB", True)):
        table.add_column(title, justify="right" if right else "left", no_wrap=True)
    table.add_column("accuracy drop", justify="right", no_wrap=True)
    for cost in sorted(found["costs"], key=lambda cost: cost["sqnr_db"]):
        table.add_row(
            Text(cost["tensor"]),
            cost["what"],
            cost["storage"],
            f"{cost['values']:,}" if cost["values"] else "",
            f"{cost['sqnr_db']:.1f}",
            f"{cost['accuracy_drop']:+.2f}",
        )
    return table


def sensitivity_lines(found: dict[str, Any]) -> list[str]:
    """On what that was measured, and where to begin."""
    worst = min(found["costs"], key=lambda cost: cost["sqnr_db"])
    return [
        f"each tensor quantised alone, on {found['clips']} {found['part']} clips; float32: "
        f"{found['float_accuracy']:.2f} %",
        "SQNR: energy of the logits over that of their error. Drop: points of macro accuracy; below 0 it rose",
        f"most harmful: {worst['what']} of {worst['tensor']} as {worst['storage']}"
        + ("" if worst["tensor"] == REST else f"; quantize.keep_float: [{worst['tensor']}] keeps it in float16"),
    ]
