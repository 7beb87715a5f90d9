"""Proof that an exported file computes what its torch model computes: names, then shapes, then weights, then values."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime import InferenceSession

from aum_compress.audio.config import InputSpec
from aum_compress.bundle import GOLDEN
from aum_compress.export.metadata import WAVEFORM
from aum_compress.export.onnx_file import load_onnx
from aum_compress.export.runtime import open_session, read_metadata, run_session
from aum_compress.export.verification import ITSELF, TOLERANCES, Check, Tolerance, Verification, compare, finding
from aum_compress.export.verify_inputs import Golden, read_golden, stress_inputs
from aum_compress.export.verify_structure import (
    check_card,
    check_identity,
    check_metadata,
    check_names,
    check_shapes,
    check_weights,
)
from aum_compress.export.verify_waveform import (
    NOISE_BESIDE_TONES,
    front_end_checks,
    stress_waveforms,
    training_features,
)
from aum_compress.export.waveform_input import split_front_end
from aum_compress.models import mamba, mamba2, scan
from aum_compress.models.factory import Model
from aum_compress.models.ssd import ssd_oracle
from aum_compress.processor import exact_int8_products

_SATURATED_DB, _SATURATION_GAP_DB = 35.0, 10.0
_BATCHES = (2, 3)

Sessions = Mapping[bool, InferenceSession]
"""Graph optimisation on -> session."""


@dataclass(frozen=True)
class Reference:
    """What a file must be equal to."""

    model: Model
    """In evaluation mode. For an fp16 file the rounded model (`round_to_half`), for int8 the quantised one."""
    labels: tuple[str, ...]
    input: InputSpec


GOLDEN_ALONE = (
    "golden logits alone: labels, values of the front-end and each weight by itself were compared with nothing; give "
    "--reference BUNDLE, or leave the file in the folder of its export"
)
"""What a verdict without reference and card is worth."""


def verify_onnx(
    path: Path,
    reference: Reference | None = None,
    *,
    golden: Golden | None = None,
    clips: np.ndarray | None = None,
    waveforms: np.ndarray | None = None,
) -> Verification:
    """Runs `path` in onnxruntime, its graph optimisation off and on, and compares it with everything there is.

    With a reference: its labels, front-end and each weight by name, then its logits for random, silent and full-scale
    inputs and for `clips`, and the oracle scan's as a second opinion. With or without one: golden logits, given or
    standing beside the file, and hash, labels and front-end of the bundle card beside it. With none of these, optimised
    values are compared with those as written, which finds what is broken but not what is wrong.

    A file that reads waveforms is taken apart: its model is held against all this, its front-end against the one of
    training on waveforms of every kind, and then the whole file against both in a row.

    Args:
        clips: features (B,1,F,T) of real recordings.
        waveforms: (B,S) real recordings at `metadata.waveform_rate_hz`, for a file that reads them.

    Raises:
        ModelFileError: a file that cannot be judged at all: no ONNX, cut short, of another opset, without metadata.
    """
    proto = load_onnx(path)
    whole = _sessions(path)
    metadata = read_metadata(whole[False], path)
    front_end, core = split_front_end(proto, metadata) if metadata.reads == WAVEFORM else (None, None)
    alone = None if front_end is None else _sessions(path, front_end)
    if golden is None and (path.parent / GOLDEN).is_file():
        golden = read_golden(path.parent / GOLDEN, metadata.precision)
    model = None if reference is None else reference.model

    checks = [check_names(whole[False], metadata), check_metadata(whole[False], metadata)]
    inputs: dict[str, np.ndarray] = {}
    if checks[-1].passed:  # else there is no front-end to make them, and nothing to hold shapes against
        inputs |= {} if golden is None else {"golden": golden.inputs}
        inputs |= stress_inputs(metadata) | ({} if clips is None else {"clips": clips})
        checks.append(check_shapes(whole[False], alone and alone[False], metadata))
        checks.append(_fit(inputs, metadata.feature_shape))
    runnable = all(check.passed for check in checks)
    carded = check_card(path, metadata)
    checks += carded
    if reference is not None:
        checks += check_identity(metadata, reference.labels, reference.input, "the reference")
        checks.append(check_weights(proto, reference.model))
    if runnable:
        sessions = whole if core is None else _sessions(path, core)
        limits = {optimised: TOLERANCES[metadata.precision, optimised] for optimised in sessions}
        checks += _value_checks(sessions, limits, inputs, golden, model)
        checks += _batch_checks(sessions, limits, inputs["random"])
        if alone is not None:
            stress = stress_waveforms(metadata) | ({} if waveforms is None else {"recordings": waveforms})
            features = {name: training_features(samples, metadata) for name, samples in stress.items()}
            checks += front_end_checks(alone, stress, features, metadata)
            # cells that hold a transform's rounding noise alone have been judged; what follows need not magnify it
            features |= {name: run_session(alone[False], stress[name]) for name in NOISE_BESIDE_TONES}
            checks += _whole_checks(whole, limits, stress, features, model or sessions[False])
    against = ["the torch model"] * (model is not None) + ["golden logits"] * (golden is not None)
    return Verification(
        path,
        metadata.precision,
        " and ".join(against) or ITSELF,
        tuple(checks),
        (*saturation_notes(checks), *([GOLDEN_ALONE] if against == ["golden logits"] and not carded else [])),
    )


def _sessions(path: Path, part: onnx.ModelProto | None = None) -> Sessions:
    """The file, or a part of it."""
    content = None if part is None else part.SerializeToString()
    return {
        optimised: open_session(path, optimise=optimised, intra_op_num_threads=1, content=content)
        for optimised in (False, True)
    }


def _fit(inputs: Mapping[str, np.ndarray], feature_shape: tuple[int, ...]) -> Check:
    problems = [
        f"{name}: features of shape {features.shape}, wanted (batch, *{list(feature_shape)})"
        for name, features in inputs.items()
        if features.shape[1:] != feature_shape
    ]
    return finding("inputs", problems)


def _value_checks(
    sessions: Sessions,
    limits: Mapping[bool, Tolerance],
    inputs: Mapping[str, np.ndarray],
    golden: Golden | None,
    model: Model | None,
) -> Iterator[Check]:
    for name, features in inputs.items():
        written = run_session(sessions[False], features)
        if name == "golden":
            expected = golden.logits
        else:
            expected = written if model is None else _logits(model, features)
        yield compare(name, written, expected, limits[False].on(name), optimised=False)
        yield compare(name, run_session(sessions[True], features), expected, limits[True].on(name), optimised=True)
        if model is not None and name != "clips" and _scans(model):
            with oracle_scan():
                opinion = _logits(model, features)
            yield compare(f"{name} by the oracle scan", written, opinion, limits[False], optimised=False)


def _whole_checks(
    sessions: Sessions,
    limits: Mapping[bool, Tolerance],
    waveforms: Mapping[str, np.ndarray],
    features: Mapping[str, np.ndarray],
    model: Model | InferenceSession,
) -> Iterator[Check]:
    """From waveform to logits in one file, against the model on `features`."""
    for name, samples in waveforms.items():
        by_session = isinstance(model, InferenceSession)
        expected = run_session(model, features[name]) if by_session else _logits(model, features[name])
        for optimised, session in sessions.items():
            found = run_session(session, samples)
            title = f"waveform, {name}"
            yield compare(title, found, expected, limits[optimised].on(title), optimised=optimised)


def _batch_checks(sessions: Sessions, limits: Mapping[bool, Tolerance], features: np.ndarray) -> Iterator[Check]:
    """Where the batch axis is open: a batch gives what its inputs give one by one."""
    for optimised, session in sessions.items():
        if isinstance(session.get_inputs()[0].shape[0], int):
            continue
        alone = np.concatenate([run_session(session, one) for one in np.split(features, len(features))])
        for size in _BATCHES:
            together = run_session(session, features[:size])
            yield compare(f"batch of {size}", together, alone[:size], limits[optimised], optimised=optimised)


def saturation_notes(checks: list[Check]) -> Iterator[str]:
    """Inputs on which this machine's integer kernels, where they can saturate, are far worse than the file's own
    arithmetic."""
    if exact_int8_products():
        return
    written = {check.name: check.sqnr_db for check in checks if check.optimised is False}
    for check in checks:
        before = written.get(check.name)
        if not check.optimised or check.sqnr_db is None or before is None:
            continue
        if check.sqnr_db < _SATURATED_DB and before - check.sqnr_db > _SATURATION_GAP_DB:
            yield (
                f"{check.name}: {check.sqnr_db:.1f} dB optimised, {before:.1f} dB as written: int8 kernels of x86 "
                "processors without VNNI saturate when weights use all 8 bits. The file is right on VNNI and ARM; for "
                "this processor quantise weights to 7 bits"
            )


def _logits(model: Model, features: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(features)).numpy()


def _scans(model: Model) -> bool:
    return any(isinstance(module, mamba.MambaMixer | mamba2.Mamba2Mixer) for module in model.modules())


@contextmanager
def oracle_scan() -> Iterator[None]:
    """Lets every mixer run the definition in place of the kernel and of the matmul form."""
    kernel, matmul_form = scan.selective_scan, mamba2.ssd
    scan.selective_scan, mamba2.ssd = scan.selective_scan_oracle, ssd_oracle
    try:
        yield
    finally:
        scan.selective_scan, mamba2.ssd = kernel, matmul_form
