"""`aum-compress verify`: one exported file or a whole exported bundle, with references where there are some."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from aum_compress.bundle import CARD, Bundle, read_bundle
from aum_compress.errors import BundleError
from aum_compress.evaluate.measure import Request, evaluate
from aum_compress.export.metadata import WAVEFORM, OnnxMetadata
from aum_compress.export.onnx_writer import fold_if_needed, round_to_half
from aum_compress.export.runtime import clip_features, clip_input, open_session, read_metadata
from aum_compress.export.verification import Check, NotJudged, Verification, compare_accuracy
from aum_compress.export.verify import Reference, verify_onnx
from aum_compress.models.storage import QUANTISED

_RUNNABLE = ("names", "metadata", "shapes", "inputs")
"""Checks without which no file can be run on clips."""


def verify_target(
    target: Path,
    references: list[Path],
    recordings: list[Path],
    data: str | None = None,
    settings: list[str] | None = None,
) -> tuple[list[Verification], list[NotJudged]]:
    """Verdicts on `target`: a .onnx file, or all files of an exported bundle.

    Args:
        references: bundles of kind model whose numbers the files must hold: a quantised one judges the files of its
            precision, one in float32 those in fp32 and fp16. Without any, files are judged by what lies beside them.
        recordings: audio whose windows are compared as well.
        data: labelled audio, or a recipe, on whose test part each judged file must be as accurate as its reference.
        settings: `section.key=value` for a recipe.

    Returns:
        the verdicts, and the files that no reference can judge.

    Raises:
        AumError: nothing to judge there, an unreadable recording, references of which none or several fit, or data
            without one.
    """
    if data is not None and not references:
        raise BundleError(f"--data {data}: accuracy is held against a reference's: name its bundle, --reference BUNDLE")
    files = [target]
    if target.is_dir() or target.name == CARD:
        bundle = read_bundle(target if target.is_dir() else target.parent)
        files = sorted(bundle.path / name for name in bundle.card.files if name.endswith(".onnx"))
        if not files:
            raise BundleError(f"{target}: holds no ONNX file; aum-compress export {target} --to DIR makes one")
    models = _by_kind(references)
    stated = {file: read_metadata(open_session(file), file) for file in files}
    fitting = {file: models.get(_kind(metadata.precision)) for file, metadata in stated.items()}
    if models and not any(fitting.values()):
        _refuse(models, stated)
    accuracy = cache(partial(_accuracy, Request(data, settings or [], draws=0))) if data is not None else None
    results, others = [], []
    for file, metadata in stated.items():
        model = fitting[file]
        if models and model is None:
            others.append(NotJudged(file, metadata.precision))
            continue
        clips = _features(recordings, metadata) if recordings else None
        waveforms = _waveforms(recordings, metadata) if recordings and metadata.reads == WAVEFORM else None
        verified = verify_onnx(file, _reference(model, metadata), clips=clips, waveforms=waveforms)
        if accuracy and model and all(check.passed for check in verified.checks if check.name in _RUNNABLE):
            check = _compared(data, accuracy(file), accuracy(model.path), metadata)
            verified = replace(verified, checks=(*verified.checks, check))
        results.append(verified)
    return results, others


def _kind(precision: str) -> str:
    """What files and references of one precision have in common: a float model is stored in fp32 or fp16."""
    return precision if precision in QUANTISED else "float"


def _by_kind(references: list[Path]) -> dict[str, Bundle]:
    found: dict[str, Bundle] = {}
    for path in references:
        bundle = read_bundle(path)
        first = found.setdefault(_kind(bundle.card.precision), bundle)
        if first is not bundle:
            raise BundleError(
                f"--reference {path}: holds {bundle.card.precision}, and files of it are judged by {first.path} "
                "already; wanted one reference for each kind of file"
            )
    return found


def _refuse(models: Mapping[str, Bundle], stated: Mapping[Path, OnnxMetadata]) -> None:
    """Raises BundleError: no reference can judge any file."""
    held = "; ".join(f"{bundle.path}: holds {bundle.card.precision}" for bundle in models.values())
    wanted = " or ".join(sorted({metadata.precision for metadata in stated.values()}))
    raise BundleError(
        f"{held}: no reference for a file of {wanted}; quantised files come from the quantize stage, the others from "
        "the stage before"
    )


def _accuracy(request: Request, model: Path) -> dict[str, Any]:
    return evaluate(model, request).metrics


def _compared(data: str, found: Mapping[str, Any], wanted: Mapping[str, Any], metadata: OnnxMetadata) -> Check:
    accuracies = (found["overall_accuracy"], wanted["overall_accuracy"])
    return compare_accuracy(Path(data).name, found["clips"], *accuracies, metadata.precision)


def _reference(bundle: Bundle | None, metadata: OnnxMetadata) -> Reference | None:
    if bundle is None:
        return None
    model = bundle.load_model()
    if metadata.precision == "fp16":
        model = round_to_half(model)
    return Reference(fold_if_needed(model), bundle.card.labels, bundle.card.input)


def _features(recordings: list[Path], metadata: OnnxMetadata) -> np.ndarray:
    """(B,1,F,T) of the first window of each recording."""
    from aum_compress.audio.reading import read_audio

    clips = (read_audio(path, metadata.sample_rate_hz, duration_seconds=metadata.clip_seconds) for path in recordings)
    return np.concatenate([clip_features(clip, metadata) for clip in clips])


def _waveforms(recordings: list[Path], metadata: OnnxMetadata) -> np.ndarray:
    """(B,S) of the same windows, as the file reads them."""
    from aum_compress.audio.reading import read_audio

    rate, seconds = metadata.waveform_rate_hz, metadata.clip_seconds
    clips = (read_audio(path, rate, duration_seconds=seconds) for path in recordings)
    return np.concatenate([clip_input(clip, metadata) for clip in clips])
