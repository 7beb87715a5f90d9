"""A report's figures as sections and tables, in the order in which they are read. Torch-free."""

from collections.abc import Iterator

from aum_compress.report.confusion import confusion_section
from aum_compress.report.content import Cell, Section, Table, figure, names, numbers, percent, portion, share
from aum_compress.report.pack import pack_section
from aum_compress.report.published import PublishedSystem, published_for
from aum_compress.report.quantisation import quantisation_section
from aum_compress.report.schema import FileCheck, Layer, Report, RoadStep
from aum_compress.report.signal import signal_section
from aum_compress.report.trade_off import Contender, trade_off
from aum_compress.report.verdict import shipped_step, step_budget, verified_cell

MOST_LAYERS = 12
"""Rows of the layer table; the rest is one row. report.json has them all."""

MEASURE = "Accuracy: % of test clips, mean over classes."


def sections(report: Report) -> list[Section]:
    """All that there is to say; a part without figures (no devices, nothing trained, nothing verified) is left out."""
    made = (
        *(_road, _trade_off, _budget, _layers, _devices, pack_section, _classes, _confusion, _training, _pruning),
        *(quantisation_section, signal_section, _verification, _provenance),
    )
    return [section for make in made if (section := make(report)) is not None]


def _road(report: Report) -> Section | None:
    if not report["road"]:
        return None
    accuracy, cost = [], []
    for step in report["road"]:
        test, title = step["test"], Cell(step["title"])
        accuracy.append(
            (
                title,
                Cell(f"{step['precision']} {step['measured_with']}"),
                percent(test["accuracy"]),
                Cell(figure(test.get("seen"), ".1f")),
                Cell(figure(test.get("unseen"), ".1f")),
                Cell(figure(test["overall_accuracy"], ".1f")),
                Cell(figure(test["log_loss"], ".3f")),
                Cell(figure(test.get("ece"), ".1f")),
                Cell(figure(step["validation_accuracy"], ".1f")),
            )
        )
        cost.append(
            (
                title,
                Cell(step["precision"]),
                Cell(f"{step['params']:,}"),
                Cell(f"{step['param_bytes']:,}"),
                Cell(f"{step['macs']:,}"),
                step_budget(report, step),
                Cell(latency_text(step)),
                Cell(step["file"] or figure(None)),
                Cell(figure(step["file_bytes"])),
            )
        )
    columns = (
        *names("model", "run as"),
        *numbers("accuracy", "seen devices", "unseen devices", "over all clips", "log loss", "ECE", "validation"),
    )
    cost_columns = (
        *names("model", "precision"),
        *numbers("parameters", "param bytes", "MACs"),
        *names("budget"),
        *numbers("ms a clip"),
        *names("file"),
        *numbers("file bytes"),
    )
    data = report["data"]
    paragraphs = (
        f"{MEASURE} The {data['test']:,} test clips chose nothing: where an epoch was chosen, it was on "
        f"{data['validation']:,} validation clips. Over all clips: share of right answers, whatever the class. "
        "Log loss in nats. MACs for one second of audio.",
        *_latencies(report),
    )
    tables = (Table("Accuracy", columns, tuple(accuracy)), Table("Cost", cost_columns, tuple(cost)))
    return Section("road", "From teacher to shipped file", paragraphs, tables)


def latency_text(step: RoadStep) -> str:
    """Milliseconds for one clip, and the word where they are an estimate."""
    text = figure(step.get("latency_ms"), ".2f")
    return f"{text} (estimated)" if step.get("latency_is") == "estimated" else text


def _latencies(report: Report) -> Iterator[str]:
    """How the times were come by."""
    kinds = {step.get("latency_is") for step in report["road"]}
    if "measured" in kinds:
        yield (
            "Milliseconds of files were measured in onnxruntime, one clip at a time on one thread "
            f"({report['machine']}); the machine may have done other work."
        )
    if "estimated" in kinds:
        yield "Estimated ones are for an fp32 file on one x86 core, from the configuration alone (docs/budgets.md)."


def contenders(report: Report) -> list[Contender]:
    """The models of the road."""
    shipped = shipped_step(report)
    return [
        Contender(step["title"], step["test"]["accuracy"], step["param_bytes"], step["macs"], shipped=step is shipped)
        for step in report["road"]
    ]


def published(report: Report) -> tuple[PublishedSystem, ...]:
    """Systems that were tested on the run's data set."""
    return published_for(report["data"]["kind"], report["data"]["labels"])


def _trade_off(report: Report) -> Section | None:
    return trade_off(contenders(report), published(report))


def _confusion(report: Report) -> Section | None:
    counted = [step for step in report["road"] if step["test"].get("confusion")]
    step = shipped_step(report)
    return confusion_section(step if step in counted else counted[-1] if counted else None, report["data"]["labels"])


