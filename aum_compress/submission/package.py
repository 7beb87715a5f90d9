"""Writes a submission: the inference package of DCASE 2025 Task 1, its predictions and its meta information.

<folder>/setup.py requirements.txt README.md
<folder>/<label>/<label>_<index>.py                    predict, load_model, load_inputs, get_model_for_device
<folder>/<label>/aum_compress/                         the source files that inference needs
<folder>/<label>/ckpts/<label>_<index>.safetensors     all models
<folder>/<label>/resources/dummy.wav, test.csv
<folder>/<label>/package.json                          what was packed, and its costs
<folder>/predictions/<label>_<index>/                  complexity.json, test_accuracy.json, output.csv, meta.yaml
"""

import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import yaml

import aum_compress
from aum_compress.budget.dcase import submission_complexity
from aum_compress.budget.pack import PackReport, enforce_pack, pack_report
from aum_compress.budget.records import BudgetReport, Limits
from aum_compress.bundle import Bundle, file_sha256, json_sha256, read_bundle, replace_folder
from aum_compress.console import log
from aum_compress.device_names import GENERAL
from aum_compress.errors import AumError, BudgetExceeded, BundleError
from aum_compress.submission import texts
from aum_compress.submission.checkpoint import checkpoint_bytes, part_budget, part_of, require_alike
from aum_compress.submission.inference import Submission, get_model_for_device, load_model
from aum_compress.submission.meta import meta_information
from aum_compress.submission.record import Costs, Record, read_record, write_record
from aum_compress.submission.results import TestResults, test_results, write_output
from aum_compress.submission.selfcheck import check_package
from aum_compress.submission.sources import vendored_sources

CHALLENGE_DEVICES = ("a", "b", "c", *(f"s{number}" for number in range(1, 11)))
"""Those that the organisers' script asks for."""
SCENES = (
    *("airport", "bus", "metro", "metro_station", "park", "public_square", "shopping_mall", "street_pedestrian"),
    *("street_traffic", "tram"),
)
_LABEL = re.compile(r"[A-Za-z][A-Za-z0-9_]*_task1")
_DUMMY_RATE_HZ = 44_100


@dataclass(frozen=True)
class Packing:
    """What is asked for."""

    label: str
    """Such as Doe_XY_task1."""
    general: Path
    """Bundle of the model for devices without one of their own."""
    devices: Mapping[str, Path] = field(default_factory=dict)
    """Name of a device -> bundle of its own model."""
    index: int = 1
    data: str | None = None
    """Labelled audio to measure the test accuracy on: a folder, or a recipe's test part."""
    settings: list[str] = field(default_factory=list)
    evaluation_set: Path | None = None
    """The challenge's evaluation set, whose predictions are submitted."""
    meta: Path | None = None


