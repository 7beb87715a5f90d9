"""A recipe from audio to verified files: stages in order, each run only when what it reads has changed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from aum_compress.budget.latency import estimated_ms
from aum_compress.budget.records import BudgetReport, enforce
from aum_compress.bundle import Bundle, machine, now, tool_versions
from aum_compress.compress.layer_signal import layer_signal
from aum_compress.console import log, only_errors_of
from aum_compress.devices import (
    device_models,
    device_names,
    device_report,
    enforce_device_budgets,
    publish_pack,
    ships_quantised,
)
from aum_compress.errors import AumError, RecipeError
from aum_compress.export.onnx_writer import fold_if_needed
from aum_compress.models.config import AudioMambaConfig, ModelConfig
from aum_compress.pruning import check_pruning, prune
from aum_compress.publish import ShippedFile, export, gated_precision, publish, published, verify_and_measure
from aum_compress.recipe_schema import Recipe, TrainConfig
from aum_compress.report.schema import REPORT_SCHEMA
from aum_compress.report.write import report_files
from aum_compress.stages import check_quantisation, distill, quantise, resolve, train_on_labels
from aum_compress.teaching import check_teachers, find_teachers
from aum_compress.train.distributed import FirstProcessFailed, join
from aum_compress.workspace import Workspace

STAGES = (
    "data",
    "reference",
    "teacher",
    "student",
    "distill",
    "prune",
    "quantize",
    "devices",
    "budget",
    "export",
    "verify",
)


STEPS = {"distill": "distilled", "prune": "pruned", "quantize": "quantised"}
"""Stage -> what it makes of the student, in words of the report."""
SIGNAL_CLIPS = 16


@dataclass
class Outcome:
    """What a run leaves behind."""

    report: dict[str, Any]
    folder: Path
    """Where the report lies: exports/<name>, or runs/<recipe> when nothing was exported."""
    bundles: dict[str, Bundle] = field(default_factory=dict)


def run(recipe: Recipe, out: Path, until: str | None = None) -> Outcome | None:
    """Runs the stages of `recipe` up to `until` (one of `STAGES`; all when left out), below `out`.

    Where its trainings want several processes (docs/distributed.md), all of them call this. The first one has the
    outcome, or the error; the others return None, and raise only what the first one cannot know.

    Raises:
        AumError: whatever went wrong, with its exit code: 2 data or recipe, 3 over budget, 4 verification. Stages that
            were finished stay, and the next run goes on behind them.
    """
    # up to `student` it is whichever models the recipe has
    if until in STAGES[STAGES.index("distill") :] and getattr(recipe, until) is None:
        raise RecipeError(f"{recipe.name}: has no section {until}, so that stage cannot be run; add the section")
    wanted = STAGES[: STAGES.index(until or STAGES[-1]) + 1]
    ranks = join(_trainings(recipe, wanted))
    if not ranks.is_first:
        only_errors_of(f"process {ranks.rank}")
    if ranks.size > 1:
        log(f"processes: {ranks.size}")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    space = Workspace(recipe, out, ranks)
    lock = FileLock(space.runs / ".lock", timeout=0)
    try:
        ranks.first(lambda: _acquire(lock))
        return _run(space, wanted)
    except FirstProcessFailed:
        return None
    except KeyboardInterrupt:
        if ranks.is_first:
            raise
        return None  # it reaches all processes at once, and the first one answers
    except Timeout:
        raise AumError(f"{space.runs}: another run of this recipe is at work there; wait for it or use --out") from None
    except OSError as error:
        raise AumError(
            f"{error.filename or space.runs}: {error.strerror or error}. Free space or mend its permissions and run "
            "again: finished stages are kept"
        ) from None
    finally:
        lock.release()


def _acquire(lock: FileLock) -> None:
    Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
    lock.acquire()


def _trainings(recipe: Recipe, wanted: Sequence[str]) -> list[TrainConfig]:
    """Of the stages up to the last one wanted."""
    sections = [(name, getattr(recipe, name)) for name in wanted if name not in ("data", "verify")]
    keys = {"prune": "finetune", "devices": "finetune"}
    found = [getattr(section, keys.get(name, "train"), None) for name, section in sections]
    return [config for config in found if config is not None]


def _run(space: Workspace, wanted: Sequence[str]) -> Outcome | None:
    space.prepare()
    log(f"data: {_data_line(space)}")
    space.ranks.first(lambda: _require_models(space))
    if space.recipe.devices and "devices" in wanted:
        space.ranks.first(lambda: device_names(space))  # what is wrong with them is said before hours of training
    bundles, devices = _trained(space, wanted)
    return space.ranks.first(lambda: _finished(space, wanted, bundles, devices))


def _require_models(space: Workspace) -> None:
    """What does not fit, a budget out of reach too, is said before hours of training, not after."""
    for section in (space.recipe.reference, space.recipe.teacher, space.recipe.student):
        if section is not None:
            resolve(space, section)
    check_teachers(space)
    check_quantisation(space)
    check_pruning(space)


def _trained(space: Workspace, wanted: Sequence[str]) -> tuple[dict[str, Bundle], dict[str, Bundle]]:
    """The stages that make models, by name, in their order; and the models of devices."""
    recipe = space.recipe
    bundles: dict[str, Bundle] = {}
    for name in ("reference", "teacher", "student"):
        section = getattr(recipe, name)
        if name in wanted and section is not None and section.train is not None:
            bundles[name] = train_on_labels(space, name)
    teachers = find_teachers(space, bundles) if "distill" in wanted else []
    from_teacher = recipe.prune is not None and recipe.prune.start == "teacher"
    steps: dict[str, Callable[[Bundle | None], Bundle]] = {
        "distill": lambda parent: distill(space, parent, teachers),
        "prune": lambda parent: prune(space, bundles[recipe.prune.start] if from_teacher else parent, teachers),
        "quantize": lambda parent: quantise(space, parent, teachers),
    }
    newest = bundles.get("student")
    for name, step in steps.items():
        if name in wanted and getattr(recipe, name) is not None:
            newest = bundles[name] = step(newest)
    full = _last_float(bundles)
    devices = device_models(space, full, teachers) if "devices" in wanted and recipe.devices else {}
    return bundles, devices


def _last_float(bundles: dict[str, Bundle]) -> Bundle | None:
    floats = [bundles[name] for name in ("student", "distill", "prune") if name in bundles]
    return floats[-1] if floats else None


def _finished(
    space: Workspace, wanted: Sequence[str], bundles: dict[str, Bundle], devices: dict[str, Bundle]
) -> Outcome:
    """What follows from the models, on the first process: budget, export, verification, report."""
    recipe = space.recipe
    full, quantized = _last_float(bundles), bundles.get("quantize")
    newest = quantized or full
    if newest is None or "budget" not in wanted:
        return _report_without_export(space, bundles)

    if recipe.budget:
        enforce(shipped_budget(space, newest))
        if devices:
            enforce_device_budgets({name: shipped_budget(space, bundle) for name, bundle in devices.items()})
    if not recipe.export or "export" not in wanted:
        return _report_without_export(space, bundles)
    exported = export(space, full, quantized)
    if wanted[-1] == "export":
        return _report_without_export(space, bundles)
    general = quantized if ships_quantised(recipe) else full
    pack = publish_pack(space, general, devices) if devices else None
    report = published(space, exported)
    if report is None or report.get("devices") != device_report(pack):
        shipped = verify_and_measure(space, exported, full, quantized)
        report = build_report(space, bundles, shipped) | {"devices": device_report(pack)}
        publish(space, exported, report, report_files(report))
        log(f"wrote {space.exports}")
    _write_report(space, report)  # over the one of an earlier run that stopped before
    return Outcome(report, space.exports, bundles)


def shipped_budget(space: Workspace, newest: Bundle) -> BudgetReport:
    """Of the model as it will ship: an fp32 bundle ships as fp16 where the recipe exports that."""
    half = newest.card.precision != "fp32" or bool(space.recipe.export and "fp16" in space.recipe.export.precisions)
    return space.budget(fold_if_needed(newest.load_model()), half=half)


def _report_without_export(space: Workspace, bundles: dict[str, Bundle]) -> Outcome:
    report = build_report(space, bundles, [])
    _write_report(space, report)
    return Outcome(report, space.runs, bundles)


def _write_report(space: Workspace, report: dict[str, Any]) -> None:
    for name, content in report_files(report).items():
        (space.runs / name).write_bytes(content)


def build_report(space: Workspace, bundles: dict[str, Bundle], shipped: list[ShippedFile]) -> dict[str, Any]:
    """The report's content: every figure of the run, none computed here."""
    index = space.parts.index
    devices = {clip.device for part in (index.train, index.validation, index.test) for clip in part if clip.device}
    road = [_bundle_row(space, name, bundle) for name, bundle in bundles.items()]
    road += [_file_row(file) for file in shipped]
    gated = None
    if shipped:
        precision = gated_precision(tuple(file.precision for file in shipped))
        gated = next(file for file in shipped if file.precision == precision)
    newest = list(bundles.values())[-1] if bundles else None
    return {
        "schema_version": REPORT_SCHEMA,
        "recipe": space.recipe.name,
        "created": now(),
        "seed": space.recipe.seed,
        "versions": tool_versions(),
        "data": {
            "kind": space.recipe.data.kind,
            "labels": list(space.labels),
            "clip_seconds": index.clip_seconds,
            "train": len(index.train),
            "validation": len(index.validation),
            "test": len(index.test),
            "seen_devices": sorted(device for device in index.seen_devices if device),
            "unseen_devices": sorted(devices - index.seen_devices),
        },
        "input": space.spec.model_dump(),
        "road": road,
        "budget": gated.budget.to_dict() if gated else newest.card.budget if newest else None,
        "gated": gated.path.name if gated else newest.path.name if newest else None,
        "verification": {v.path.name: v.to_dict() for file in shipped for v in file.verifications},
        "training": {name: b.card.notes["history"] for name, b in bundles.items() if "history" in b.card.notes},
        "pruning": _pruning_steps(bundles["prune"]) if "prune" in bundles else None,
        "quantisation": _quantisation(space, bundles["quantize"]) if "quantize" in bundles else None,
        "signal": _signal(space, bundles),
        "machine": machine(),
        "next": f"aum-compress predict {space.exports / gated.path.name} YOUR.wav" if gated else "",
    }


