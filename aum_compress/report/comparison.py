"""Several models side by side, from whatever runs they are: the same forms as a run's report. Torch-free."""

from collections.abc import Sequence

# typing's own TypedDict is checked by pydantic only from Python 3.12 on
from typing_extensions import TypedDict

from aum_compress.report.confusion import confusion_section
from aum_compress.report.content import Cell, Section, Table, Verdict, figure, names, numbers, percent
from aum_compress.report.published import PublishedSystem, published_for
from aum_compress.report.schema import Layer, RoadStep
from aum_compress.report.sections import latency_text
from aum_compress.report.trade_off import Contender, trade_off

COMPARISON_SCHEMA = 1


class ComparedModel(TypedDict):
    """One model, as its own report or bundle has it."""

    name: str
    source: str
    """The folder, as it was named."""
    recipe: str
    created: str
    seed: int
    data_kind: str
    """Of the recipe; empty where it is not known."""
    labels: list[str]
    step: RoadStep
    verified: bool | None
    """None where nothing was looked at."""
    layers: list[Layer]
    max_param_bytes: int | None
    max_macs: int | None


class Comparison(TypedDict):
    """`report.json` of several models."""

    comparison_version: int
    created: str
    models: list[ComparedModel]


def comparison_verdict(found: Comparison) -> Verdict:
    """Which is best at what; bad where a model is over its limits or failed its verification."""
    models = found["models"]
    apart = _not_comparable(models)
    best = max(models, key=lambda one: one["step"]["test"]["accuracy"])
    smallest = min(models, key=lambda one: one["step"]["param_bytes"])
    cheapest = min(models, key=lambda one: one["step"]["macs"])
    over = [one["name"] for one in models if not one["step"]["within_budget"]]
    failed = [one["name"] for one in models if one["verified"] is False]
    facts = [] if apart else [f"most accurate: {best['name']}, {figure(best['step']['test']['accuracy'], '.1f')} %"]
    facts += [
        f"fewest bytes: {smallest['name']}, {smallest['step']['param_bytes']:,}",
        f"fewest MACs: {cheapest['name']}, {cheapest['step']['macs']:,} for one second of audio",
    ]
    if over:
        facts.append(f"over their limits: {', '.join(over)}")
    if failed:
        facts.append(f"failed their verification: {', '.join(failed)}")
    if apart:
        facts.append(apart)
    good = None if over or apart else True
    return Verdict(False if failed else good, f"{len(models)} models side by side", tuple(facts))


def comparison_sections(found: Comparison) -> list[Section]:
    """All that can be said of every one of them."""
    models = found["models"]
    made = [
        _figures(models),
        trade_off(compared_contenders(found), compared_published(found)),
        _each(models, "by_device", "devices", "By recording device", "device"),
        _each(models, "by_class", "classes", "By class", "class"),
        *(_confusion(place, one) for place, one in enumerate(models)),
        _layers(models),
        _sources(models),
    ]
    return [section for section in made if section is not None]


def compared_contenders(found: Comparison) -> list[Contender]:
    """Their points in the charts."""
    return [
        Contender(one["name"], one["step"]["test"]["accuracy"], one["step"]["param_bytes"], one["step"]["macs"])
        for one in found["models"]
    ]


def compared_published(found: Comparison) -> tuple[PublishedSystem, ...]:
    """Published systems, where all models were tested on their data set."""
    sets = [published_for(one["data_kind"], one["labels"]) for one in found["models"]]
    return sets[0] if all(sets) else ()


def compared_limits(found: Comparison) -> tuple[int | None, int | None]:
    """On bytes and MACs, where all models have the same."""
    bounds = {(one["max_param_bytes"], one["max_macs"]) for one in found["models"]}
    return bounds.pop() if len(bounds) == 1 else (None, None)


def _not_comparable(models: Sequence[ComparedModel]) -> str:
    """In words, where the test clips differ; what some of the models do not say, as older reports, tells nothing."""
    tests = [one["step"]["test"] for one in models]
    said = {
        "labels": {tuple(one["labels"]) for one in models},
        "numbers of clips": {test["clips"] for test in tests},
        "kinds of data": {one["data_kind"] for one in models} - {""},
        "clips": {test["clips_sha256"] for test in tests if "clips_sha256" in test},
    }
    different = [what for what, found in said.items() if len(found) > 1]
    return f"tested on different data ({', '.join(different)}): accuracies do not compare" if different else ""