@dataclass(frozen=True)
class Written:
    """What was written, and its figures."""

    folder: Path
    pack: PackReport
    complexity: dict[str, Any]
    """As the organisers' script writes it."""
    test_accuracy: float | None
    predictions: int | None
    """Files in output.csv."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "folder": str(self.folder),
            "complexity": self.complexity,
            "test_accuracy": self.test_accuracy,
            "predictions": self.predictions,
            "budget": self.pack.to_dict(),
        }


def write_package(packing: Packing, folder: Path, limits: Limits | None = None) -> Written:
    """Writes the package into `folder`, whole or not at all. One that has other systems of the same label keeps them.

    Raises:
        AumError: a label or index that the challenge does not take, bundles that do not belong together, data that
            cannot be read, or a folder that holds something else.
        BudgetExceeded: a model over the limits.
        VerificationFailed: the package, run as the organisers do, does not answer as the bundles do.
    """
    _require_label(packing)
    paths = {GENERAL: packing.general, **packing.devices}
    bundles = {device: read_bundle(path) for device, path in paths.items()}
    require_alike(bundles)
    card = bundles[GENERAL].card
    if set(card.labels) != set(SCENES):
        log(f"package: {packing.general} knows other classes than the challenge's ten: it runs, but is no submission")
    parts = {device: part_of(bundle) for device, bundle in bundles.items()}
    reports = {device: part_budget(part, card.input, limits or Limits()) for device, part in parts.items()}
    pack = pack_report(reports)
    enforce_pack(pack)

    place = folder.resolve()
    beside = place.with_name(f".{place.name}.writing-{os.getpid()}")
    name = f"{packing.label}_{packing.index}"
    try:
        _start(place, beside, packing.label)
        inner = beside / packing.label
        (inner / "ckpts" / f"{name}.safetensors").write_bytes(checkpoint_bytes(parts, card.labels, card.input))
        (inner / f"{name}.py").write_text(texts.module(packing.label, packing.index), encoding="utf-8")
        clip_seconds = card.input.clip_seconds
        (inner / "resources" / "dummy.wav").write_bytes(_dummy(clip_seconds))
        check_package(beside, packing.label, packing.index, parts, card.labels)

        submission = load_model(inner / "ckpts" / f"{name}.safetensors")
        complexity = _complexity(submission)
        _enforce_official(complexity, limits or Limits())
        predictions = beside / "predictions" / name
        if predictions.exists():  # of the system that had this index before: what is not written anew would be stale
            shutil.rmtree(predictions)
        predictions.mkdir(parents=True)
        _write_json(predictions / "complexity.json", complexity)
        results = test_results(submission, packing.data, packing.settings) if packing.data else None
        if results:
            _write_json(predictions / "test_accuracy.json", {"Test Accuracy": results.test_accuracy})
            if results.test_list:
                (inner / "resources" / "test.csv").write_text(results.test_list, encoding="utf-8")
        count = None
        if packing.evaluation_set:
            count = write_output(submission, packing.evaluation_set, predictions / "output.csv")
        _write_meta(predictions / f"{name}.meta.yaml", packing, bundles, reports, complexity, results)
        _record(beside, packing, bundles, reports, submission)
        replace_folder(beside, place)
    except OSError as error:
        raise BundleError(
            f"{folder}: cannot be written: {error.strerror or error}. Free space or name another folder with --to"
        ) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return Written(folder, pack, complexity, results and results.test_accuracy, count)


def _require_label(packing: Packing) -> None:
    if not _LABEL.fullmatch(packing.label):
        raise AumError(
            f"--label {packing.label!r}: wanted letters, digits and underscores, with _task1 at the end, such as "
            "Doe_XY_task1: last name and abbreviated institute of the corresponding author"
        )
    if not 1 <= packing.index <= 4:
        raise AumError(f"--index {packing.index}: the challenge takes submissions 1 to 4 of a team")
    if GENERAL in packing.devices:
        raise AumError(f"--device {GENERAL}: is the name of the model for all other devices; give a device's name")


def _start(place: Path, beside: Path, label: str) -> None:
    """The new folder with all that does not depend on the system: of a package that stands there, a copy."""
    sources = vendored_sources(label)
    shutil.rmtree(beside, ignore_errors=True)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        found = read_record(place, label)
        if found.sources_sha256 != _sources_sha256(sources):
            raise BundleError(
                f"{place}: was written by another version of aum-compress ({found.aum_compress}), and systems of "
                "one package share their code; write all its systems anew, into a new folder"
            )
        shutil.copytree(place, beside)
        return
    inner = beside / label
    licence = _licence()
    for name, content in {**{f"aum_compress/{name}": text for name, text in sources.items()}, **licence}.items():
        target = inner / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    for package in ("", "ckpts", "resources"):
        (inner / package).mkdir(exist_ok=True)
        (inner / package / "__init__.py").write_bytes(b"")
    (beside / "setup.py").write_text(texts.setup(label), encoding="utf-8")
    (beside / "requirements.txt").write_text(texts.requirements(), encoding="utf-8")
    write_record(beside, Record(label=label, sources_sha256=_sources_sha256(sources)))


def _record(
    beside: Path,
    packing: Packing,
    bundles: Mapping[str, Bundle],
    reports: Mapping[str, BudgetReport],
    submission: Submission,
) -> None:
    """package.json with this system in it, and the README that lists all."""
    shape = (1, *submission.spec.feature_shape)
    official = {
        device: submission_complexity(get_model_for_device(submission, device), shape)
        for device in submission.model.names
    }
    models = {
        device: Costs(
            bundle_sha256=bundle.sha256,
            param_bytes=reports[device].param_bytes,
            macs=reports[device].macs,
            dcase_bytes=official[device][1],
            dcase_macs=official[device][0],
        )
        for device, bundle in bundles.items()
    }
    checkpoint = beside / packing.label / "ckpts" / f"{packing.label}_{packing.index}.safetensors"
    found = read_record(beside, packing.label).joined(packing.index, models, file_sha256(checkpoint))
    write_record(beside, found)
    text = texts.readme(packing.label, found.systems, bundles[GENERAL].card.labels)
    (beside / "README.md").write_text(text, encoding="utf-8")


def _complexity(submission: Submission) -> dict[str, Any]:
    """complexity.json as the organisers' script writes it, for its devices and those that have models of their own."""
    shape = (1, *submission.spec.feature_shape)
    by_model = {
        name: submission_complexity(get_model_for_device(submission, name), shape) for name in submission.model.names
    }
    names = dict.fromkeys((*CHALLENGE_DEVICES, *(name for name in submission.model.names if name != GENERAL)))
    per_device = {}
    for device in names:
        macs, size = by_model.get(device, by_model[GENERAL])
        per_device[device] = {"MACs": macs, "Params": size}
    return {
        "per_device": per_device,
        "max_MACs": max(cost["MACs"] for cost in per_device.values()),
        "max_Params": max(cost["Params"] for cost in per_device.values()),
    }