def _pruning_steps(bundle: Bundle) -> list[dict[str, Any]]:
    """Without the importances, which the bundle's card has."""
    told = ("before", "after", "kinds", "param_bytes", "macs", "validation_accuracy")
    return [{key: step[key] for key in told if key in step} for step in bundle.card.notes["steps"]]


def _quantisation(space: Workspace, bundle: Bundle) -> dict[str, Any]:
    card, searched = bundle.card, bundle.card.notes.get("search")
    keys = ("param_bytes", "accuracy_drop", "rolled_back")
    return {
        "layers": card.quantized_layers,
        "weight_bits": space.recipe.quantize.weight_bits,
        "saturating_pairs": card.notes["saturating_pairs"],
        "sqnr_db": next(value for name, value in card.metrics.items() if name.endswith("_sqnr_db")),
        "search": searched
        and {key: searched[key] for key in keys} | {key: searched["sensitivity"][key] for key in ("part", "clips")},
    }


def _bundle_row(space: Workspace, name: str, bundle: Bundle) -> dict[str, Any]:
    budget, section = bundle.card.budget, getattr(space.recipe, name)
    preset = getattr(section, "preset", None)
    whose = space.recipe.prune.start if space.recipe.prune else "student"
    return {
        "stage": name,
        "title": f"{name} ({preset})" if preset else f"{whose}, {STEPS[name]}",
        "measured_with": "torch",
        "file": None,
        "file_bytes": None,
        "precision": bundle.card.precision,
        **{key: budget[key] for key in ("params", "param_bytes", "macs")},
        "latency_ms": _estimated_ms(bundle.card.model),
        "latency_is": "estimated" if _estimated_ms(bundle.card.model) else None,
        "within_budget": budget["verdict"] == "within",
        "validation_accuracy": bundle.card.metrics.get("validation_accuracy"),
        "test": bundle.card.metrics["test"],
    }


