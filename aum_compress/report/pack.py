"""What devices gain by models of their own. Torch-free."""

from aum_compress.report.content import Cell, Section, Table, figure, names, numbers
from aum_compress.report.schema import Report


def pack_section(report: Report) -> Section | None:
    """The pack of a run; None where it has none."""
    pack = report.get("devices")
    if not pack:
        return None
    rows = tuple(
        (
            Cell(model["device"]),
            Cell(f"{model['training_clips']:,}"),
            Cell(f"{model['test_clips']:,}"),
            Cell(figure(model["general_accuracy"], ".1f")),
            Cell(figure(model["accuracy"], ".1f")),
            Cell(figure(model["gain"], "+.1f")),
            Cell(figure(model["general_validation_accuracy"], ".1f")),
            Cell(figure(model["validation_accuracy"], ".1f")),
            Cell(f"{model['param_bytes']:,}"),
            Cell(f"{model['macs']:,}"),
            Cell("within" if model["within_budget"] else "over", good=model["within_budget"]),
        )
        for model in pack["models"]
    )
    columns = (
        *names("device"),
        *numbers("training clips", "test clips", "general model", "its own model", "gain"),
        *numbers("validation, general", "validation, own", "param bytes", "MACs"),
        *names("budget"),
    )
    paragraphs = (
        f"{pack['pack']} holds a model for each device below, fine-tuned from the general one, and the general one for "
        f"all other devices; the limits hold for each alone. {_whole(report)}",
        "Accuracies in % of clips, mean over classes, in onnxruntime; validation in torch, before quantisation. Gain "
        "in percentage points.",
    )
    return Section("pack", "Models of devices", paragraphs, (Table("Gain by device", columns, rows),))


def pack_lines(report: Report) -> list[str]:
    """The same in a few words, for the screen."""
    pack = report.get("devices")
    if not pack:
        return []
    gains = ", ".join(f"{model['device']} {figure(model['gain'], '+.1f')}" for model in pack["models"])
    return [f"  {pack['pack']}: {_whole(report)}", f"  gain by device: {gains}"]


def _whole(report: Report) -> str:
    test = report["devices"]["test"]
    with_pack, general = (figure(test[key]["accuracy"], ".1f") for key in ("pack", "general"))
    return f"{with_pack} % with a model for each device, {general} % with the general one."
