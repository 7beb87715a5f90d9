"""What is known of each value of an ONNX graph before it runs: size, origin, and for small constants the content.

A graph is followed node by node, as it is stored. Sizes come from onnx's own inference, one node at a time, helped by
the content of constants: shapes, axes, and all that is computed from them or from sizes. Torch-free.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import onnx
from onnx import checker, defs, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from aum_compress.budget.onnx_file import bits, bodies, constant_of
from aum_compress.budget.operators import ONNX_VIEWS, ONNX_WRITTEN
from aum_compress.errors import ModelFileError

Shape = tuple[int, ...]

STANDARD = ("", "ai.onnx")
SEEN_THROUGH = (
    "Cast",
    "DequantizeLinear",
    "Exp",
    "Identity",
    "Neg",
    "QuantizeLinear",
    "Reshape",
    "Transpose",
    "Unsqueeze",
)
"""Operators through which a weight stays recognisable as one."""
FLOATING = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
RANDOM = frozenset(name for name, kind in ONNX_WRITTEN.items() if kind == "random")
MOST_KNOWN = 65_536
"""Largest constant, in values, whose content is followed."""
MOST_TOLD = 1024
"""Largest constant whose content onnx's inference is told: shapes, axes, scales."""


class Unsized(Exception):
    """A value whose size does not follow from those of the graph's inputs; its argument is the name."""


class Origin(IntEnum):
    """What a value is computed from; of several inputs the largest counts."""

    STRUCTURE = 0
    """Constants of structure, and sizes."""
    WEIGHTS = 1
    """Stored weights, and the above."""
    RUN = 2
    """The inputs of the graph."""


