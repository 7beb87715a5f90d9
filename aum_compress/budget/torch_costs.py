"""What a node of a traced torch graph costs: MACs and elementwise operations, by its operator and its shapes.

Each handle takes the node's inputs and outputs (torch._C.Value), as fvcore's handles do.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from fvcore.nn.jit_handles import get_shape

from aum_compress.budget.analytic import scan_macs, ssd_macs
from aum_compress.budget.contraction import einsum_macs, fft_macs
from aum_compress.budget.operators import (
    MAC,
    TORCH_FREE,
    TORCH_POOLS,
    TORCH_READ,
    TORCH_SEVERAL,
    TORCH_WRITTEN,
)
from aum_compress.errors import AumError

Values = Sequence[Any]
Handle = Callable[[Values, Values], Counter[str]]
"""(inputs, outputs) of a node -> operation -> count."""

STRUCTURE = (
    *("Constant", "GetAttr", "DictConstruct", "ListConstruct", "ListUnpack", "TupleConstruct", "TupleIndex"),
    *("TupleUnpack", "NumToTensor", "abs", "device", "dtype", "is_cuda", "max", "min"),
)
"""Nodes of `prim` that pack values or compute with sizes. Others hold Python or script code, whose cost is hidden."""


def node_cost(node: Any) -> Counter[str] | None:
    """Operation -> count of one node; None where the operator is unknown."""
    namespace, _, name = node.kind().partition("::")
    if namespace == "prim":
        return Counter() if name in STRUCTURE else None
    if namespace == "aten" and not name.startswith("__"):
        name = name.removesuffix("_")  # in place
    handle = HANDLES.get(f"{namespace}::{name}")
    if handle is None:
        return Counter() if namespace == "aten" and name in TORCH_FREE else None
    return handle([*node.inputs()], [*node.outputs()])


def shape_of(value: Any) -> list[int]:
    """Of a tensor of the graph."""
    shape = get_shape(value)
    if shape is None:
        raise AumError("the trace gives a tensor no shape, so it cannot be counted")
    return shape


def is_index(value: Any) -> bool:
    """An integer without a dimension: a size or place, and no value of the model."""
    return not get_shape(value) and value.type().scalarType() in ("Long", "Int", "Bool")


def _size(value: Any) -> int:
    """Values in a tensor of the graph that the model computes with."""
    if value.type().kind() != "TensorType":
        return 0  # a Python number
    shape = shape_of(value)
    return 0 if is_index(value) else math.prod(shape)


def _absent(value: Any) -> bool:
    return value.type().kind() == "NoneType"


def _listed(value: Any) -> list[Any]:
    """The values of a list of the graph."""
    return [*value.node().inputs()]


def _elementwise(*kinds: str) -> Handle:
    return lambda inputs, outputs: Counter({kind: kinds.count(kind) * _size(outputs[0]) for kind in kinds})


def _reduction(kind: str) -> Handle:
    return lambda inputs, outputs: Counter({kind: _size(inputs[0])})


def _pool(inputs: Values, outputs: Values) -> Counter[str]:
    window = inputs[1].toIValue() or [size.toIValue() for size in _listed(inputs[1])]
    return Counter({"pool": _size(outputs[0]) * math.prod(window)})


def _embedding_bag(inputs: Values, outputs: Values) -> Counter[str]:
    """Rows are moved, then summed; with weights of their own, multiplied first."""
    read = math.prod(shape_of(inputs[1])) * shape_of(inputs[0])[1]
    return Counter({"reduce": read} | ({} if _absent(inputs[6]) else {"multiply": read}))


def _dropout(inputs: Values, outputs: Values) -> Counter[str]:
    if inputs[2].toIValue():
        raise AumError("drops values in evaluation mode too; wanted training=self.training, so that inference is free")
    return Counter()


def _with_bias(macs: int, bias: Any, outputs: Values) -> Counter[str]:
    return Counter({MAC: macs} if _absent(bias) else {MAC: macs, "add": _size(outputs[0])})


def _linear(inputs: Values, outputs: Values) -> Counter[str]:
    return _with_bias(math.prod(shape_of(outputs[0])) * shape_of(inputs[0])[-1], inputs[2], outputs)


def _convolution(inputs: Values, outputs: Values) -> Counter[str]:
    """Each value written, or of a transposed convolution each value read, meets the taps of one of its channels."""
    transposed = inputs[6].toIValue() is True  # by name of the padding ("same"), the seventh is the groups
    taps = shape_of(inputs[1])[1:]
    met = inputs[0] if transposed else outputs[0]
    return _with_bias(math.prod(shape_of(met)) * math.prod(taps), inputs[2], outputs)


def _matmul(inputs: Values, outputs: Values) -> Counter[str]:
    # not fvcore's own, which takes the batch of the first operand and so undercounts where the second is broadcast
    return Counter({MAC: math.prod(shape_of(outputs[0])) * shape_of(inputs[0])[-1]})


def _outer(inputs: Values, outputs: Values) -> Counter[str]:
    return Counter({MAC: math.prod(shape_of(outputs[0]))})


def _added_matmul(inputs: Values, outputs: Values) -> Counter[str]:
    """beta * input + alpha * (one @ two), the batch of addbmm summed."""
    one, two = shape_of(inputs[1]), shape_of(inputs[2])
    columns = two[-1] if len(two) > 1 else 1
    written = _size(outputs[0])
    found = Counter({MAC: math.prod(one) * columns, "add": written})
    found["multiply"] += written * sum(scale.toIValue() != 1 for scale in inputs[3:5])
    return found


def _added_outer(inputs: Values, outputs: Values) -> Counter[str]:
    written = _size(outputs[0])
    scaled = sum(scale.toIValue() != 1 for scale in inputs[3:5])
    return Counter({MAC: written, "add": written, "multiply": written * scaled})


def _tensordot(inputs: Values, outputs: Values) -> Counter[str]:
    shape = shape_of(inputs[0])
    summed = inputs[2].toIValue() or [place.toIValue() for place in _listed(inputs[2])]
    return Counter({MAC: math.prod(shape_of(outputs[0])) * math.prod(shape[place] for place in summed)})


def _einsum(inputs: Values, outputs: Values) -> Counter[str]:
    # not fvcore's own, which halves numpy's count and so loses half of every outer product
    shapes = [shape_of(value) for value in _listed(inputs[1])]
    path = None if _absent(inputs[2]) else inputs[2].toIValue() or [place.toIValue() for place in _listed(inputs[2])]
    return Counter({MAC: einsum_macs(inputs[0].toIValue(), shapes, path)})


def _bilinear(inputs: Values, outputs: Values) -> Counter[str]:
    """x1 (...,I) A (O,I,J) x2 (...,J), contracted from left to right."""
    one, two, weight = (shape_of(value) for value in inputs[:3])
    rows = math.prod(one[:-1])
    macs = einsum_macs("ni,oij,nj->no", [(rows, one[-1]), weight, (rows, two[-1])])
    return _with_bias(macs, inputs[3], outputs)


def _attention(inputs: Values, outputs: Values) -> Counter[str]:
    """softmax(scale * Q K^T + mask) V: both products in full, also where a causal mask makes half of them vain."""
    query, key, value, mask = inputs[:4]
    batch_rows = math.prod(shape_of(outputs[0])[:-1])  # of all batches and heads
    scores = batch_rows * shape_of(key)[-2]
    found = Counter({MAC: scores * (shape_of(query)[-1] + shape_of(value)[-1]), "multiply": scores, "softmax": scores})
    return found + Counter({} if _absent(mask) else {"add": scores})


CELLS = {
    "lstm": Counter(sigmoid=5, multiply=3, add=5),
    "gru": Counter(sigmoid=3, multiply=2, add=5),
    "rnn_tanh": Counter(sigmoid=1, add=1),
    "rnn_relu": Counter(relu=1, add=1),
}
"""Elementwise operations of one hidden unit in one step, its biases apart; as torch's cells compute them."""