def _file_row(file: ShippedFile) -> dict[str, Any]:
    return {
        "stage": file.precision,
        "title": f"{file.path.name}",
        "measured_with": "onnxruntime",
        "file": file.path.name,
        "file_bytes": file.path.stat().st_size,
        "precision": file.precision,
        "params": file.budget.params,
        "param_bytes": file.budget.param_bytes,
        "macs": file.budget.macs,
        "latency_ms": file.latency_ms,
        "latency_is": "measured",
        "within_budget": not file.budget.over,
        "validation_accuracy": None,
        "test": file.test,
    }


def _estimated_ms(config: ModelConfig) -> float | None:
    return round(estimated_ms(config), 3) if isinstance(config, AudioMambaConfig) else None


def _signal(space: Workspace, bundles: dict[str, Bundle]) -> list[dict[str, Any]] | None:
    """Of each quantised layer, on a few training clips."""
    made = list(bundles)
    if "quantize" not in made or made.index("quantize") == 0:
        return None
    full, quantized = bundles[made[made.index("quantize") - 1]], bundles["quantize"]
    clips = torch.from_numpy(space.normalised("train", SIGNAL_CLIPS))
    return layer_signal(fold_if_needed(full.load_model()), quantized.load_model(), clips)


def _data_line(space: Workspace) -> str:
    index = space.parts.index
    return (
        f"{len(index.labels)} classes, {len(index.train)} training, {len(index.validation)} validation and "
        f"{len(index.test)} test clips of {index.clip_seconds:g} s"
    )