def _budget(report: Report) -> Section | None:
    if (budget := report["budget"]) is None:
        return None
    limits = budget["limits"]
    gates = tuple(
        (
            Cell(title),
            Cell(f"{found:,}"),
            Cell(f"{limit:,}"),
            share(found, limit, good=found <= limit),
            Cell("within" if found <= limit else "over", good=found <= limit),
        )
        for title, found, limit in (
            ("param bytes", budget["param_bytes"], limits["max_param_bytes"]),
            ("MACs for one second of audio", budget["macs"], limits["max_macs"]),
        )
    )
    beside = (
        ("param bytes, what DCASE's script prints", budget["dcase_bytes"]),
        ("MACs, what DCASE's script prints (it ignores the length of a Linear and sees no scan)", budget["dcase_macs"]),
        (f"MACs for one clip of {budget['clip_seconds']:g} s", budget["macs_per_clip"]),
        ("MACs of the log-mel front-end, one second", budget["front_end_macs"]),
        *((f"elementwise results for one clip: {name}", count) for name, count in budget["elementwise"].items()),
    )
    counted = f"MACs of {report['gated']} counted by: {', '.join(budget['witnesses'])}."
    paragraphs = (counted + " All agree, layer by layer." * (len(budget["witnesses"]) > 1), *budget["notes"])
    tables = (
        Table("Limits", (*names("what"), *numbers("found", "limit", "used"), *names("verdict")), gates),
        Table(
            "Beside the budget, not gated",
            (*names("what"), *numbers("found")),
            tuple((Cell(title), Cell(figure(value))) for title, value in beside),
        ),
    )
    return Section("budget", "Budget", paragraphs, tables)


def _layers(report: Report) -> Section | None:
    budget = report["budget"]
    if budget is None or not (layers := budget["layers"]):
        return None
    whole = {key: sum(layer[key] for layer in layers) for key in ("param_bytes", "macs")}

    def largest_share(layer: Layer) -> float:
        return max(layer[key] / total if total else 0 for key, total in whole.items())

    ranked = sorted(layers, key=largest_share, reverse=True)
    shown, rest = ranked[:MOST_LAYERS], ranked[MOST_LAYERS:]
    if rest:
        sums = {key: sum(layer[key] for layer in rest) for key in ("params", *whole)}
        shown.append({"name": f"{len(rest)} smaller layers", "kind": "", "elementwise": {}, **sums})
    rows = tuple(
        (
            Cell(layer["name"] or "the model itself"),
            Cell(f"{layer['param_bytes']:,}"),
            share(layer["param_bytes"], whole["param_bytes"]),
            Cell(f"{layer['macs']:,}"),
            share(layer["macs"], whole["macs"]),
            Cell(f"{layer['params']:,}"),
            Cell(layer["kind"]),
        )
        for layer in shown
    )
    columns = (
        *names("layer"),
        *numbers("param bytes", "of all bytes", "MACs", "of all MACs", "parameters"),
        *names("kind"),
    )
    text = f"Of {report['gated']}, for one clip of {budget['clip_seconds']:g} s, largest share of bytes or MACs first."
    return Section("layers", "Where bytes and MACs go", (text,), (Table("Layers", columns, rows),))


def _devices(report: Report) -> Section | None:
    groups = {name: "seen" for name in report["data"]["seen_devices"]}
    groups |= {name: "unseen" for name in report["data"]["unseen_devices"]}
    table = _by(report, "by_device", "Devices", "device", groups)
    grouped = _by(report, "by_device_group", "Groups of devices", "group", None)
    return table and Section("devices", "By recording device", (MEASURE,), (table, *([grouped] if grouped else ())))


def _classes(report: Report) -> Section | None:
    table = _by(report, "by_class", "Classes", "class", None)
    return table and Section("classes", "By class", ("Accuracy: % of the class's test clips.",), (table,))


def _by(report: Report, key: str, title: str, what: str, groups: dict[str, str] | None) -> Table | None:
    """One row a device or class, one column a model; bars for the model that ships."""
    shipped = shipped_step(report)
    steps = [step for step in report["road"] if step["test"].get(key)]
    if not steps:
        return None
    found = dict.fromkeys(name for step in steps for name in step["test"][key])

    def cell(step: RoadStep, name: str) -> Cell:
        made = percent(step["test"][key].get(name))
        return made if step is shipped else Cell(made.text)

    rows = tuple(
        (
            Cell(name or "(none)"),
            *([Cell(groups.get(name, figure(None)))] if groups is not None else []),
            *(cell(step, name) for step in steps),
        )
        for name in found
    )
    first = names(what, "in training") if groups is not None else names(what)
    return Table(title, (*first, *numbers(*(step["title"] for step in steps))), rows)


