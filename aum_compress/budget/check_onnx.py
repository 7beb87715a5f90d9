"""Budget of an ONNX file, ours or not. Torch-free."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from aum_compress.audio.config import InputSpec
from aum_compress.budget.analytic import analytic_macs, front_end_macs
from aum_compress.budget.onnx_file import input_record, open_batch, read_onnx
from aum_compress.budget.onnx_graph import onnx_operations, onnx_stored
from aum_compress.budget.records import BudgetReport, LayerCost, Limits, Operations, Stored, agree
from aum_compress.errors import AumError
from aum_compress.models.config import AudioMambaConfig, CPMobileConfig


def check_onnx(
    path: Path,
    limits: Limits | None = None,
    *,
    config: AudioMambaConfig | CPMobileConfig | None = None,
    clip_seconds: float | None = None,
    dims: Mapping[str, int] | None = None,
) -> BudgetReport:
    """The budget of one run of the graph, taken to be one clip.

    Args:
        limits: DCASE's when left out.
        config: of the model that was exported; the count from it must then agree with the graph's, layer by layer.
        clip_seconds: length of a clip; when left out, what the file's own metadata say, else 1 s, with a note.
        dims: size of each symbolic input dimension; a leading one not named here is a batch of one.

    Raises:
        ModelFileError: not an ONNX file, cut short, weights beside it absent, a dimension without a value.
        AumError: an operator whose cost is unknown, or two counts that differ.
    """
    model = read_onnx(path)
    operations = onnx_operations(model, str(path), dims)
    stored, left_out = onnx_stored(model)
    spec = _input_spec(input_record(model))
    notes = []
    if left_out:
        notes.append(f"{left_out:,} bytes of shapes, axes and single constants are structure, not parameters")
    if any(node.op_type == "Scan" for node in model.graph.node):
        notes.append("products around a Scan of another maker are elementwise here: its MACs are a lower bound")
    if batch := open_batch(model, dims or {}):
        notes.append(f"input {', '.join(batch)} is open in its first axis: counted for a batch of one")
    if clip_seconds is None:
        clip_seconds = 1.0 if spec is None else spec.clip_seconds
        if spec is None:
            notes.append("the file does not say how long a clip is: one run is taken to be 1 s of audio")
    if clip_seconds <= 0:
        raise AumError(f"{path}: clip_seconds: found {clip_seconds}, wanted a positive number")
    witnesses = {"ONNX graph": {name: own.macs for name, own in operations.items()}}
    if config is not None:
        witnesses["configuration"] = analytic_macs(config)
        agree(witnesses)
    names = dict.fromkeys((*stored, *operations))
    return BudgetReport(
        layers=tuple(_layer(name, stored.get(name, Stored()), operations.get(name, Operations())) for name in names),
        limits=limits or Limits(),
        clip_seconds=clip_seconds,
        witnesses=tuple(witnesses),
        front_end_macs=None if spec is None else front_end_macs(spec),
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
