"""Budget of an ONNX file, ours or not. Torch-free."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from aum_compress.audio.config import InputSpec
from aum_compress.budget.analytic import analytic_macs, front_end_macs
from aum_compress.budget.onnx_bytes import explain_bytes
from aum_compress.budget.onnx_file import file_bytes, input_record, read_onnx
from aum_compress.budget.onnx_graph import measure_graph
from aum_compress.budget.onnx_stored import onnx_stored
from aum_compress.budget.records import BudgetReport, LayerCost, Limits, Operations, Stored, agree, per_second
from aum_compress.errors import AumError
from aum_compress.models.config import AudioMambaConfig, CPMobileConfig


def check_onnx(
    path: Path,
    limits: Limits | None = None,
    *,
    config: AudioMambaConfig | CPMobileConfig | None = None,
    stored: Mapping[str, tuple[int, str]] | None = None,
    clip_seconds: float | None = None,
    dims: Mapping[str, int] | None = None,
    trips: Mapping[str, int] | None = None,
) -> BudgetReport:
    """The budget of one run of the graph, taken to be one clip.

    Args:
        limits: DCASE's when left out.
        config: of the model that was exported; the count from it must then agree with the graph's, layer by layer.
        stored: bytes and type of each tensor of the bundle that was exported (`onnx_bytes.bundle_sizes`); what the
            file stores must then follow from them, to the byte.
        clip_seconds: length of a clip, of a file whose metadata state none; then 1 s when left out, with a note.
        dims: size of each symbolic input dimension; a leading one not named here is a batch of one.
        trips: name of a Loop, or of one of its outputs -> trips to count; needed where their number depends on values.

    Raises:
        ModelFileError: not an ONNX file, cut short, weights beside it absent, a dimension without a value, a Loop whose
            trips are unknown.
        AumError: an operator whose cost is unknown, two counts that differ, or a file that states another clip length.
    """
    model = read_onnx(path)
    measured = measure_graph(model, str(path), dims, trips)
    found = onnx_stored(model)
    layers, operations = found.layers, measured.operations
    spec = _input_spec(input_record(model))
    notes = [*measured.notes]
    if found.structure_bytes:
        notes.append(
            f"{found.structure_bytes:,} bytes of shapes, axes and single constants are structure, not parameters"
        )
    if stored is not None:
        notes.append(explain_bytes(model, stored, str(path)).summary)
    if clip_seconds is None:
        clip_seconds = 1.0 if spec is None else spec.clip_seconds
        if spec is None:
            notes.append("the file does not say how long a clip is: one run is taken to be 1 s of audio")
    if clip_seconds <= 0:
        raise AumError(f"{path}: clip_seconds: found {clip_seconds}, wanted a positive number")
    if spec is not None and clip_seconds != spec.clip_seconds:  # a longer clip would spread the MACs thinner
        raise AumError(
            f"{path}: clip_seconds: found {clip_seconds:g}, wanted {spec.clip_seconds:g}, the clip length that the "
            "file states; leave it (--clip-seconds on the command line) out"
        )
    front_end = None if spec is None else front_end_macs(spec)  # an estimate of what is computed before the graph
    if measured.front_end is not None:
        front_end = per_second(measured.front_end.macs, clip_seconds)
        notes.append("the front-end is part of the file; its bytes and MACs stand apart and are not gated")
    witnesses = {"ONNX graph": {name: own.macs for name, own in operations.items()}}
    if config is not None:
        witnesses["configuration"] = analytic_macs(config)
        agree(witnesses)
    names = dict.fromkeys((*layers, *operations))
    return BudgetReport(
        layers=tuple(_layer(name, layers.get(name, Stored()), operations.get(name, Operations())) for name in names),
        limits=limits or Limits(),
        clip_seconds=clip_seconds,
        witnesses=tuple(witnesses),
        front_end_macs=front_end,
        front_end_bytes=found.front_end_bytes,
        peak_activation_bytes=measured.peak_activation_bytes,
        file_bytes=file_bytes(path, model),
        notes=tuple(notes),
    )


def _layer(name: str, stored: Stored, operations: Operations) -> LayerCost:
    kind = operations.kind or "stored"
    return LayerCost(
        name, kind, stored.param_bytes, stored.params, operations.macs, operations.elementwise, stored.wide_params
    )


def _input_spec(record: dict | None) -> InputSpec | None:
    try:
        return None if record is None else InputSpec.model_validate(record)
    except ValidationError:
        return None