@dataclass(eq=False)
class Value:
    """One value of a graph, or of a body or function called by it."""

    name: str
    type: onnx.TypeProto | None
    """None where onnx's inference finds none."""
    origin: Origin = Origin.RUN
    content: np.ndarray | None = None
    weight: str = ""
    """The stored tensor that it is, or is a form of."""
    owners: tuple["Value", ...] = ()
    """The values whose memory it is a view of; none where it has memory of its own."""
    is_lost: bool = False
    """Made by an operator that is unknown, or from such a value."""

    @property
    def shape(self) -> Shape:
        """Raises Unsized when an axis has no size."""
        if self.type is not None and self.type.tensor_type.HasField("shape"):
            sizes = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in self.type.tensor_type.shape.dim)
            if min(sizes, default=0) >= 0:
                return sizes
        raise Unsized(self.name)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Raises Unsized also for text."""
        width = bits(self.element)
        if not width:
            raise Unsized(self.name)
        return math.ceil(self.size * width / 8)

    @property
    def element(self) -> int:
        """The element type, as in `onnx.TensorProto.DataType`."""
        return 0 if self.type is None else self.type.tensor_type.elem_type

    @property
    def bases(self) -> tuple["Value", ...]:
        """Those whose memory it takes: its own, or that of the values that it is a view of."""
        return self.owners or (self,)


def tensor_type(element: int, shape: Sequence[int]) -> onnx.TypeProto:
    return helper.make_tensor_type_proto(element, shape)


def stored_value(name: str, tensor: onnx.TensorProto | onnx.SparseTensorProto, is_weight: bool) -> Value:
    """An initialiser or what a Constant holds; the content of large weights is not looked at."""
    if isinstance(tensor, onnx.SparseTensorProto):
        return Value(name, tensor_type(tensor.values.data_type, tensor.dims), Origin.WEIGHTS, weight=name)
    kind = tensor_type(tensor.data_type, tensor.dims)
    value = Value(name, kind, Origin.WEIGHTS if is_weight else Origin.STRUCTURE, weight=name if is_weight else "")
    external = tensor.data_location == onnx.TensorProto.EXTERNAL
    # of the weights only what may be the scales of a Resize or the like
    if external or math.prod(tensor.dims) > (16 if is_weight else MOST_KNOWN) or not bits(tensor.data_type):
        return value
    try:
        value.content = numpy_helper.to_array(tensor)
    except (ValueError, TypeError) as error:
        raise ModelFileError(
            f"constant {name!r} cannot be read ({error}): the file is damaged; export it again"
        ) from None
    return value


def outputs_of(
    node: onnx.NodeProto, inputs: Sequence[Value | None], opsets: Mapping[str, int], source: str
) -> list[Value]:
    """What a standard operator without a body makes; content included where all inputs have theirs.

    Raises:
        ModelFileError: sizes that contradict each other.
    """
    given = [value for value in inputs if value is not None]
    origin = max((value.origin for value in given), default=Origin.STRUCTURE)
    if node.op_type in RANDOM:
        origin = Origin.RUN
    contents = _evaluated(node, inputs, opsets) if origin is Origin.STRUCTURE else None
    if contents is not None:
        return [
            Value(name, tensor_type(helper.np_dtype_to_tensor_dtype(found.dtype), found.shape), origin, found)
            for name, found in zip(node.output, contents)
        ]
    types = _inferred(node, inputs, opsets, source)
    made = [Value(name, types.get(name), origin) for name in node.output]
    first = inputs[0] if inputs else None
    if first is not None and node.op_type in SEEN_THROUGH:
        made[0].weight = first.weight
    if node.op_type in ONNX_VIEWS:
        owners = tuple(dict.fromkeys(base for value in given for base in value.bases))
        for value in made:
            value.owners = owners
    if first is not None and node.op_type in ("Shape", "Size"):
        _measure(node, first, made[0])
    return made


def _measure(node: onnx.NodeProto, measured: Value, made: Value) -> None:
    """Sizes are known where the value itself is not."""
    try:
        shape = measured.shape
    except Unsized:
        return
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    sizes = shape[attributes.get("start", 0) : attributes.get("end", len(shape))]
    found = np.array(math.prod(shape) if node.op_type == "Size" else sizes, np.int64)
    made.origin, made.content, made.type = Origin.STRUCTURE, found, tensor_type(onnx.TensorProto.INT64, found.shape)


def _evaluated(
    node: onnx.NodeProto, inputs: Sequence[Value | None], opsets: Mapping[str, int]
) -> list[np.ndarray] | None:
    if any(value is not None and value.content is None for value in inputs):
        return None
    feeds = {name: value.content for name, value in zip(node.input, inputs) if value is not None}
    grows = node.op_type in ("ConstantOfShape", "Expand", "Tile", "Range", "EyeLike", "Pad", "Resize")
    try:
        if grows and _grown(node, inputs, opsets) > MOST_KNOWN:
            return None
        with np.errstate(all="ignore"):
            found = ReferenceEvaluator(node, opsets=dict(opsets)).run(None, feeds)
    except Exception:  # whatever an operator that onnx's reference lacks raises; the sizes may still follow
        return None
    whole = all(isinstance(array, np.ndarray | np.generic) for array in found)
    return [np.asarray(array) for array in found] if whole else None


def _grown(node: onnx.NodeProto, inputs: Sequence[Value | None], opsets: Mapping[str, int]) -> int:
    """Values that a node would write, found without writing them."""
    if node.op_type == "Range":
        start, limit, delta = (float(value.content) for value in inputs)
        return math.ceil((limit - start) / delta)
    types = _inferred(node, inputs, opsets, "")
    return Value(node.output[0], types.get(node.output[0])).size


def _inferred(
    node: onnx.NodeProto, inputs: Sequence[Value | None], opsets: Mapping[str, int], source: str
) -> dict[str, onnx.TypeProto]:
    if any(value is not None and value.type is None for value in inputs):
        return {}
    schema = schema_of(node, opsets)
    types = {name: value.type for name, value in zip(node.input, inputs) if value is not None}
    contents = {
        name: numpy_helper.from_array(value.content, name)
        for name, value in zip(node.input, inputs)
        if value is not None and value.content is not None and value.content.size <= MOST_TOLD
    }
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    if not schema.has_type_and_shape_inference_function:
        return _uninferred(node, inputs)
    try:
        return shape_inference.infer_node_outputs(schema, node, types, contents, opset_imports=imports)
    except (shape_inference.InferenceError, checker.ValidationError, ValueError, RuntimeError) as error:
        where = node.name or node.output[0]
        reason = str(error).strip().splitlines()[0]
        raise ModelFileError(f"{source}: {node.op_type} {where}: shapes do not fit together: {reason}") from None


def _uninferred(node: onnx.NodeProto, inputs: Sequence[Value | None]) -> dict[str, onnx.TypeProto]:
    """Types of operators for which onnx has no inference: some norms, two comparisons, the plainest before opset 6."""
    if node.op_type in ("LessOrEqual", "GreaterOrEqual"):
        shape = np.broadcast_shapes(*(value.shape for value in inputs))
        return {node.output[0]: tensor_type(onnx.TensorProto.BOOL, shape)}
    return {node.output[0]: inputs[0].type} if node.op_type in ONNX_WRITTEN else {}


def schema_of(node: onnx.NodeProto, opsets: Mapping[str, int]) -> defs.OpSchema | None:
    """The standard's definition of an operator at the version that the file asks for, or None."""
    if node.domain not in STANDARD:
        return None
    version = opsets.get("", opsets.get("ai.onnx", 1))
    try:
        return defs.get_schema(node.op_type, version, "")
    except defs.SchemaError:
        return None


