"""The one model definition, written as ONNX."""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnxscript import opset18
from torch import Tensor

from aum_compress import __version__
from aum_compress.errors import ModelFileError
from aum_compress.export.metadata import FEATURES, OnnxMetadata
from aum_compress.export.onnx_blocks import outline_blocks
from aum_compress.export.onnx_cleanup import store_half, store_int4, tidy
from aum_compress.export.onnx_compact import compact
from aum_compress.export.onnx_file import INT4_OPSET, IR_VERSION, OPSET, write_whole
from aum_compress.export.scan_forms import ScanForm
from aum_compress.export.scan_function import SCAN_DOMAIN, SCAN_VERSION, ScanKind, scan_function, scan_name
from aum_compress.export.ssd_function import SSD_NAMES, ssd_function
from aum_compress.models.factory import Model, fold_batch_norm, folded_config
from aum_compress.models.quantized import quantized_layers, round_to_half_, stored_tensors
from aum_compress.models.storage import WEIGHT_BITS

OUTPUT_NAME = "logits"


def export_onnx(
    model: Model, path: Path, metadata: OnnxMetadata, *, dynamic_batch: bool = False, scan: ScanForm = "scan"
) -> None:
    """Writes `model` to `path`: input `features` (1,1,F,T), output `logits` (1,C), both float32.

    All arithmetic is float32. Every precision but fp32 stores float tensors as float16 where that loses nothing, which
    for fp16 means a model that `round_to_half` made. The same model and metadata give the same bytes.

    Args:
        model: in evaluation mode, on the CPU; batch normalisation is folded here if that has not been done.
        dynamic_batch: leave the first axis of both open instead of fixing it at 1.
        scan: how the recurrence of Mamba-1 blocks is written (`scan_forms`); all forms compute the same.

    Raises:
        ModelFileError: metadata that does not fit the model, or a path that cannot be written; nothing half-written
            stays there.
    """
    _check_fit(model, path, metadata)
    model = fold_if_needed(model)
    stored = stored_tensors(model, half=metadata.precision != "fp32")
    narrow = {f"{name}.weight" for name, storage in quantized_layers(model).items() if WEIGHT_BITS.get(storage) == 4}
    opset = INT4_OPSET if narrow else OPSET
    functions = _Functions(scan, opset)
    exported = _trace(model, dynamic_batch, functions)
    tidy(exported, stored.keys())
    store_int4(exported, narrow)
    if metadata.precision != "fp32":
        store_half(exported, {name for name, tensor in stored.items() if tensor.dtype == torch.float16})
    write_whole(_finished(exported, metadata, functions), path)


def fold_if_needed(model: Model) -> Model:
    """`model`, or a copy with batch normalisation folded where it has any: what is exported."""
    return model if model.config == folded_config(model.config) else fold_batch_norm(model)


def round_to_half(model: Model) -> Model:
    """A copy, batch normalisation folded, whose float tensors are rounded to float16 values but stay float32 tensors.

    It is what an fp16 file computes: the file stores these values in two bytes each and calculates in float32.
    Quantisation scales are left alone.

    Raises:
        ModelFileError: a value beyond float16's 65,504, with the tensor named.
    """
    rounded = deepcopy(fold_if_needed(model))
    round_to_half_(rounded)
    return rounded


def _check_fit(model: Model, path: Path, metadata: OnnxMetadata) -> None:
    config = model.config
    if metadata.reads != FEATURES:
        raise ModelFileError(f"{path}: a model reads features; write_waveform_file puts the front-end before its file")
    if (wanted := (1, config.n_mels, config.n_frames)) != metadata.feature_shape:
        raise ModelFileError(
            f"{path}: the model reads features of shape {wanted}, the metadata's front-end makes "
            f"{metadata.feature_shape}: pass the input specification that the model was trained with"
        )
    if config.n_classes != len(metadata.labels):
        raise ModelFileError(
            f"{path}: the model has {config.n_classes} classes, the metadata {len(metadata.labels)} labels"
        )
    if model.training:
        raise ModelFileError(f"{path}: the model is in training mode: call model.eval() before exporting it")