def _training(report: Report) -> Section | None:
    rows = []
    for name, epochs in report["training"].items():
        scored = [epoch for epoch in epochs if epoch["val_accuracy"] is not None]
        if not epochs:
            continue
        best = max(scored, key=lambda epoch: epoch["val_accuracy"], default=None)
        rows.append(
            (
                Cell(name),
                Cell(f"{len(epochs)}"),
                Cell(figure(best and best["epoch"])),
                Cell(figure(best and best["val_accuracy"], ".1f")),
                Cell(figure(best and best["val_loss"], ".3f")),
                Cell(figure(epochs[-1]["train_loss"], ".3f")),
                Cell(figure(epochs[-1]["val_loss"], ".3f")),
            )
        )
    if not rows:
        return None
    columns = (
        *names("run"),
        *numbers("epochs", "best epoch", "its accuracy", "its loss", "last training loss", "last validation loss"),
    )
    text = (
        "Accuracy in % on the validation clips, which choose the epoch where not the last one is kept; loss as each "
        "run minimises it."
    )
    return Section("training", "Training", (text,), (Table("Runs", columns, tuple(rows)),))


def _pruning(report: Report) -> Section | None:
    if not report["pruning"]:
        return None
    rows = []
    for number, step in enumerate(report["pruning"], start=1):
        # reports of older runs have the inner widths alone
        kinds = step.get("kinds") or {"d_inner": (sum(step["before"]), sum(step["after"]))}
        rows.append(
            (
                Cell(f"{number}"),
                Cell(", ".join(f"{kind} {before:,} → {after:,}" for kind, (before, after) in kinds.items())),
                Cell(", ".join(map(str, step["after"]))),
                Cell(figure(step.get("param_bytes", (None, None))[1])),
                Cell(figure(step.get("macs", (None, None))[1])),
                Cell(figure(step.get("validation_accuracy"), ".1f")),
            )
        )
    columns = (
        *numbers("step"),
        *names("what gave way", "d_inner of each block behind it"),
        *numbers("param bytes", "MACs", "validation accuracy"),
    )
    text = (
        "Sizes are summed over blocks and stages; bytes are those of the file that ships; accuracy, in %, is that "
        "behind the step's fine-tuning."
    )
    return Section("pruning", "Pruning", (text,), (Table("Steps", columns, tuple(rows)),))


def _verification(report: Report) -> Section | None:
    if not report["verification"]:
        return None
    rows = []
    for name, found in report["verification"].items():
        checks = found["checks"]
        rows.append(
            (
                Cell(name),
                verified_cell(report, name),
                Cell(f"{sum(check['passed'] for check in checks)} of {len(checks)}"),
                Cell(figure(found["max_abs_error"], ".2g")),
                Cell(figure(min(_known(checks, "sqnr_db"), default=None), ".1f")),
                Cell(portion(min(_known(checks, "agreement"), default=None))),
                Cell(found["reference"]),
            )
        )
    columns = (
        *names("file", "verdict"),
        *numbers("checks passed", "largest error", "lowest SQNR, dB", "lowest same class"),
        *names("compared with"),
    )
    warnings = (f"{name}: {text}" for name, found in report["verification"].items() for text in found["warnings"])
    text = "Each file was run in onnxruntime, as written and optimised. Errors are differences of logits."
    tables = (Table("Files", columns, tuple(rows)), *_checks(report))
    return Section("verification", "Does each file compute the same?", (text, *warnings), tables)


def _known(checks: list[FileCheck], key: str) -> list[float]:
    return [check[key] for check in checks if check[key] is not None]


def _checks(report: Report) -> Iterator[Table]:
    columns = (
        *names("check", "graph", "verdict"),
        *numbers("inputs", "largest error", "SQNR, dB", "same class"),
        *names("reason"),
    )
    for name, found in report["verification"].items():
        rows = tuple(
            (
                Cell(check["name"]),
                Cell({None: figure(None), False: "as written", True: "optimised"}[check["optimised"]]),
                Cell("ok" if check["passed"] else "FAILED", good=check["passed"]),
                Cell(figure(check["n_inputs"])),
                Cell(figure(check["max_abs_error"], ".2g")),
                Cell(figure(check["sqnr_db"], ".1f")),
                Cell(portion(check["agreement"])),
                Cell(check["reason"]),
            )
            for check in found["checks"]
        )
        yield Table(f"All checks of {name}", columns, rows, folded=True)


def _provenance(report: Report) -> Section:
    data, spec = report["data"], report["input"]
    facts: dict[str, str] = {
        "recipe": report["recipe"],
        "made": report["created"],
        "seed": str(report["seed"]),
        "data": f"{data['kind']}, clips of {data['clip_seconds']:g} s: {data['train']:,} training, "
        f"{data['validation']:,} validation, {data['test']:,} test",
        "labels": ", ".join(data["labels"]),
        "devices in training": ", ".join(data["seen_devices"]) or figure(None),
        "devices only in test": ", ".join(data["unseen_devices"]) or figure(None),
        "normalisation of the log-mel": f"mean {spec['mean']:g}, standard deviation {spec['std']:g}",
        **{f"front-end {key}": str(value) for key, value in spec["front_end"].items() if value is not None},
        **{f"version of {key}": value for key, value in report["versions"].items()},
    }
    rows = tuple((Cell(key), Cell(value)) for key, value in facts.items())
    return Section("provenance", "How it was made", (), (Table("Facts", names("what", "value"), rows),))
