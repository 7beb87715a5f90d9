"""ONNX graphs written as text, and what the budget counts of them."""

import numpy as np
import onnx
from onnx import numpy_helper, parser

from aum_compress.budget.onnx_graph import measure_graph


def graph(text: str, opset: int = 20, **weights: np.ndarray) -> onnx.ModelProto:
    """A model of operators from `text`, the standard's and onnxruntime's own, with initialisers."""
    own = ', "com.microsoft": 1' * ("com.microsoft" in text)
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}{own}]> {text}')
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return model


def counted(model: onnx.ModelProto) -> tuple[int, dict[str, int]]:
    """MACs, and elementwise operations by kind."""
    found: dict[str, int] = {}
    operations = measure_graph(model, "test.onnx").operations
    for own in operations.values():
        for kind, count in own.elementwise.items():
            found[kind] = found.get(kind, 0) + count
    return sum(own.macs for own in operations.values()), found


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)