class Scope:
    """The names that nodes of one graph can read: its own values, then those around it."""

    def __init__(
        self,
        opsets: Mapping[str, int],
        outer: "Scope | None" = None,
        *,
        layer: str = "",
        sees_outer: bool = True,
        whole: bool | None = None,
        recurs: bool | None = None,
        is_scan: bool | None = None,
    ) -> None:
        """What is left out, layer apart, is as in `outer`.

        Args:
            outer: the graph around a body, or the caller of a function.
            sees_outer: a body does, a function reads what it is given and nothing else.
            layer: of the nodes that read no weight of their own.
            whole: all nodes belong to `layer`, whatever they read.
            recurs: the body of a recurrence, where every product is a MAC and every sum belongs to one.
            is_scan: the inside of the function that `export` writes around a selective scan.
        """
        self.opsets = opsets
        self.outer = outer if sees_outer else None
        self.values: dict[str, Value] = {}
        self.layer = layer
        self.whole = bool(outer and outer.whole) if whole is None else whole
        self.recurs = bool(outer and outer.recurs) if recurs is None else recurs
        self.is_scan = bool(outer and outer.is_scan) if is_scan is None else is_scan
        self.captured: dict[Value, None] = {}
        """Values of the surroundings that were read, in order."""

    def find(self, name: str) -> Value | None:
        """None where no value of that name has been made yet."""
        if name in self.values:
            return self.values[name]
        found = None if self.outer is None else self.outer.find(name)
        if found is not None:
            self.captured[found] = None
        return found

    def layer_of(self, node: onnx.NodeProto) -> str:
        """By the first weight that the node, or a body in it, reads; else the layer around."""
        return layer_name(self._weight(node)) or self.layer if not self.whole else self.layer

    def _weight(self, node: onnx.NodeProto) -> str:
        for name in node.input:
            value = self.peek(name)
            if value is not None and value.weight:
                return value.weight
        inner = (self._weight(child) for body in bodies(node) for child in body.node)
        return next(filter(None, inner), "")

    def peek(self, name: str) -> Value | None:
        """The same, without reading it."""
        return self.values.get(name) or (None if self.outer is None else self.outer.peek(name))


def layer_name(weight: str) -> str:
    """The layer that a tensor belongs to: its name without the last part."""
    return weight.rpartition(".")[0] if "." in weight else weight


def constant_value(node: onnx.NodeProto, is_weight: bool) -> Value:
    """What a Constant makes."""
    held = constant_of(node)
    name = node.output[0]
    if held is None:  # text
        return Value(name, tensor_type(onnx.TensorProto.STRING, ()), Origin.STRUCTURE)
    return stored_value(name, held, is_weight)
