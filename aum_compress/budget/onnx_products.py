"""MACs of the ONNX operators that multiply matrices, convolve, transform or recur, from their shapes. Torch-free."""

import math
from collections import Counter
from collections.abc import Sequence

import onnx
from onnx import helper

from aum_compress.budget.contraction import einsum_macs, fft_macs
from aum_compress.budget.onnx_values import Shape, Value
from aum_compress.budget.operators import MAC, ONNX_WRITTEN

CONVOLUTIONS = ("Conv", "ConvInteger", "QLinearConv", "ConvTranspose")
MATRIX_PRODUCTS = ("MatMul", "MatMulInteger", "QLinearMatMul", "Gemm", "Einsum")
RECURRENT = {"RNN": 1, "GRU": 3, "LSTM": 4}
"""Operator -> matrices of weights a direction."""
TRANSFORMS = ("DFT", "STFT")
PRODUCTS = (*CONVOLUTIONS, *MATRIX_PRODUCTS, *RECURRENT, *TRANSFORMS)
BIAS = {"Conv": 2, "ConvTranspose": 2, "QLinearConv": 8, "Gemm": 2}
"""Place of the bias among the inputs."""
DEFAULT_ACTIVATIONS = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}


def product(node: onnx.NodeProto, inputs: Sequence[Value | None], output: Shape) -> Counter[str]:
    """MACs of one of PRODUCTS, and what it computes besides: additions of a bias, gates.

    Args:
        inputs: None where an optional one is left out.
        output: shape of the first output.

    Raises:
        Unsized: an input whose size does not follow from those of the graph's inputs.
        AumError: an einsum that does not fit its operands.
    """
    operator = node.op_type
    if operator in RECURRENT:
        return _recurrent(node, inputs[0].shape, inputs[2].shape)
    if operator == "STFT":
        return Counter({MAC: _stft(node, inputs, output)})
    if operator == "DFT":
        return Counter({MAC: _dft(node, inputs, output)})
    written = math.prod(output)
    found: Counter[str] = Counter()
    if operator in CONVOLUTIONS:
        taps = math.prod(inputs[3 if operator == "QLinearConv" else 1].shape[1:])
        # every value of the input of a transposed convolution meets every tap, every one of the output of the others
        found[MAC] = taps * (math.prod(inputs[0].shape) if operator == "ConvTranspose" else written)
    elif operator == "Einsum":
        equation = helper.get_node_attr_value(node, "equation").decode()
        found[MAC] = einsum_macs(equation, [operand.shape for operand in inputs])
    elif operator == "Gemm":
        found[MAC] = written * inputs[0].shape[0 if _attributes(node).get("transA") else 1]
    else:
        found[MAC] = written * inputs[0].shape[-1]
    if len(inputs) > BIAS.get(operator, len(inputs)) and inputs[BIAS[operator]] is not None:
        found["add"] = written
    return found


def _attributes(node: onnx.NodeProto) -> dict:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _dft(node: onnx.NodeProto, inputs: Sequence[Value | None], output: Shape) -> int:
    """(..., length, ..., 1 or 2) to (..., bins, ..., 2)."""
    _, asked, axis_input, *_ = (*inputs, None, None)
    axis = _attributes(node).get("axis", -2 if axis_input is None else int(axis_input.content))
    length = inputs[0].shape[axis] if asked is None else int(asked.content)
    return math.prod(output[:-1]) // output[axis] * fft_macs(length, real=inputs[0].shape[-1] == 1)


def _stft(node: onnx.NodeProto, inputs: Sequence[Value | None], output: Shape) -> int:
    """Signal (B,S,1 or 2) to (B, frames, bins, 2), each frame times its window first."""
    signal, _, window, asked, *_ = (*inputs, None, None)
    if window is not None:
        frame = window.shape[0]
    elif asked is not None:
        frame = int(asked.content)
    else:
        frame = (output[2] - 1) * 2 if _attributes(node).get("onesided", 1) else output[2]
    parts = signal.shape[-1] if len(signal.shape) > 2 else 1
    weighted = 0 if window is None else frame * parts
    return output[0] * output[1] * (fft_macs(frame, real=parts == 1) + weighted)


def _recurrent(node: onnx.NodeProto, x: Shape, recurrent: Shape) -> Counter[str]:
    """RNN, GRU or LSTM. x (T,B,I) or, with layout 1, (B,T,I); recurrent weights (directions, gates*H, H).

    MACs: input and recurrent matrices, and an LSTM's peepholes. Gates: their activations by kind; as `multiply` what
    they open and close; as `add` the sums that no product contains.
    """
    operator = node.op_type
    gates = RECURRENT[operator]
    directions, hidden = recurrent[0], recurrent[-1]
    updates = x[0] * x[1] * directions * hidden  # values of one gate over all steps
    peepholes = 3 if operator == "LSTM" and len(node.input) > 7 and node.input[7] else 0
    names = [name.decode() for name in _attributes(node).get("activations", [])]
    names = names[: len(DEFAULT_ACTIVATIONS[operator])] or DEFAULT_ACTIVATIONS[operator]
    found = Counter({MAC: updates * (gates * (x[2] + hidden) + peepholes)})
    # the first activation opens all gates but the candidate's
    times = {"RNN": [1], "GRU": [2, 1], "LSTM": [3, 1, 1]}[operator]
    for name, each in zip(names, times):
        found[ONNX_WRITTEN.get(name, "sigmoid")] += each * updates  # Affine and ScaledTanh are no operators
    found["multiply"] += {"RNN": 0, "GRU": 3, "LSTM": 3}[operator] * updates
    bias = gates if len(node.input) > 3 and node.input[3] else 0
    found["add"] += (bias + {"RNN": 0, "GRU": 2, "LSTM": 1}[operator]) * updates
    return +found
