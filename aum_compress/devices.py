"""Stage `devices`: a model for each recording device, and the pack of them that ships beside the general export."""

import io
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from aum_compress.budget.check_onnx import check_onnx
from aum_compress.budget.pack import enforce_pack, pack_report
from aum_compress.budget.records import BudgetReport
from aum_compress.bundle import (
    GOLDEN,
    RECIPE,
    Bundle,
    golden_inputs,
    model_files,
    now,
    read_bundle,
    replace_folder,
    write_bundle,
)
from aum_compress.console import log, progress
from aum_compress.device_names import GENERAL, require_device_names
from aum_compress.errors import BundleError, RecipeError
from aum_compress.evaluate.subject import onnx_logits
from aum_compress.export.metadata import FEATURES
from aum_compress.export.runtime import Classifier
from aum_compress.export.verify import Reference, verify_onnx
from aum_compress.exporting import ExportOptions, export_bundle
from aum_compress.packs import PACK, Pack, PackCard, is_pack, read_pack
from aum_compress.publish import file_name, gated_precision, torch_models
from aum_compress.quantising import require_judging_clips
from aum_compress.recipe import dump_recipe
from aum_compress.recipe_schema import Recipe
from aum_compress.stages import fine_tune, quantise
from aum_compress.teaching import Teacher, teacher_targets
from aum_compress.train.metrics import classification_metrics, macro_accuracy
from aum_compress.workspace import Workspace

_SCORES = ("clips", "accuracy", "overall_accuracy", "log_loss", "seen", "unseen")


def device_names(space: Workspace) -> list[str]:
    """The devices that get a model of their own.

    Raises:
        RecipeError: a name that no training clip has; a device without validation clips where these choose an epoch.
        DataError: no clip with a device, a name that cannot name a folder, or no clips for `quantize.search`.
    """
    section, index = space.recipe.devices, space.parts.index
    heard = sorted(filter(None, index.seen_devices))
    if unknown := [name for name in section.names if name not in heard]:
        raise RecipeError(
            f"devices.names: no training clip of {', '.join(unknown)}; training has {', '.join(heard) or 'none'}. "
            "A device that training has not heard has the general model"
        )
    names = list(dict.fromkeys(section.names)) or heard
    if not names:
        raise RecipeError("devices: no training clip says which device recorded it; leave the section out")
    require_device_names(names, "devices")
    judged = {clip.device for clip in index.validation}
    lacking = [name for name in names if name not in judged]
    quantize = space.recipe.quantize if ships_quantised(space.recipe) else None
    trainings = {"devices.finetune": section.finetune, "quantize.train": quantize and quantize.train}
    for place, config in trainings.items():
        if config and config.keep == "best" and lacking:
            raise RecipeError(
                f"{place}.keep: best is chosen on validation clips, and there are none of {', '.join(lacking)}; "
                "set keep: last, raise data.validation_fraction, or leave them out of devices.names"
            )
    if quantize and quantize.search:
        for name in names:
            require_judging_clips(space.for_device(name), quantize)
    return names


def ships_quantised(recipe: Recipe) -> bool:
    """Whether the models that ship are those of the quantize stage."""
    return bool(recipe.quantize) and (
        recipe.export is None or gated_precision(recipe.export.precisions) not in ("fp32", "fp16")
    )


def device_models(space: Workspace, full: Bundle, teachers: list[Teacher]) -> dict[str, Bundle]:
    """Device -> its model: `full`, the last float model of the student, fine-tuned and, where the general one ships so,
    quantised. Each is a stage of its own that is run only when what it reads has changed."""
    section = space.recipe.devices

    @cache
    def logits() -> Any:
        return teacher_targets(space, teachers, section.finetune, space.workers(section.finetune))[0]

    models = {}
    for name in device_names(space):
        own = space.for_device(name)
        tuned = fine_tune(own, full, teachers, logits)
        models[name] = quantise(own, tuned, teachers) if ships_quantised(space.recipe) else tuned
    return models


def enforce_device_budgets(reports: Mapping[str, BudgetReport]) -> None:
    """The gate on the model of each device. Raises BudgetExceeded with the devices named."""
    enforce_pack(pack_report({f"model for {name}": report for name, report in reports.items()}))


def device_report(pack: Pack | None) -> dict[str, Any] | None:
    """What a run's report says of its pack: where it lies, the gain of each device, accuracy with it and without."""
    if pack is None:
        return None
    test = {
        key: {name: value for name, value in scores.items() if name in _SCORES}
        for key, scores in pack.card.test.items()
    }
    return {"pack": pack.path.name, "precision": pack.card.precision, "models": pack.card.devices, "test": test}


