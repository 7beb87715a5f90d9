"""`aum-compress verify`: one exported file or a whole exported bundle, with a reference where there is one."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from aum_compress.bundle import CARD, Bundle, read_bundle
from aum_compress.errors import BundleError
from aum_compress.evaluate.measure import Request, evaluate
from aum_compress.export.metadata import WAVEFORM, OnnxMetadata
from aum_compress.export.onnx_writer import fold_if_needed, round_to_half
from aum_compress.export.runtime import clip_features, clip_input, open_session, read_metadata
from aum_compress.export.verification import Check, Verification, compare_accuracy
from aum_compress.export.verify import Reference, verify_onnx
from aum_compress.models.storage import QUANTISED

_RUNNABLE = ("names", "metadata", "shapes", "inputs")
"""Checks without which no file can be run on clips."""


def verify_target(
    target: Path,
    reference: Path | None,
    recordings: list[Path],
    data: str | None = None,
    settings: list[str] | None = None,
) -> list[Verification]:
    """Verdicts on `target`: a .onnx file, or all files of an exported bundle.

    Args:
        reference: a bundle of kind model whose numbers the files must hold: the quantised one for quantised files,
            one in float32 for the others.
        recordings: audio whose windows are compared as well.
        data: labelled audio, or a recipe, on whose test part each file must be as accurate as the reference.
        settings: `section.key=value` for a recipe.

    Raises:
        AumError: nothing to judge there, an unreadable recording, a reference of the wrong kind, or data without one.
    """
    if data is not None and reference is None:
        raise BundleError(f"--data {data}: accuracy is held against a reference's: name its bundle, --reference BUNDLE")
    files = [target]
    if target.is_dir() or target.name == CARD:
        bundle = read_bundle(target if target.is_dir() else target.parent)
        files = sorted(bundle.path / name for name in bundle.card.files if name.endswith(".onnx"))
        if not files:
            raise BundleError(f"{target}: holds no ONNX file; aum-compress export {target} --to DIR makes one")
    model = read_bundle(reference) if reference else None
    results = []
    for file in files:
        metadata = read_metadata(open_session(file), file)
        clips = _features(recordings, metadata) if recordings else None
        waveforms = _waveforms(recordings, metadata) if recordings and metadata.reads == WAVEFORM else None
        verified = verify_onnx(file, _reference(model, metadata), clips=clips, waveforms=waveforms)
        if data is not None and reference is not None and all(c.passed for c in verified.checks if c.name in _RUNNABLE):
            checks = (*verified.checks, _accuracy(file, reference, Request(data, settings or [], draws=0), metadata))
            verified = replace(verified, checks=checks)
        results.append(verified)
    return results


def _accuracy(file: Path, reference: Path, request: Request, metadata: OnnxMetadata) -> Check:
    found, wanted = (evaluate(model, request).metrics for model in (file, reference))
    accuracies = (found["overall_accuracy"], wanted["overall_accuracy"])
    return compare_accuracy(Path(request.data).name, found["clips"], *accuracies, metadata.precision)


def _reference(bundle: Bundle | None, metadata: OnnxMetadata) -> Reference | None:
    if bundle is None:
        return None
    model = bundle.load_model()
    quantised = {name if name in QUANTISED else "float" for name in (bundle.card.precision, metadata.precision)}
    if len(quantised) > 1:
        raise BundleError(
            f"{bundle.path}: holds {bundle.card.precision}: no reference for a file of {metadata.precision}; "
            "quantised files come from the quantize stage, the others from the stage before"
        )
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