def _recurrent(operator: str) -> Handle:
    def handle(inputs: Values, outputs: Values) -> Counter[str]:
        # padded: input, state(s), weights; packed: values, batch sizes, state(s), weights
        place = max(place for place, value in enumerate(inputs) if str(value.type()) == "List[Tensor]")
        has_biases, layers, _, _, two_way = (value.toIValue() for value in inputs[place + 1 : place + 6])
        weights = [shape_of(weight) for weight in _listed(inputs[place])]
        steps = math.prod(shape_of(inputs[0])[:-1])
        cells = layers * (2 if two_way else 1)
        each = len(weights) // cells
        found: Counter[str] = Counter()
        for first in range(0, len(weights), each):
            own = weights[first : first + each]
            gates, hidden = own[1][0], own[0][0] // {"lstm": 4, "gru": 3}.get(operator, 1)
            found[MAC] += steps * sum(math.prod(shape) for shape in own if len(shape) == 2)
            found["add"] += steps * gates * (2 if has_biases else 0)
            for kind, count in CELLS[operator].items():
                found[kind] += steps * hidden * count
        return found

    return handle


def _fft(*, real: bool) -> Handle:
    """A transform along one axis; of one that turns real values into complex ones or back, `real`."""

    def handle(inputs: Values, outputs: Values) -> Counter[str]:
        # the side whose axis is not halved has the whole length
        shape = max((shape_of(value) for value in (inputs[0], outputs[0])), key=math.prod)
        length = shape[inputs[2].toIValue()]
        return Counter({MAC: math.prod(shape) // length * fft_macs(length, real=real)})

    return handle


def _stft(inputs: Values, outputs: Values) -> Counter[str]:
    """Window and transform of each frame. (..., S) to (..., bins, frames)."""
    n_fft = inputs[1].toIValue()
    real = "Complex" not in (inputs[0].type().scalarType() or "")
    batch = math.prod(shape_of(inputs[0])[:-1])
    shape = shape_of(outputs[0])
    frames = shape[len(shape_of(inputs[0]))]
    found = Counter({MAC: batch * frames * fft_macs(n_fft, real=real)})
    return found + Counter({} if _absent(inputs[4]) else {"multiply": batch * frames * n_fft})


def _selective_scan(inputs: Values, outputs: Values) -> Counter[str]:
    u, _, A, _, _, D, z, delta_bias, delta_softplus = inputs
    batch, d_inner, n_tokens = shape_of(u)
    d_state = shape_of(A)[1]
    steps = batch * d_inner * n_tokens
    macs = batch * scan_macs(d_inner, d_state, n_tokens) - steps * (_absent(D) + _absent(z))
    found = Counter({MAC: macs, "exp": steps * d_state})
    if delta_softplus.toIValue():
        found["softplus"] += steps
    if not _absent(z):
        found["silu"] += steps
    if not _absent(delta_bias):
        found["add"] += steps
    return found


def _two_way_scan(inputs: Values, outputs: Values) -> Counter[str]:
    """Two selective scans with softplus, skip and gate, and their sum."""
    batch, d_inner, n_tokens = shape_of(inputs[0])
    d_state = shape_of(inputs[2])[1]
    steps = batch * d_inner * n_tokens
    macs = 2 * batch * scan_macs(d_inner, d_state, n_tokens)
    return Counter({MAC: macs, "exp": 2 * steps * d_state, "softplus": 2 * steps, "silu": 2 * steps, "add": steps})


def _ssd(inputs: Values, outputs: Values) -> Counter[str]:
    """What `models.ssd` runs: cumulative sums, decays, two products of matrices, skip."""
    x, _, _, b, *_ = inputs
    batch, length, heads, head_dim = shape_of(x)
    d_state = shape_of(b)[2]
    pairs, values, steps = batch * length * length, batch * length * heads * head_dim, batch * length * heads
    return Counter(
        {
            MAC: batch * ssd_macs(heads * head_dim, d_state, length),
            "multiply": steps + pairs * heads + 2 * values,
            "reduce": steps,
            "add": pairs * heads + values,
            "compare": pairs * heads,
            "negate": pairs * heads,
            "exp": pairs * heads,
        }
    )


HANDLES: dict[str, Handle] = {
    "aten::linear": _linear,
    "aten::_convolution": _convolution,
    "aten::_convolution_mode": _convolution,
    "aten::convolution": _convolution,
    "aten::addr": _added_outer,
    "aten::tensordot": _tensordot,
    "aten::einsum": _einsum,
    "aten::bilinear": _bilinear,
    "aten::scaled_dot_product_attention": _attention,
    "aten::embedding_bag": _embedding_bag,
    "aten::stft": _stft,
    **{f"aten::{name}": _dropout for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")},
    "aum_compress::selective_scan": _selective_scan,
    "aum_compress::two_way_scan": _two_way_scan,
    "aum_compress::ssd": _ssd,
    "aum_compress::quantize_dequantize": _elementwise("quantize", "dequantize"),
    "aum_compress::dequantize_weight": _elementwise("dequantize"),
    "aum_compress::round_bias": _elementwise("multiply", "divide", "round", "multiply"),
    **{f"aten::{name}": _matmul for name in ("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner")},
    **{f"aten::{name}": _outer for name in ("outer", "ger", "kron")},
    **{f"aten::{name}": _added_matmul for name in ("addmm", "addbmm", "baddbmm", "addmv")},
    **{f"aten::{name}": _recurrent(name) for name in CELLS},
    **{f"aten::fft_{name}": _fft(real=False) for name in ("fft", "ifft")},
    **{f"aten::fft_{name}": _fft(real=True) for name in ("rfft", "irfft", "hfft", "ihfft")},
    **{f"aten::{name}": _elementwise(kind) for name, kind in TORCH_WRITTEN.items()},
    **{f"aten::{name}": _elementwise(*kinds) for name, kinds in TORCH_SEVERAL.items()},
    **{f"aten::{name}": _reduction(kind) for name, kind in TORCH_READ.items()},
    **{f"aten::{name}": _pool for name in TORCH_POOLS},
}
"""Operator -> what it costs. One that is neither here nor in TORCH_FREE is unknown."""