def _figures(models: Sequence[ComparedModel]) -> Section:
    rows = []
    for one in models:
        step, test = one["step"], one["step"]["test"]
        verified = {None: "not looked at", True: "verified", False: "FAILED"}[one["verified"]]
        rows.append(
            (
                Cell(one["name"]),
                Cell(f"{step['precision']} {step['measured_with']}"),
                percent(test["accuracy"]),
                *(Cell(figure(test.get(key), ".1f")) for key in ("seen", "unseen")),
                Cell(figure(test["log_loss"], ".3f")),
                Cell(figure(test.get("ece"), ".1f")),
                *(Cell(f"{step[key]:,}") for key in ("params", "param_bytes", "macs")),
                Cell("within" if step["within_budget"] else "over", good=step["within_budget"]),
                Cell(latency_text(step)),
                Cell(figure(step["file_bytes"])),
                Cell(verified, good=one["verified"]),
            )
        )
    columns = (
        *names("model", "run as"),
        *numbers("accuracy", "seen devices", "unseen devices", "log loss", "ECE"),
        *numbers("parameters", "param bytes", "MACs"),
        *names("budget"),
        *numbers("ms a clip", "file bytes"),
        *names("verification"),
    )
    text = (
        "Accuracy: % of test clips, mean over classes. Log loss in nats. MACs for one second of audio. Milliseconds of "
        "files were measured, each on its own machine; those of bundles are estimates (docs/budgets.md)."
    )
    return Section("models", "The models", (text,), (Table("Figures", columns, tuple(rows)),))


def _each(models: Sequence[ComparedModel], key: str, anchor: str, title: str, what: str) -> Section | None:
    """One row a device or class, one column a model."""
    tests = [one["step"]["test"].get(key) or {} for one in models]
    found = dict.fromkeys(name for test in tests for name in test)
    if not found:
        return None
    rows = tuple((Cell(name or "(none)"), *(percent(test.get(name)) for test in tests)) for name in found)
    columns = (*names(what), *numbers(*(one["name"] for one in models)))
    return Section(anchor, title, ("Accuracy: % of test clips.",), (Table(title, columns, rows),))


def _confusion(place: int, one: ComparedModel) -> Section | None:
    section = confusion_section(one["step"], one["labels"])
    if section is None:
        return None
    return Section(f"confusion-{place}", f"What {one['name']} takes for what", section.paragraphs, section.tables)


def _layers(models: Sequence[ComparedModel]) -> Section | None:
    """Bytes and MACs of each layer by its name; where models differ, a dash."""
    by_name = [{layer["name"]: layer for layer in one["layers"]} for one in models]
    found = dict.fromkeys(name for layers in by_name for name in layers)
    if not found:
        return None

    def cells(name: str) -> list[Cell]:
        pairs = [layers.get(name) for layers in by_name]
        return [Cell(figure(layer and layer[key])) for layer in pairs for key in ("param_bytes", "macs")]

    rows = tuple((Cell(name or "the model itself"), *cells(name)) for name in found)
    columns = (*names("layer"), *numbers(*(f"{one['name']}: {key}" for one in models for key in ("bytes", "MACs"))))
    table = Table("All layers", columns, rows, folded=len(rows) > 12)
    return Section("layers", "Where bytes and MACs go", ("MACs of one clip.",), (table,))


def _sources(models: Sequence[ComparedModel]) -> Section:
    rows = tuple(
        (
            Cell(one["name"]),
            Cell(one["source"]),
            Cell(one["recipe"]),
            Cell(one["created"]),
            Cell(f"{one['seed']}"),
            Cell(f"{one['step']['test']['clips']:,}"),
            Cell(", ".join(one["labels"])),
        )
        for one in models
    )
    columns = (*names("model", "folder", "recipe", "made"), *numbers("seed", "test clips"), *names("labels"))
    return Section("provenance", "Where they come from", (), (Table("Sources", columns, rows),))
