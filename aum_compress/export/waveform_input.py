"""The front-end in front of an exported model, and off again."""

from dataclasses import replace
from pathlib import Path

import onnx
from onnx import helper, numpy_helper

from aum_compress.errors import DataError, ModelFileError
from aum_compress.export.front_end_function import FrontEndPlan, front_end_function
from aum_compress.export.metadata import FEATURES, WAVEFORM, OnnxMetadata
from aum_compress.export.onnx_file import load_onnx, write_whole
from aum_compress.export.resample_function import resample_function
from aum_compress.export.scan_function import SCAN_DOMAIN, SCAN_VERSION

PREFIX = "front_end"
"""Of all names that the front-end adds to a graph; such tensors are outside the budget."""


def write_waveform_file(source: Path, target: Path, input_rate_hz: int | None = None) -> None:
    """Writes to `target` the file at `source` with its front-end inside: input `waveform` (B,S) instead of `features`.

    The model itself stays as it is, in whatever precision; the front-end calculates in float32. An open batch axis
    stays open.

    Args:
        input_rate_hz: of the waveform, which the graph then resamples; the front-end's own rate when left out.

    Raises:
        ModelFileError: a source that is not an exported file that reads features, a rate that cannot be resampled in a
            graph, or a target that cannot be written.
    """
    proto = load_onnx(source)
    metadata = OnnxMetadata.from_props({entry.key: entry.value for entry in proto.metadata_props}, str(source))
    if metadata.reads != FEATURES:
        raise ModelFileError(f"{source}: reads {metadata.reads} already; give the file that reads features")
    rate = None if input_rate_hz == metadata.sample_rate_hz else input_rate_hz
    metadata = replace(metadata, reads=WAVEFORM, input_rate_hz=rate)
    try:
        _add_front_end(proto, metadata)
    except DataError as error:  # a clip too short for one frame
        raise ModelFileError(f"{source}: {error}") from None
    helper.set_model_props(proto, metadata.to_props())
    onnx.checker.check_model(proto, full_check=True)
    write_whole(proto, target)


def _add_front_end(proto: onnx.ModelProto, metadata: OnnxMetadata) -> None:
    opset = next(entry.version for entry in proto.opset_import if not entry.domain)
    rate, model_rate = metadata.waveform_rate_hz, metadata.sample_rate_hz
    plan = FrontEndPlan(metadata.front_end, metadata.clip_samples)
    tensors = {f"{PREFIX}.{name}": tensor for name, tensor in plan.tensors.items()}
    functions = [front_end_function(plan, metadata.mean, metadata.std, opset)]
    nodes, samples = [], WAVEFORM
    if rate != model_rate:
        functions.append(resample_function(rate, model_rate, metadata.waveform_samples, metadata.clip_samples, opset))
        samples = f"{PREFIX}_resampled"
        nodes.append(_call(functions[-1], [WAVEFORM], samples))
    nodes.append(_call(functions[0], [samples, *tensors], FEATURES))

    graph = proto.graph
    batch = graph.input[0].type.tensor_type.shape.dim[0]
    taken = helper.make_tensor_value_info(
        WAVEFORM, onnx.TensorProto.FLOAT, [batch.dim_param or batch.dim_value, metadata.waveform_samples]
    )
    graph.input[0].CopyFrom(taken)
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(numpy_helper.from_array(tensor, name) for name, tensor in tensors.items())
    proto.functions.extend(functions)
    if SCAN_DOMAIN not in {entry.domain for entry in proto.opset_import}:
        proto.opset_import.append(helper.make_opsetid(SCAN_DOMAIN, SCAN_VERSION))


def _call(function: onnx.FunctionProto, inputs: list[str], output: str) -> onnx.NodeProto:
    return helper.make_node(function.name, inputs, [output], f"{PREFIX}/{function.name}", domain=SCAN_DOMAIN)


def split_front_end(proto: onnx.ModelProto, metadata: OnnxMetadata) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A file that reads waveforms as two models: waveform to features, and features to logits.

    Raises:
        ModelFileError: nothing in the graph makes `features`.
    """
    nodes = list(proto.graph.node)
    place = next((place for place, node in enumerate(nodes) if FEATURES in node.output), None)
    if place is None:
        raise ModelFileError(
            f"no node makes {FEATURES!r}, by which front-end and model are told apart; export the file again"
        )
    batch = proto.graph.input[0].type.tensor_type.shape.dim[0]
    features = helper.make_tensor_value_info(
        FEATURES, onnx.TensorProto.FLOAT, [batch.dim_param or batch.dim_value, *metadata.feature_shape]
    )
    front_end, model = onnx.ModelProto(), onnx.ModelProto()
    for part, own, inputs, outputs in (
        (front_end, nodes[: place + 1], proto.graph.input, [features]),
        (model, nodes[place + 1 :], [features], proto.graph.output),
    ):
        part.CopyFrom(proto)
        for field, values in (("node", own), ("input", inputs), ("output", outputs)):
            part.graph.ClearField(field)
            getattr(part.graph, field).extend(values)
        read = {name for node in own for name in node.input}
        kept = [tensor for tensor in proto.graph.initializer if tensor.name in read]
        part.graph.ClearField("initializer")
        part.graph.initializer.extend(kept)
    return front_end, model
