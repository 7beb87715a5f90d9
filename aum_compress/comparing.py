"""Models to be shown side by side, read from runs, exports and bundles. Torch-free."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from aum_compress.budget.latency import estimated_ms
from aum_compress.bundle import CARD, RECIPE, Bundle, now, read_bundle
from aum_compress.errors import AumError, BundleError, RecipeError
from aum_compress.models.config import AudioMambaConfig
from aum_compress.recipe import read_yaml
from aum_compress.report.comparison import COMPARISON_SCHEMA, ComparedModel, Comparison
from aum_compress.report.schema import Report
from aum_compress.report.verdict import shipped_step
from aum_compress.report.write import REPORT_JSON, read_report


def compare_models(places: Sequence[Path]) -> Comparison:
    """One model of each folder: what ships of a run that was exported, else its newest model; of a bundle its own.

    Raises:
        BundleError: a folder that holds neither a report nor a bundle, or a damaged one.
        AumError: a model that was never measured.
    """
    models = [_model(place) for place in places]
    titles = [one["name"] for one in models]
    for one in models:  # the same name twice would tell nobody which is which
        if titles.count(one["name"]) > 1:
            one["name"] = one["source"]
    return {"comparison_version": COMPARISON_SCHEMA, "created": now(), "models": models}


def _model(place: Path) -> ComparedModel:
    if (place / REPORT_JSON).is_file():
        return _from_report(place, read_report(place))
    return _from_bundle(place, read_bundle(place))


def _from_report(place: Path, report: Report) -> ComparedModel:
    if not report["road"] or report["budget"] is None:
        raise AumError(f"{place / REPORT_JSON}: has no model in it yet; run the recipe again")
    step = shipped_step(report) or report["road"][-1]
    limits = report["budget"]["limits"]
    found = report["verification"].get(step["file"] or "")
    return {
        "name": f"{report['recipe']}: {step['title']}",
        "source": str(place),
        "recipe": report["recipe"],
        "created": report["created"],
        "seed": report["seed"],
        "data_kind": report["data"]["kind"],
        "labels": report["data"]["labels"],
        "step": step,
        "verified": found and found["passed"],
        "layers": report["budget"]["layers"],
        "max_param_bytes": limits.get("max_param_bytes"),
        "max_macs": limits.get("max_macs"),
    }


def _from_bundle(place: Path, bundle: Bundle) -> ComparedModel:
    card = bundle.card
    if card.metrics.get("test") is None or card.budget is None:
        raise AumError(
            f"{place / CARD}: says nothing of accuracy or budget; name the bundle of a stage, or a run's folder"
        )
    kind = _data_kind(bundle)
    try:
        return TypeAdapter(ComparedModel).validate_python(_of_card(place, bundle, kind), strict=True)
    except (LookupError, TypeError, AttributeError, ValidationError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BundleError(
            f"{place / CARD}: its metrics or budget are not those that a stage writes: {reason}; make the bundle again"
        ) from None


def _of_card(place: Path, bundle: Bundle, kind: str) -> dict[str, Any]:
    card, budget = bundle.card, bundle.card.budget
    ms = estimated_ms(card.model) if isinstance(card.model, AudioMambaConfig) else None
    step = {
        "stage": card.stage,
        "title": card.stage,
        "measured_with": "torch",
        "file": None,
        "file_bytes": None,
        "precision": card.precision,
        **{key: budget[key] for key in ("params", "param_bytes", "macs")},
        "latency_ms": ms,
        "latency_is": "estimated" if ms else None,
        "within_budget": budget["verdict"] == "within",
        "validation_accuracy": card.metrics.get("validation_accuracy"),
        "test": card.metrics["test"],
    }
    return {
        "name": f"{card.recipe}: {card.stage}",
        "source": str(place),
        "recipe": card.recipe,
        "created": card.created,
        "seed": card.seed,
        "data_kind": kind,
        "labels": list(card.labels),
        "step": step,
        "verified": None,
        "layers": budget["layers"],
        "max_param_bytes": budget["limits"].get("max_param_bytes"),
        "max_macs": budget["limits"].get("max_macs"),
    }


def _data_kind(bundle: Bundle) -> str:
    """Of the recipe that a bundle carries; empty where it has none."""
    path = bundle.path / RECIPE
    if not path.is_file():
        return ""
    try:
        return str(read_yaml(path)["data"]["kind"])
    except (LookupError, TypeError):
        raise RecipeError(f"{path}: does not say its data.kind: altered; make the bundle again") from None
