"""`aum-compress export`: one bundle, or one exported file, without a recipe or data."""

import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from aum_compress.budget.check import check_model
from aum_compress.budget.records import Limits
from aum_compress.bundle import CARD, GOLDEN, RECIPE, Bundle, ParentRef, now, read_bundle, tool_versions, write_bundle
from aum_compress.errors import BundleError
from aum_compress.export.metadata import FEATURES, WAVEFORM, OnnxMetadata, Reads
from aum_compress.export.model_card import MODEL_CARD, model_card
from aum_compress.export.onnx_file import make_plain_folder
from aum_compress.export.onnx_writer import export_onnx
from aum_compress.export.scan_forms import ScanForm
from aum_compress.export.verify import Reference, verify_onnx
from aum_compress.export.verify_inputs import golden_file, read_golden
from aum_compress.export.waveform_input import write_waveform_file
from aum_compress.models.quantized import stored_tensors
from aum_compress.models.storage import QUANTISED
from aum_compress.publish import BUDGET_KEYS, file_name, gated_precision, measured_accuracy, ort_files, torch_models


@dataclass(frozen=True)
class ExportOptions:
    """What `export_bundle` writes."""

    precisions: tuple[str, ...]
    inputs: tuple[Reads, ...] = (FEATURES, WAVEFORM)
    input_rate_hz: int | None = None
    """Of the waveform; the front-end's own rate when left out."""
    dynamic_batch: bool = False
    scan: ScanForm = "scan"
    ort: bool = False
    """Each file in ORT format too, and the operators of a reduced build."""


def export_bundle(bundle: Bundle, folder: Path, options: ExportOptions) -> Bundle:
    """Exports and verifies the model of one bundle, without a recipe or data: `folder` becomes a bundle of kind onnx.

    Raises:
        BundleError: a quantised precision that is not the model's, a float precision from a quantised model, or a
            `folder` that holds a model.
        VerificationFailed: nothing is written then.
    """
    card, precisions = bundle.card, options.precisions
    able = (card.precision,) if card.precision in QUANTISED else ("fp32", "fp16")
    if wrong := [precision for precision in precisions if precision not in able]:
        raise BundleError(
            f"{bundle.path}: holds {card.precision} and exports as {' and '.join(able)}, not {', '.join(wrong)}"
        )
    _keep_models(bundle, folder)
    models = torch_models(bundle, bundle, precisions)
    golden = golden_file(bundle.golden()[0], models)
    with tempfile.TemporaryDirectory() as beside:
        files: dict[str, bytes | Path] = {GOLDEN: golden}
        if RECIPE in card.files:
            files[RECIPE] = bundle.path / RECIPE
        limits = Limits(**{"max_param_bytes": None} | card.budget["limits"]) if card.budget else Limits()
        budgets = {}
        for precision, model in models.items():
            report = check_model(model, card.input, stored_tensors(model, half=precision != "fp32"), limits)
            budgets[precision] = report.to_dict()
            metadata = OnnxMetadata(
                labels=card.labels,
                input=card.input.model_dump(),
                precision=precision,
                budget={key: budgets[precision][key] for key in BUDGET_KEYS},
                metrics=measured_accuracy(bundle),
                recipe=card.recipe,
                recipe_sha256=card.files.get(RECIPE, ""),
                parent_sha256=bundle.sha256,
            )
            targets = {reads: Path(beside) / file_name(precision, reads) for reads in (FEATURES, WAVEFORM)}
            export_onnx(model, targets[FEATURES], metadata, dynamic_batch=options.dynamic_batch, scan=options.scan)
            if WAVEFORM in options.inputs:
                write_waveform_file(targets[FEATURES], targets[WAVEFORM], options.input_rate_hz)
            for reads in options.inputs:
                verify_onnx(targets[reads], Reference(model, card.labels, card.input)).enforce()
                files[targets[reads].name] = targets[reads]
        if options.ort:
            files |= ort_files(Path(beside), files)
        files[MODEL_CARD] = model_card([path for name, path in files.items() if name.endswith(".onnx")]).encode()
        exported = card.model_copy(
            update={
                "kind": "onnx",
                "stage": "export",
                "inputs_sha256": "",  # what a stage has read: no recipe may take this for its stage's result
                "parent": ParentRef(path=os.path.relpath(bundle.path, folder), sha256=bundle.sha256),
                "model": models[gated_precision(precisions)].config,
                "precision": gated_precision(precisions),
                "budget": budgets[gated_precision(precisions)],
                "versions": tool_versions(),
                "created": now(),
            }
        )
        return write_bundle(folder, exported, files)


def _keep_models(bundle: Bundle, folder: Path) -> None:
    """An export can be made again from its model, a model only by training: none is ever replaced by its export.

    Raises:
        BundleError: `folder` is the bundle itself, or holds another model.
    """
    if folder.resolve() == bundle.path.resolve():
        raise BundleError(f"--to {folder}: is the bundle to be exported, which would be lost; name a new folder")
    if (folder / CARD).is_file() and (there := read_bundle(folder).card).kind == "model":
        raise BundleError(
            f"--to {folder}: holds the model of stage {there.stage} of recipe {there.recipe}, which would be lost; "
            "name a new folder, or one with an earlier export"
        )


def add_front_end(source: Path, folder: Path, input_rate_hz: int | None) -> tuple[Path, bool]:
    """Writes to `folder` the exported file at `source` with its front-end inside, `<name>-waveform.onnx`.

    The source is verified first, and the new file on the golden arrays that stand beside the source, so that a wrong
    model does not pass because it is compared with itself.

    A card for people and those arrays go beside it, where there are none yet.

    Returns:
        the new file, and whether there were golden arrays to hold the model against.

    Raises:
        BundleError: a `folder` that is a bundle.
        ModelFileError: as `write_waveform_file`.
        VerificationFailed: the source or the new file is wrong; nothing is written then.
    """
    target = folder / f"{source.stem}-waveform.onnx"
    make_plain_folder(folder)
    verified = verify_onnx(source)
    verified.enforce()
    stored = source.parent / GOLDEN
    golden = read_golden(stored, verified.precision) if stored.is_file() else None
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        written = Path(beside) / target.name
        write_waveform_file(source, written, input_rate_hz)
        replace(verify_onnx(written, golden=golden), path=target).enforce()
        os.replace(written, target)
    for name, content in ((MODEL_CARD, model_card([target]).encode()), (GOLDEN, golden and stored.read_bytes())):
        if content and not (folder / name).exists():  # what lies there is of an export of its own
            (folder / name).write_bytes(content)
    return target, golden is not None
