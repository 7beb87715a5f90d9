"""Where each byte of an ONNX file goes, from the stored values down to names and framing. Torch-free."""

from collections import Counter
from pathlib import Path

import onnx

from aum_compress.budget.onnx_file import read_onnx, stored_bytes
from aum_compress.budget.onnx_front_end import front_end_tensors
from aum_compress.budget.onnx_stored import is_structure, scale_names

PARAMETERS = "parameters (gated)"
FRONT_END_VALUES = "front-end: tensors"
STRUCTURE = "shapes, axes, single constants"
TENSOR_NAMES = "tensors: names, types, shapes"
NODE_NAMES = "nodes: names"
VALUE_NAMES = "nodes: names of what they read and make"
OPERATORS = "nodes: operators, attributes"
METADATA = "metadata"
FRAMING = "inputs, outputs, framing of the format"


def file_parts(path: Path) -> dict[str, int]:
    """What a file consists of -> bytes, largest first; together the size of the file.

    A model-local function is a part of its own (`function LogMel`); the body of a Scan, Loop or If belongs to its
    node's attributes. Weights that lie in files beside it are left out.

    Raises:
        ModelFileError: not an ONNX file, or not whole.
    """
    model = read_onnx(path)
    parts: Counter[str] = Counter()
    scales, front_end = scale_names(model), front_end_tensors(model)

    def add_values(name: str, tensor: onnx.TensorProto) -> int:
        values = (
            0 if tensor.data_location == onnx.TensorProto.EXTERNAL else min(stored_bytes(tensor), tensor.ByteSize())
        )
        structure = STRUCTURE if is_structure(name, tensor, scales) else PARAMETERS
        parts[FRONT_END_VALUES if name in front_end else structure] += values
        return values

    for tensor in model.graph.initializer:
        parts[TENSOR_NAMES] += tensor.ByteSize() - add_values(tensor.name, tensor)
    for node in model.graph.node:
        names = sum(len(name.encode()) + 2 for name in (*node.input, *node.output))
        own = len(node.name.encode()) + 2 if node.name else 0
        held = [attribute.t for attribute in node.attribute if node.op_type == "Constant" and attribute.HasField("t")]
        parts[VALUE_NAMES] += names
        parts[NODE_NAMES] += own
        parts[OPERATORS] += node.ByteSize() - names - own - sum(add_values(node.output[0], tensor) for tensor in held)
    for function in model.functions:
        parts[f"function {function.name}"] += function.ByteSize()
    parts[METADATA] += sum(entry.ByteSize() for entry in model.metadata_props)
    parts[FRAMING] = path.stat().st_size - sum(parts.values())
    return dict(parts.most_common())