def _trace(model: Model, dynamic_batch: bool, functions: "_Functions") -> ir.Model:
    # a dynamic axis of example size 1 would be taken for a constant
    example = torch.zeros(2 if dynamic_batch else 1, 1, model.config.n_mels, model.config.n_frames)
    axes = ({0: torch.export.Dim("batch")},) if dynamic_batch else None
    with _quiet(), torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=axes, strict=False)
        program = program.run_decompositions(
            {
                torch.ops.aum_compress.selective_scan.default: functions.selective_scan,
                torch.ops.aum_compress.two_way_scan.default: functions.two_way_scan,
                torch.ops.aum_compress.ssd.default: functions.ssd,
                torch.ops.aten.softplus.default: _softplus,
            }
        )
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=functions.opset,
            optimize=False,  # it would fold the model's tensors away; `tidy` does not
            input_names=[FEATURES],
            output_names=[OUTPUT_NAME],
            custom_translation_table={
                torch.ops.aum_compress.quantize_dequantize.default: _quantize_dequantize,
                torch.ops.aum_compress.dequantize_weight.default: _dequantize_weight,
                torch.ops.aum_compress.round_bias.default: _round_bias,
            },
            verbose=False,
        )
    if dynamic_batch:
        for value in (*exported.model.graph.inputs, *exported.model.graph.outputs):
            value.shape = ir.Shape(["batch", *value.shape[1:]])
    return exported.model


class _Functions:
    """What torch's mixing operators become: calls of model-local functions, which are collected here."""

    def __init__(self, form: ScanForm, opset: int) -> None:
        self.form, self.opset = form, opset
        self.called: dict[str, onnx.FunctionProto] = {}

    def selective_scan(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
    ) -> Tensor:
        if D is None or z is None or delta_bias is not None or not delta_softplus:
            raise ModelFileError(
                "SelectiveScan is written for softplus, skip and gate without delta_bias, as MambaMixer calls it"
            )
        return self._scan("one-way", u, delta, A, B, C, D, z)

    def two_way_scan(self, *parts: Tensor | None) -> Tensor:
        given = [part for part in parts if part is not None]
        return self._scan("fo-bi" if len(given) < len(parts) else "bi-bi", *given)

    def ssd(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, two_way: bool) -> Tensor:
        self.called[SSD_NAMES[two_way]] = ssd_function(self.opset, two_way)
        return self._call(SSD_NAMES[two_way], (x, dt, A, B, C, D), x)

    def _scan(self, kind: ScanKind, *parts: Tensor) -> Tensor:
        # (B,D,L) as in mamba-ssm to (B,L,D) as projections make and read them: most transposes cancel out
        by_token = [part.transpose(1, 2) if part.dim() == 3 else part for part in parts]
        length = parts[0].shape[2]
        name = scan_name(kind, self.form, length)
        self.called[name] = scan_function(self.opset, kind, self.form, length)
        return self._call(name, by_token, by_token[0]).transpose(1, 2)

    @staticmethod
    def _call(name: str, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{SCAN_DOMAIN}::{name}", parts, dtype=like.dtype, shape=like.shape, version=SCAN_VERSION
        )


def _softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """One node: ONNX's has no threshold, above which torch gives x, from which it differs by less than exp(-20)."""
    if (beta, threshold) != (1, 20):
        raise ModelFileError(f"softplus with beta {beta} and threshold {threshold}: torch's own 1 and 20 were wanted")
    return torch.onnx.ops.symbolic("Softplus", (x,), dtype=x.dtype, shape=x.shape)


# torch traces its own translations at opset 18 and converts the whole graph to the one wanted afterwards


def _quantize_dequantize(x, scale, zero_point):
    return opset18.DequantizeLinear(opset18.QuantizeLinear(x, scale, zero_point), scale, zero_point)


def _dequantize_weight(weight, scale):
    return opset18.DequantizeLinear(weight, scale, axis=0)


def _round_bias(bias, input_scale, weight_scale):
    step = opset18.Mul(input_scale, weight_scale)
    return opset18.Mul(opset18.Round(opset18.Div(bias, step)), step)


def _finished(exported: ir.Model, metadata: OnnxMetadata, functions: _Functions) -> onnx.ModelProto:
    for name in sorted(functions.called):
        function = ir.serde.deserialize_function(functions.called[name])
        exported.functions[function.identifier()] = function
        exported.opset_imports[SCAN_DOMAIN] = SCAN_VERSION
    exported.ir_version = IR_VERSION
    exported.producer_name, exported.producer_version = "aum-compress", __version__
    exported.graph.name = metadata.recipe or "aum_compress"
    exported.metadata_props.update(metadata.to_props())
    proto = ir.to_proto(exported)
    del proto.graph.value_info[:]  # every runtime infers shapes for itself
    compact(proto)
    outline_blocks(proto)
    onnx.checker.check_model(proto, full_check=True)
    return proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch's exporter from printing about packages that are not installed and its own deprecations."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
