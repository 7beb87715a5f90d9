"""From the graph that torch's exporter writes to the graph that ships; all passes work in place on an onnx_ir model.

Every tensor of the torch model stays one initialiser under its own name, so that bytes can be counted and values
verified by name. Two things are changed: the weight of a Linear before a MatMul is stored transposed, as (inputs,
outputs), and values that float16 holds exactly are stored as float16 in the fp16 and int8 files.
"""

import ast
from collections import defaultdict
from collections.abc import Set
from itertools import takewhile

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import Sequential, common
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules.common import (
    fuse_pad_into_conv_rule,
    no_op_transpose_rule,
    normalize_pad_format_conv_rule,
    transpose_transpose_rule,
)

from aum_compress.export.onnx_speed import activate_by_token, convolve_in_two_dimensions, divide_by_root

_SCOPES = "pkg.torch.onnx.name_scopes"


def tidy(model: ir.Model, stored: Set[str]) -> None:
    """Fewer nodes, readable names, nothing left of the machine that exported.

    Args:
        stored: names of the torch model's tensors. Arithmetic on them (such as -exp(A_log)) is not folded, because its
            result would be stored in their place; nor is a Range, from which tables of positions are computed.
    """

    def by_default_unless_stored(node: ir.Node) -> bool | None:
        grows = node.op_type == "Range" or any(value is not None and value.name in stored for value in node.inputs)
        return False if grows else None

    fold_constants_ir(model, should_fold=by_default_unless_stored)
    common.RemoveUnusedNodesPass()(model)
    transpose_weights(model)
    rewrite(
        model,
        [normalize_pad_format_conv_rule, fuse_pad_into_conv_rule, transpose_transpose_rule, no_op_transpose_rule],
    )
    Sequential(common.IdentityEliminationPass(), common.CommonSubexpressionEliminationPass())(model)
    divide_by_root(model)
    activate_by_token(model)
    convolve_in_two_dimensions(model)
    Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    )(model)
    _share_constants(model, stored)
    _name_nodes(model)
    common.ClearMetadataAndDocStringPass()(model)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()  # the pass above does not reach these


def transpose_weights(model: ir.Model) -> None:
    """weight -> [DequantizeLinear] -> Transpose -> MatMul becomes transposed weight -> [DequantizeLinear] -> MatMul.

    onnxruntime recognises an int8 MatMul only where DequantizeLinear feeds it directly.
    """
    for node in list(model.graph):
        if node.op_type != "Transpose" or list(node.attributes["perm"].as_ints()) != [1, 0]:
            continue
        source = node.inputs[0]
        dequantize = source.producer()
        if dequantize is not None and dequantize.op_type != "DequantizeLinear":
            continue
        weight = source if dequantize is None else dequantize.inputs[0]
        if weight.const_value is None or len(weight.uses()) > 1 or len(source.uses()) > 1:
            continue
        weight.const_value = ir.tensor(np.ascontiguousarray(weight.const_value.numpy().T), name=weight.name)
        weight.shape = weight.const_value.shape
        if dequantize is not None:
            dequantize.attributes["axis"] = ir.AttrInt64("axis", 1 - dequantize.attributes["axis"].as_int())
            source.shape = weight.shape
        node.outputs[0].replace_all_uses_with(source)
        model.graph.remove(node, safe=True)


def store_half(model: ir.Model, names: Set[str]) -> None:
    """Stores those of the named float32 initialisers as float16 that lose nothing by it, with a Cast behind each.

    Computation stays in float32: on most CPUs float16 arithmetic is slower, and a scan's state would lose digits.
    """
    graph = model.graph
    for value in reversed([value for name, value in graph.initializers.items() if name in names]):
        name = value.name
        wide = value.const_value.numpy()
        with np.errstate(over="ignore"):
            half = wide.astype(np.float16)
        if wide.dtype != np.float32 or not np.array_equal(half.astype(np.float32), wide):
            continue
        cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT}, name=f"{name}/Cast")
        widened = cast.outputs[0]
        widened.name, widened.shape, widened.dtype = f"{name}_fp32", value.shape, ir.DataType.FLOAT
        value.replace_all_uses_with(widened)
        cast.replace_input_with(0, value)
        value.const_value = ir.tensor(half, name=name)
        value.dtype = ir.DataType.FLOAT16
        graph.insert_before(graph[0], cast)


def store_int4(model: ir.Model, names: Set[str]) -> None:
    """Stores the named int8 initialisers, whose values lie between -8 and 7, two a byte."""
    for name in names:
        value = model.graph.initializers[name]
        integers = value.const_value.numpy()
        value.const_value = ir.tensor(integers.astype(ml_dtypes.int4), dtype=ir.DataType.INT4, name=name)
        value.dtype = ir.DataType.INT4


def _share_constants(model: ir.Model, stored: Set[str]) -> None:
    """One initialiser for equal constants. The model's own tensors stay apart even where they are equal."""
    first: dict[tuple, ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        if name in stored:
            continue
        constant = value.const_value.numpy()
        keeper = first.setdefault((constant.dtype.str, constant.shape, constant.tobytes()), value)
        if keeper is not value:
            value.replace_all_uses_with(keeper)
            del model.graph.initializers[name]


def _name_nodes(model: ir.Model) -> None:
    """`layers.0.mixer.in_proj/MatMul`: the torch module that a node comes from, then its operator."""
    used: dict[str, int] = defaultdict(int)
    modules = {node: _module(node) for node in model.graph}
    for node in model.graph:
        module = modules[node]
        if module is None:  # torch's exporter does not say: what the modules on both sides have in common
            makers = [value.producer() for value in node.inputs if value is not None]
            readers = [use.node for value in node.outputs for use in value.uses()]
            sides = [modules[side].split(".") for side in (*makers, *readers) if side and modules[side] is not None]
            module = ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, zip(*sides)))
        name = f"{module}/{node.op_type}" if module else node.op_type
        used[name] += 1
        node.name = name if used[name] == 1 else f"{name}_{used[name]}"


def _module(node: ir.Node) -> str | None:
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    # the last scope is the torch operator's own name
    return scopes[-2] if len(scopes) > 1 else None