def _enforce_official(complexity: Mapping[str, Any], limits: Limits) -> None:
    """Raises BudgetExceeded where the organisers' script, though not our own count, puts a model over the limits."""
    problems = [
        f"{complexity[key]:,} {what}, the limit is {limit:,}"
        for key, what, limit in (
            ("max_Params", "bytes", limits.max_param_bytes),
            ("max_MACs", "MACs of one clip", limits.max_macs),
        )
        if limit is not None and complexity[key] > limit
    ]
    if problems:
        raise BudgetExceeded(
            f"over budget as the organisers' script counts: {'; '.join(problems)}. It knows no width below 8 bits, and "
            "adds biases and norms to the MACs; make the model smaller"
        )


def _write_meta(
    path: Path,
    packing: Packing,
    bundles: Mapping[str, Bundle],
    reports: Mapping[str, BudgetReport],
    complexity: dict[str, Any],
    results: TestResults | None,
) -> None:
    costs = {
        "total_model_size": complexity["max_Params"],
        "total_parameters": max(report.params for report in reports.values()),
        "macs": complexity["max_MACs"],
    }
    measured = results.for_meta if results else {}
    content = meta_information(f"{packing.label}_{packing.index}", bundles, costs, measured, packing.meta)
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _dummy(clip_seconds: float) -> bytes:
    """One clip of quiet noise: the organisers' script wants a file for the shape of its features."""
    samples = 0.01 * np.random.default_rng(0).standard_normal(round(clip_seconds * _DUMMY_RATE_HZ))
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, _DUMMY_RATE_HZ, format="WAV", subtype="PCM_24")
    return buffer.getvalue()


def _licence() -> dict[str, bytes]:
    """The licence of the copied sources: beside a source checkout, or what was installed with the package."""
    checkout = Path(aum_compress.__file__).parent.parent
    if (checkout / "pyproject.toml").is_file():
        return {"aum_compress/LICENSE": (checkout / "LICENSE").read_bytes()}
    files = importlib.metadata.files("aum-compress") or []
    found = next((file for file in files if file.name == "LICENSE"), None)
    return {"aum_compress/LICENSE": found.read_binary()} if found else {}


def _sources_sha256(sources: Mapping[str, bytes]) -> str:
    return json_sha256({name: hashlib.sha256(content).hexdigest() for name, content in sources.items()})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
