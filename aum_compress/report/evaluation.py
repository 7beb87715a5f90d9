"""What `evaluate` found, as lines of text. Torch-free."""

from typing import Any

from aum_compress.report.content import ABSENT, figure
from aum_compress.report.tables import aligned

_GROUPS = {
    "real": "real devices of training",
    "simulated": "simulated devices of training",
    "unseen": "devices that training has not heard",
}
_FIGURES = (False, True, True)
"""Columns that stand right: a name, its figure, its interval."""
_MOST_CLASSES = 20
"""A wider confusion matrix is for JSON."""


def evaluation_lines(found: dict[str, Any]) -> list[str]:
    """Args: found: `Evaluated.to_dict()`."""
    spans = found["intervals"]
    whole = [
        ("accuracy (mean over classes)", *_percent(found["accuracy"], spans.get("accuracy"))),
        ("accuracy over all clips", *_percent(found["overall_accuracy"], spans.get("overall_accuracy"))),
        *(
            (f"{group} devices", *_percent(found[group], spans.get(group)))
            for group in ("seen", "unseen")
            if group in found
        ),
        ("log loss", f"{figure(found['log_loss'], '.3f')} nats", _span(spans.get("log_loss"), ".3f")),
        ("calibration error (ECE)", *_percent(found["ece"], spans.get("ece"))),
    ]
    lines = [f"{found['clips']:,} clips of {found['recordings']:,} recordings", *aligned(whole, _FIGURES)]
    if found["draws"]:
        lines.append(
            f"in brackets: {found['confidence']} % intervals, bootstrap over recordings, {found['draws']:,} draws"
        )
    elif found["recordings"] < 2:
        lines.append("no intervals: they are drawn from recordings, and there is one")
    for what, key in (("class", "by_class"), ("device", "by_device")):
        if found.get(key):
            own = spans.get(key, {})
            rows = [(name or "(none)", *_percent(value, own.get(name))) for name, value in found[key].items()]
            lines += ["", f"by {what}", *("  " + line for line in aligned(rows, _FIGURES))]
    if groups := found["device_groups"]:
        own = spans.get("by_device_group", {})
        rows = [
            (f"{_GROUPS[name]}: {', '.join(groups[name])}", *_percent(value, own.get(name)))
            for name, value in found["by_device_group"].items()
        ]
        lines += ["", "by group of devices", *("  " + line for line in aligned(rows, _FIGURES))]
    return lines + _confusion_lines(found["labels"], found["confusion"])


def comparison_lines(found: dict[str, Any]) -> list[str]:
    """Args: found: `Compared.to_dict()`."""
    first, second = found["first"], found["second"]
    lines = [f"first:  {first['model']}, in {first['measured_with']}"]
    lines += [f"second: {second['model']}, in {second['measured_with']}"]
    lines += [f"{first['clips']:,} clips of {first['recordings']:,} recordings in {first['data']}", ""]
    rows = [("", "first", "second", "second - first", f"{first['confidence']} % interval", "p")]
    for name, test in found["differences"].items():
        digits = "3f" if name == "log_loss" else "1f"
        rows.append(
            (
                name.replace("_", " "),
                figure(first[name], f".{digits}"),
                figure(second[name], f".{digits}"),
                figure(test["difference"], f"+.{digits}"),
                _span(test["interval"], f"+.{digits}"),
                figure(test["p"], ".3f"),
            )
        )
    lines += aligned(rows, (False, True, True, True, True, True))
    if first["draws"]:
        drawn = f"p: two-sided, bootstrap over recordings of the paired difference, {first['draws']:,} draws"
        advice = ": rely on the bootstrap"
    else:
        drawn = "no p and no interval: they are drawn from recordings, and there is one; test on several"
        advice = ""
    return [
        *lines,
        "",
        drawn,
        f"McNemar's exact test on clips: first alone right on {found['only_first_right']:,}, second alone on "
        f"{found['only_second_right']:,}, p {figure(found['mcnemar_p'], '.3f')}; it takes clips for independent, so "
        f"where recordings have several it is too small{advice}",
    ]


def _confusion_lines(labels: list[str], confusion: list[list[int]]) -> list[str]:
    if len(labels) > _MOST_CLASSES:
        return []
    rows = [("", *(str(number) for number in range(1, len(labels) + 1)))]
    rows += [(f"{k} {label}", *map(str, row)) for k, (label, row) in enumerate(zip(labels, confusion), start=1)]
    table = aligned(rows, (False, *[True] * len(labels)))
    return ["", "confusion: true class by row, answer by column", *("  " + line for line in table)]


def _percent(value: float, span: list[float] | None) -> tuple[str, str]:
    return f"{figure(value, '.1f')} %", _span(span, ".1f")


def _span(span: list[float] | None, form: str) -> str:
    return f"[{figure(span[0], form)}, {figure(span[1], form)}]" if span else ABSENT
