"""The last stages: ONNX files, their proof and measurement in onnxruntime, and the folder that ships."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from aum_compress.audio.reading import read_audio
from aum_compress.budget.check_onnx import check_onnx
from aum_compress.budget.records import BudgetReport
from aum_compress.bundle import (
    GOLDEN,
    RECIPE,
    Bundle,
    BundleCard,
    ParentRef,
    find_bundle,
    golden_inputs,
    now,
    tool_versions,
    write_bundle,
)
from aum_compress.console import log, progress
from aum_compress.errors import VerificationFailed
from aum_compress.export.metadata import FEATURES, WAVEFORM, OnnxMetadata, Reads
from aum_compress.export.model_card import MODEL_CARD, model_card
from aum_compress.export.onnx_writer import export_onnx, fold_if_needed, round_to_half
from aum_compress.export.ort_format import CONFIG, required_operators, write_ort
from aum_compress.export.runtime import Classifier, open_session
from aum_compress.export.timing import interleaved
from aum_compress.export.verification import Verification
from aum_compress.export.verify import Reference, verify_onnx
from aum_compress.export.verify_inputs import golden_file
from aum_compress.export.waveform_input import write_waveform_file
from aum_compress.models.factory import Model
from aum_compress.models.storage import QUANTISED
from aum_compress.recipe import dump_recipe
from aum_compress.workspace import FOLDERS, Workspace

BUDGET_KEYS = ("verdict", "param_bytes", "params", "macs", "dcase_bytes", "dcase_macs", "limits")
"""What an ONNX file says of its budget in its metadata."""
TIMED_RUNS = 40


@dataclass(frozen=True)
class ShippedFile:
    """One ONNX file that reads features with what was found out about it, and about the one that reads waveforms."""

    precision: str
    path: Path
    budget: BudgetReport
    test: dict[str, Any]
    """Metrics of the file in onnxruntime on the test part."""
    latency_ms: float
    """For one clip in onnxruntime on one thread of this machine, the median of some."""
    verifications: tuple[Verification, ...]
    """Of the file itself, then of the one with the front-end inside; empty where the recipe does not verify."""


def file_name(precision: str, reads: Reads = FEATURES) -> str:
    return f"model-{precision}.onnx" if reads == FEATURES else f"model-{precision}-{reads}.onnx"


def gated_precision(precisions: tuple[str, ...]) -> str:
    """Of the files of an export, the one that ships and has to keep the budget: the smallest."""
    return next(precision for precision in (*QUANTISED, "fp16", "fp32") if precision in precisions)


def torch_models(full: Bundle, quantized: Bundle | None, precisions: tuple[str, ...]) -> dict[str, Model]:
    """Precision -> the torch model whose numbers the file of that precision holds."""
    models: dict[str, Model] = {}
    for precision in precisions:
        if precision in QUANTISED:
            models[precision] = quantized.load_model()
        else:
            folded = fold_if_needed(full.load_model())
            models[precision] = round_to_half(folded) if precision == "fp16" else folded
    return models


def export(space: Workspace, full: Bundle, quantized: Bundle | None) -> Bundle:
    """Stage `export`: one ONNX file a precision in runs/<recipe>/07-export, not verified yet."""
    section = space.recipe.export
    parent = quantized if set(QUANTISED) & set(section.precisions) else full
    parents = {bundle.card.stage: bundle.sha256 for bundle in (full, quantized) if bundle}
    reads = {"section": section.model_dump(mode="json"), "parents": parents}
    inputs_sha256 = space.inputs_sha256("export", reads)
    path = space.runs / FOLDERS["export"]
    if bundle := find_bundle(path, inputs_sha256):
        log(f"export: nothing has changed, kept {path}")
        return bundle
    models = torch_models(full, quantized, section.precisions)
    with tempfile.TemporaryDirectory() as folder, progress("export") as reporter:
        files: dict[str, bytes | Path] = {}
        for done, (precision, model) in enumerate(models.items(), start=1):
            source = quantized if precision in QUANTISED else full
            target = Path(folder) / file_name(precision)
            metadata = _metadata(space, source, model, precision)
            export_onnx(model, target, metadata, dynamic_batch=section.dynamic_batch, scan=section.scan)
            files[target.name] = target
            if section.waveform:
                with_front_end = Path(folder) / file_name(precision, WAVEFORM)
                write_waveform_file(target, with_front_end, section.input_rate_hz)
                files[with_front_end.name] = with_front_end
            reporter.advance(done, len(models))
        if section.ort:
            files |= ort_files(Path(folder), files)
        files[GOLDEN] = golden_file(golden_inputs(space.spec), models)
        files[RECIPE] = dump_recipe(space.recipe).encode()
        card = _card(space, parent, models[gated_precision(section.precisions)].config, inputs_sha256)
        bundle = write_bundle(path, card, files)
    log(f"export: wrote {path}")
    return bundle


def verify_and_measure(space: Workspace, exported: Bundle, full: Bundle, quantized: Bundle | None) -> list[ShippedFile]:
    """Stage `verify`: each file against its torch model, and its accuracy in onnxruntime.

    Raises:
        VerificationFailed: a file that does not compute what its model does; nothing is published then.
    """
    section, precisions = space.recipe.verify, space.recipe.export.precisions
    models = torch_models(full, quantized, precisions)
    clips = space.normalised("test", section.clips) if section and section.clips else None
    recordings = _recordings(space, section.clips) if section and space.recipe.export.waveform else None
    shipped = []
    for precision in precisions:
        path = exported.path / file_name(precision)
        verifications = []
        if section:
            reference = Reference(models[precision], space.labels, space.spec)
            with progress(f"verify: {path.name}"):
                verifications.append(verify_onnx(path, reference, clips=clips))
            if space.recipe.export.waveform:
                with_front_end = exported.path / file_name(precision, WAVEFORM)
                with progress(f"verify: {with_front_end.name}"):
                    verifications.append(verify_onnx(with_front_end, reference, clips=clips, waveforms=recordings))
        budget = check_onnx(path, space.limits, config=models[precision].config)
        measured = (budget, _accuracy(space, path), _latency_ms(space, path))
        shipped.append(ShippedFile(precision, path, *measured, tuple(verifications)))
    failed = [found for file in shipped for found in file.verifications if not found.passed]
    if failed:
        raise VerificationFailed("\n".join(line for verification in failed for line in verification.lines()))
    return shipped


def publish(space: Workspace, exported: Bundle, report: dict[str, Any], report_files: dict[str, bytes]) -> Bundle:
    """exports/<name>: the files of the export, the reports, and a card with what was measured."""
    kept = {name: exported.path / name for name in exported.card.files}
    measured = {row["file"]: row["test"]["accuracy"] for row in report["road"] if row["file"]}
    kept[MODEL_CARD] = model_card([path for name, path in kept.items() if name.endswith(".onnx")], measured).encode()
    card = exported.card.model_copy(
        update={
            "stage": "verify" if space.recipe.verify else "export",
            "parent": None,
            "metrics": {row["file"]: row["test"] for row in report["road"] if row["file"]},
            "budget": report["budget"],
            "notes": {"verification": report["verification"], "exported_from": exported.sha256},
            "created": now(),
        }
    )
    return write_bundle(space.exports, card, kept | report_files)


def published(space: Workspace, exported: Bundle) -> dict[str, Any] | None:
    """The report of what is already published, if it came from this very export and the same verification."""
    bundle = find_bundle(space.exports, exported.card.inputs_sha256)
    if bundle is None or bundle.card.notes.get("exported_from") != exported.sha256:
        return None
    if bool(bundle.card.notes.get("verification")) != bool(space.recipe.verify):
        return None
    return json.loads((bundle.path / "report.json").read_text(encoding="utf-8"))


def _recordings(space: Workspace, count: int) -> np.ndarray | None:
    """(count,S) test clips, evenly spread, as the files read them that have a front-end inside."""
    if not count:
        return None
    rate = space.recipe.export.input_rate_hz or space.spec.front_end.sample_rate_hz
    clips = space.parts.test.clips
    chosen = [clips[place] for place in space.spread(len(clips), count)]
    seconds = space.spec.clip_seconds
    found = np.zeros((len(chosen), round(rate * seconds)), dtype=np.float32)
    for row, clip in zip(found, chosen):
        samples = read_audio(clip.path, rate, start_seconds=clip.start_seconds, duration_seconds=seconds)[: len(row)]
        row[: len(samples)] = samples
    return found


def ort_files(folder: Path, files: Mapping[str, bytes | Path]) -> dict[str, bytes | Path]:
    """ORT format of the .onnx files among `files`, written to `folder`, and the configuration of a build for them."""
    written = []
    for name in (name for name in files if name.endswith(".onnx")):
        written.append((folder / name).with_suffix(".ort"))
        write_ort(folder / name, written[-1])
    return {path.name: path for path in written} | {CONFIG: required_operators(written).encode()}


def _accuracy(space: Workspace, path: Path) -> dict[str, Any]:
    classifier = Classifier(path)
    test, spec = space.parts.test, space.spec
    logits = []
    with progress(f"test: {path.name} in onnxruntime") as reporter:
        for start in range(0, len(test), 64):
            features = ((test[start : start + 64] - spec.mean) / spec.std).astype(np.float32)[:, None]
            logits.append(classifier.logits(features))
            reporter.advance(min(start + 64, len(test)), len(test))
    return space.measure(np.concatenate(logits))


def _latency_ms(space: Workspace, path: Path) -> float:
    session = open_session(path, intra_op_num_threads=1)
    feeds = {session.get_inputs()[0].name: golden_inputs(space.spec)[:1]}
    by_clock, _ = interleaved({path.name: session}, {path.name: feeds}, TIMED_RUNS)
    return round(median(by_clock[path.name]), 3)


def _metadata(space: Workspace, source: Bundle, model: Model, precision: str) -> OnnxMetadata:
    budget = space.budget(model, half=precision != "fp32").to_dict()
    return OnnxMetadata(
        labels=space.labels,
        input=space.spec.model_dump(),
        precision=precision,
        budget={key: budget[key] for key in BUDGET_KEYS},
        metrics=measured_accuracy(source),
        recipe=space.recipe.name,
        recipe_sha256=hashlib.sha256(dump_recipe(space.recipe).encode()).hexdigest(),
        parent_sha256=source.sha256,
    )


def measured_accuracy(source: Bundle) -> dict[str, Any]:
    """What a file says of the accuracy of the model it was made from; empty where no test clips were heard."""
    test = source.card.metrics.get("test", {})
    return {"stage": source.card.stage, "accuracy": test["accuracy"]} if "accuracy" in test else {}


def _card(space: Workspace, parent: Bundle, config, inputs_sha256: str) -> BundleCard:
    return BundleCard(
        kind="onnx",
        stage="export",
        recipe=space.recipe.name,
        inputs_sha256=inputs_sha256,
        parent=ParentRef(path=f"../{parent.path.name}", sha256=parent.sha256),
        model=config,
        input=space.spec,
        labels=space.labels,
        precision=gated_precision(space.recipe.export.precisions),
        quantized_layers=parent.card.quantized_layers,
        seed=space.recipe.seed,
        versions=tool_versions(),
        created=now(),
    )
