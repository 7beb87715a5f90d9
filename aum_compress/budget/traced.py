"""Second witness: MACs and elementwise operations of the traced torch graph, by module.

fvcore traces the model and walks the graph; what each operator costs is said here. Every operator must be known, as
arithmetic or as free: one that is not ends the count with an error, because a zero would be believed.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import conv_flop_jit, get_shape, linear_flop_jit
from torch import nn

from aum_compress.budget.analytic import einsum_macs, scan_macs, ssd_macs
from aum_compress.budget.operators import MAC, TORCH_FREE, TORCH_POOLS, TORCH_READ, TORCH_WRITTEN
from aum_compress.budget.records import Operations
from aum_compress.errors import AumError, join_problems

Handle = Callable[[Sequence[Any], Sequence[Any]], Counter[str]]
"""(inputs, outputs) of a graph node, as torch._C.Value -> operation -> count."""


def traced_operations(model: nn.Module, feature_shape: Sequence[int]) -> dict[str, Operations]:
    """Module path -> what that module computes itself, its children apart, for one clip.

    Runs a float32 copy of `model` once on the CPU, in evaluation mode, on zeros (1, *feature_shape).

    Raises:
        AumError: an operator that is neither counted nor known as free, or a model that does not run on such input.
    """
    twin = copy.deepcopy(model).cpu().float().eval()
    analysis = FlopCountAnalysis(twin, torch.zeros(1, *feature_shape))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    analysis.set_op_handle(**_handles(), **{f"aten::{name}": None for name in TORCH_FREE})
    try:
        with torch.no_grad():
            inclusive = analysis.by_module_and_operator()
    except AumError:
        raise
    except Exception as error:  # whatever the traced model itself raises
        raise AumError(
            f"{type(model).__name__}: cannot be traced on input {(1, *feature_shape)}: {type(error).__name__}: "
            f"{error}. Wanted a module that maps that one tensor to logits without branching on values"
        ) from error
    unsupported = {name: analysis.unsupported_ops(name) for name in inclusive}
    problems = [
        f"{name or 'the model itself'}: {operator}" for name in inclusive for operator in _own(unsupported, twin, name)
    ]
    if problems:
        raise AumError(
            join_problems("operators whose cost is unknown, and which therefore cannot count as zero:", problems)
            + "\nGive them a place in aum_compress/budget/operators.py, as arithmetic or as free"
        )
    found = {}
    for name in inclusive:
        own = _own(inclusive, twin, name)
        macs = own.pop(MAC, 0)
        if macs or own:
            found[name] = Operations(int(macs), {kind: int(count) for kind, count in sorted(own.items())})
    return found


def _own(inclusive: Mapping[str, Counter[str]], model: nn.Module, name: str) -> Counter[str]:
    """Counts of a module less those of its children; fvcore books a module with two owners under the first alone."""
    own = Counter(inclusive[name])
    for child, _ in model.get_submodule(name).named_children():
        own -= inclusive.get(f"{name}.{child}" if name else child, Counter())
    return own


def _handles() -> dict[str, Handle]:
    handles: dict[str, Handle] = {
        "aten::linear": _linear,
        "aten::_convolution": _convolution,
        "aten::addmm": _addmm,
        "aten::einsum": _einsum,
        "aum_compress::selective_scan": _selective_scan,
        "aum_compress::ssd": _ssd,
        "aum_compress::quantize_dequantize": _elementwise("quantize", "dequantize"),
        "aum_compress::dequantize_weight": _elementwise("dequantize"),
    }
    handles |= {f"aten::{name}": _matmul for name in ("matmul", "mm", "bmm")}
    handles |= {f"aten::{name}": _elementwise(kind) for name, kind in TORCH_WRITTEN.items()}
    handles |= {f"aten::{name}": _reduction(kind) for name, kind in TORCH_READ.items()}
    return handles | {f"aten::{name}": _pool for name in TORCH_POOLS}


def _size(value: Any) -> int:
    """Values in a tensor of the graph; integers without a dimension are indices, and no arithmetic of the model."""
    if value.type().kind() != "TensorType":
        return 0  # a Python number
    shape = get_shape(value)
    if shape is None:
        raise AumError(f"{value.node().kind()}: the trace gives its output no shape, so it cannot be counted")
    if not shape and value.type().scalarType() in ("Long", "Int", "Bool"):
        return 0
    return math.prod(shape)


def _absent(value: Any) -> bool:
    return value.type().kind() == "NoneType"


def _elementwise(*kinds: str) -> Handle:
    return lambda inputs, outputs: Counter({kind: _size(outputs[0]) for kind in kinds})


def _reduction(kind: str) -> Handle:
    return lambda inputs, outputs: Counter({kind: _size(inputs[0])})


def _pool(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    window = [size.toIValue() for size in inputs[1].node().inputs()]
    return Counter({"pool": _size(outputs[0]) * math.prod(window)})


def _with_bias(macs: int, bias: Any, outputs: Sequence[Any]) -> Counter[str]:
    return Counter({MAC: macs} if _absent(bias) else {MAC: macs, "add": _size(outputs[0])})


def _linear(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    return _with_bias(linear_flop_jit(inputs, outputs), inputs[2], outputs)


def _convolution(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    return _with_bias(conv_flop_jit(inputs, outputs)["conv"], inputs[2], outputs)


def _addmm(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    return _with_bias(_size(outputs[0]) * get_shape(inputs[1])[-1], inputs[0], outputs)


def _matmul(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    # not fvcore's own, which takes the batch of the first operand and so undercounts where the second is broadcast
    return Counter({MAC: _size(outputs[0]) * get_shape(inputs[0])[-1]})


def _einsum(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    # not fvcore's own, which halves numpy's count and so loses half of every outer product
    shapes = [get_shape(value) for value in inputs[1].node().inputs()]
    return Counter({MAC: einsum_macs(inputs[0].toIValue(), shapes)})


def _selective_scan(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    u, _, A, _, _, D, z, delta_bias, delta_softplus = inputs
    batch, d_inner, n_tokens = get_shape(u)
    d_state = get_shape(A)[1]
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


def _ssd(inputs: Sequence[Any], outputs: Sequence[Any]) -> Counter[str]:
    """What `models.ssd` runs: cumulative sums, decays, two products of matrices, skip."""
    x, _, _, b, *_ = inputs
    batch, length, heads, head_dim = get_shape(x)
    d_state = get_shape(b)[2]
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