def publish_pack(space: Workspace, general: Bundle, devices: Mapping[str, Bundle]) -> Pack:
    """exports/<name>-devices: every model exported, verified and measured in onnxruntime; the pack on disk if it was
    made of the same models.

    Raises:
        VerificationFailed: a file that does not compute what its model does; nothing is written then.
        BudgetExceeded: a file over the limits.
    """
    place = space.exports.with_name(f"{space.exports.name}-devices")
    precision = gated_precision(space.recipe.export.precisions)
    bundles = {GENERAL: general, **devices}
    reads = {
        "models": {name: bundle.sha256 for name, bundle in bundles.items()},
        "precision": precision,
        "verify": space.recipe.verify and space.recipe.verify.model_dump(mode="json"),
        "budget": space.recipe.budget and space.recipe.budget.model_dump(mode="json"),
    }
    inputs_sha256 = space.inputs_sha256("pack", reads)
    if is_pack(place) and (pack := read_pack(place)).card.inputs_sha256 == inputs_sha256:
        log(f"devices: nothing has changed, kept {place}")
        return pack
    if place.exists() and not is_pack(place) and any(place.iterdir()):
        raise BundleError(f"{place}: holds something other than a pack, which would be lost; move away what is there")
    beside = place.with_name(f".{place.name}.writing-{os.getpid()}")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        reports = {
            name: _write_model(space, beside / name, name, bundle, precision) for name, bundle in bundles.items()
        }
        if space.recipe.budget:
            enforce_device_budgets(reports)
        rows, test = _measured(space, beside, bundles, reports, precision)
        card = PackCard(
            recipe=space.recipe.name,
            created=now(),
            inputs_sha256=inputs_sha256,
            precision=precision,
            models={name: Bundle(beside / name, bundle.card).sha256 for name, bundle in bundles.items()},
            devices=rows,
            test=test,
        )
        (beside / PACK).write_text(json.dumps(card.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
        replace_folder(beside, place)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    log(f"devices: wrote {place}")
    return read_pack(place)


def _write_model(space: Workspace, folder: Path, name: str, bundle: Bundle, precision: str) -> BudgetReport:
    """One model of the pack: tensors and ONNX file side by side, the file verified against the tensors' model."""
    model = torch_models(bundle, bundle, (precision,))[precision]
    with tempfile.TemporaryDirectory() as beside, progress(f"devices: export, model for {name}"):
        exported = export_bundle(bundle, Path(beside) / "exported", ExportOptions((precision,), (FEATURES,)))
        path = exported.path / file_name(precision)
        own = space if name == GENERAL else space.for_device(name)
        section = space.recipe.verify
        if section and section.clips and len(own.parts.test):
            clips = own.normalised("test", section.clips)
            verify_onnx(path, Reference(model, space.labels, space.spec), clips=clips).enforce()
        report = check_onnx(path, space.limits, config=model.config)
        files = model_files(model, golden_inputs(space.spec), half=precision != "fp32")
        files[GOLDEN] = _golden(files[GOLDEN], (exported.path / GOLDEN).read_bytes())
        card = bundle.card.model_copy(
            update={
                "stage": "devices",
                "parent": None,  # the pack may be moved
                "model": model.config,
                "precision": precision,
                "budget": report.to_dict(),
                "notes": {"device": name, "made_from": bundle.sha256},
                "created": now(),
            }
        )
        write_bundle(folder, card, files | {path.name: path, RECIPE: dump_recipe(space.recipe).encode()})
    return report


def _golden(model: bytes, exported: bytes) -> bytes:
    """golden.npz for both readers: the model's logits, and those of the file under its precision."""
    arrays = {}
    for content in (exported, model):
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            arrays |= {key: stored[key] for key in stored.files}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _measured(
    space: Workspace, folder: Path, bundles: Mapping[str, Bundle], reports: Mapping[str, BudgetReport], precision: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Of the files in onnxruntime: a row for each device with a model of its own, and the metrics of all clips."""
    test = space.parts.test
    targets = np.array([space.labels.index(clip.label) for clip in test.clips])
    heard = np.array([clip.device for clip in test.clips])
    with progress("test: general model in onnxruntime") as reporter:
        general = onnx_logits(Classifier(folder / GENERAL / file_name(precision)), test, space.spec, reporter.advance)
    packed, rows = general.copy(), []
    for name in bundles:
        if name == GENERAL:
            continue
        own, chosen = space.for_device(name), heard == name
        row = {
            "device": name,
            "training_clips": len(own.parts.train),
            "test_clips": int(chosen.sum()),
            "param_bytes": reports[name].param_bytes,
            "macs": reports[name].macs,
            "within_budget": not reports[name].over,
            "general_accuracy": None,
            "accuracy": None,
            "gain": None,
        }
        if chosen.any():
            with progress(f"test: model for {name} in onnxruntime") as reporter:
                classifier = Classifier(folder / name / file_name(precision))
                packed[chosen] = onnx_logits(classifier, own.parts.test, space.spec, reporter.advance)
            before, after = (
                macro_accuracy(logits[chosen].argmax(1) == targets[chosen], targets[chosen])
                for logits in (general, packed)
            )
            row |= {"general_accuracy": before, "accuracy": after, "gain": after - before}
        tuned = read_bundle(own.folder("devices"))
        row |= {key: tuned.card.metrics.get(key) for key in ("validation_accuracy", "general_validation_accuracy")}
        rows.append(row)
    seen = space.parts.index.seen_devices
    metrics = {
        key: classification_metrics(logits, targets, space.labels, list(heard), seen)
        for key, logits in (("pack", packed), ("general", general))
    }
    return rows, metrics
