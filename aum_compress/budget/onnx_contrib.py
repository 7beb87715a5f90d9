"""onnxruntime's own operators, as it writes them into optimised and quantised files, in terms of the standard's.

Each is written as the nodes that compute the same, so that sizes, MACs and elementwise operations follow from those.
Integer operators stand as their floating-point kin, as QLinearMatMul is counted too: bringing sums to the scale of the
result is not counted apart. Torch-free.
"""

from collections.abc import Callable, Sequence

import onnx
from onnx import helper, parser

from aum_compress.budget.onnx_values import Value

DOMAINS = ("com.microsoft", "")
"""Some bear the standard's domain, which does not know them, or not at the version that the file asks for."""
OPSET = 23
"""Version of the standard's operators that the definitions below use."""


class Unsupported(Exception):
    """A form of an operator that is not written out here."""


class _Node:
    """What a definition reads of the node that it stands for. Inputs are called i0, i1 ..., outputs o0, o1 ..."""

    def __init__(self, node: onnx.NodeProto, inputs: Sequence[Value | None]) -> None:
        self.attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        self.inputs = inputs
        self.outputs = node.output

    def has(self, place: int) -> bool:
        return place < len(self.inputs) and self.inputs[place] is not None

    def makes(self, place: int) -> bool:
        return place < len(self.outputs) and bool(self.outputs[place])

    def shape(self, place: int) -> tuple[int, ...]:
        return self.inputs[place].shape

    def number(self, name: str, default: float = 0) -> float:
        return self.attributes.get(name, default)

    def list(self, name: str) -> str:
        """An attribute of several numbers in onnx's text form, or nothing."""
        return f"{name} = {[*self.attributes[name]]}, " if name in self.attributes else ""

    def plus(self, place: int, name: str) -> tuple[str, str]:
        """Text that adds an optional input, and the name of the sum."""
        return (f"{name}_sum = Add ({name}, i{place}) ", f"{name}_sum") if self.has(place) else ("", name)

    def quantised(self, zero_point: int) -> str:
        """Text that makes the first output from `y`, at the type of a zero point (uint8 without one)."""
        return f"o0 = CastLike (y, i{zero_point})" if self.has(zero_point) else "o0 = Cast <to = 2> (y)"


def _floats(*places: int) -> str:
    return " ".join(f"f{place} = Cast <to = 1> (i{place})" for place in places)


def _matmul(n: _Node) -> str:
    text, operands = "", []
    for place, side in enumerate("AB"):
        rank = len(n.shape(place))
        order = [*range(rank)]
        if n.number(f"transBatch{side}"):
            order = [*order[1:-1], 0, order[-1]]
        if n.number(f"trans{side}"):
            order[-2:] = order[:-3:-1]
        text += f"m{place} = Transpose <perm = {order}> (i{place}) "
        operands.append(f"m{place}")
    scaled = n.number("alpha", 1.0) != 1.0
    text += f"{'p' if scaled else 'o0'} = MatMul ({', '.join(operands)}) "
    return text + (f"a = Constant <value_float = {float(n.number('alpha'))}> () o0 = Mul (p, a)" if scaled else "")


def _activation(n: _Node) -> str:
    name = n.attributes.get("activation", b"").decode()
    return f"o0 = {name} (y)" if name else "o0 = Identity (y)"


def _convolution(n: _Node, operands: str) -> str:
    padding = n.attributes.get("auto_pad", b"NOTSET").decode()
    lists = "".join(n.list(name) for name in ("dilations", "kernel_shape", "pads", "strides"))
    return f'Conv <{lists}auto_pad = "{padding}", group = {n.number("group", 1)}> ({operands})'


def _fused_conv(n: _Node) -> str:
    operands = ", ".join(f"i{place}" for place in range(3) if n.has(place))
    text, result = n.plus(3, "c")
    return f"c = {_convolution(n, operands)} {text} y = Identity ({result}) {_activation(n)}"


def _quantised_conv(n: _Node) -> str:
    last = n.number("channels_last")
    rank = len(n.shape(0))
    to_first, to_last = [0, rank - 1, *range(1, rank - 1)], [0, *range(2, rank), 1]
    bias = ", f8" if n.has(8) else ""
    return (
        f"{_floats(0, 3)} {_floats(8) if n.has(8) else ''} "
        f"x = Transpose <perm = {to_first if last else [*range(rank)]}> (f0) c = {_convolution(n, f'x, f3{bias}')} "
        f"y = Transpose <perm = {to_last if last else [*range(rank)]}> (c) {n.quantised(7)}"
    )


def _gemm(n: _Node) -> str:
    transposed = f"transA = {n.number('transA')}, transB = {n.number('transB')}"
    return f"y = Gemm <{transposed}> ({'i0, i1, i2' if n.has(2) else 'i0, i1'}) {_activation(n)}"


def _quantised_gemm(n: _Node) -> str:
    transposed = f"transA = {n.number('transA')}, transB = {n.number('transB')}"
    bias = n.has(6)
    text = f"{_floats(0, 3)} {_floats(6) if bias else ''} y = Gemm <{transposed}> (f0, f3{', f6' if bias else ''}) "
    return text + (n.quantised(8) if n.has(7) else "o0 = Identity (y)")


def _skip_norm(norm: str, beta: int | None, bias: int) -> Callable[[_Node], str]:
    def definition(n: _Node) -> str:
        text, total = n.plus(bias, "s")
        operands = f"{total}, i2" + (f", i{beta}" if beta and n.has(beta) else "")
        text = f"s = Add (i0, i1) {text} o0 = {norm} <axis = -1> ({operands}) "
        if n.makes(1) or n.makes(2):
            raise Unsupported
        return text + (f"o3 = Identity ({total})" if n.makes(3) else "")

    return definition


def _norm(norm: str) -> Callable[[_Node], str]:
    def definition(n: _Node) -> str:
        operands = ", ".join(f"i{place}" for place in range(3) if n.has(place))
        if n.makes(1) or n.makes(2):
            raise Unsupported
        return f"o0 = {norm} <axis = {n.number('axis', -1)}> ({operands})"

    return definition


def _fast_gelu(n: _Node) -> str:
    text, result = n.plus(1, "x")
    return f'x = Identity (i0) {text} o0 = Gelu <approximate = "tanh"> ({result})'


def _quick_gelu(n: _Node) -> str:
    alpha = float(n.number("alpha", 1.702))
    if alpha == 1:
        return "s = Sigmoid (i0) o0 = Mul (s, i0)"
    return f"a = Constant <value_float = {alpha}> () x = Mul (a, i0) s = Sigmoid (x) o0 = Mul (s, i0)"


def _matmul_bits(n: _Node) -> str:
    text, result = n.plus(5, "y")
    return (
        f"size = Constant <value_ints = [{n.number('K')}, {n.number('N')}]> () w = ConstantOfShape (size) "
        f"b = CastLike (w, i0) y = MatMul (i0, b) {text} o0 = Identity ({result})"
    )


def _dynamic_matmul(n: _Node) -> str:
    text, result = n.plus(4, "y")
    return (
        f"q, scale, zero = DynamicQuantizeLinear (i0) {_floats(1)} f = Cast <to = 1> (q) y = MatMul (f, f1) {text} "
        f"o0 = Identity ({result})"
    )


def _integer_matmul(n: _Node) -> str:
    text, result = n.plus(6, "y")
    return f"{_floats(0, 1)} y = MatMul (f0, f1) {text} o0 = Identity ({result})"


def _both(operator: str) -> Callable[[_Node], str]:
    return lambda n: f"{_floats(0, 3)} y = {operator} (f0, f3) {n.quantised(7)}"


def _one(operator: str) -> Callable[[_Node], str]:
    return lambda n: f"{_floats(0)} y = {operator} (f0) {n.quantised(4)}"


def _quantised_softmax(n: _Node) -> str:
    return f"{_floats(0)} y = Softmax <axis = {n.number('axis', -1)}> (f0) {n.quantised(4)}"


def _channels_last(n: _Node, operator: str, source: str) -> str:
    rank = len(n.shape(0))
    return (
        f"x = Transpose <perm = {[0, rank - 1, *range(1, rank - 1)]}> ({source}) p = {operator} (x) "
        f"y = Transpose <perm = {[0, *range(2, rank), 1]}> (p) "
    )


def _pool(n: _Node, operator: str) -> str:
    padding = n.attributes.get("auto_pad", b"NOTSET").decode()
    lists = "".join(n.list(name) for name in ("kernel_shape", "pads", "strides", "dilations"))
    ceiling = int(n.number("ceil_mode"))
    return f'{operator} <{lists}auto_pad = "{padding}", ceil_mode = {ceiling}>'


def _quantised_pool(operator: str) -> Callable[[_Node], str]:
    def definition(n: _Node) -> str:
        pool = operator if operator.startswith("Global") else _pool(n, operator)
        text = _channels_last(n, pool, "f0") if n.number("channels_last") else f"y = {pool} (f0) "
        return f"{_floats(0)} {text} {n.quantised(4)}"

    return definition


def _quantised_concat(n: _Node) -> str:
    parts = ", ".join(f"i{place}" for place in range(2, len(n.inputs), 3))
    return f"o0 = Concat <axis = {n.number('axis')}> ({parts})"


def _heads(n: _Node, sizes: Sequence[int], batch: int, lengths: Sequence[int], bias: int) -> str:
    """Attention over q, k, v, each (B, L, heads*width): text from there to `y`, (B, L, width of v)."""
    heads = int(n.number("num_heads"))
    width = sizes[0] // heads
    scale = float(n.number("scale", 0.0)) or width**-0.5
    text = ""
    for name, size, length in zip("qkv", sizes, lengths):
        order = [0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]
        text += (
            f"{name}_shape = Constant <value_ints = [{batch}, {length}, {heads}, {size // heads}]> () "
            f"{name}_parts = Reshape ({name}, {name}_shape) {name}_heads = Transpose <perm = {order}> ({name}_parts) "
        )
    added, scores = n.plus(bias, "scaled")
    return text + (
        f"products = MatMul (q_heads, k_heads) scale = Constant <value_float = {scale}> () "
        f"scaled = Mul (products, scale) {added} weights = Softmax ({scores}) mixed = MatMul (weights, v_heads) "
        f"back = Transpose <perm = [0, 2, 1, 3]> (mixed) "
        f"whole = Constant <value_ints = [{batch}, {lengths[0]}, {sizes[2]}]> () o0 = Reshape (back, whole)"
    )


def _packed_attention(n: _Node, weight: str, past: int, bias: int) -> str:
    if n.has(past) or n.makes(1) or n.attributes.get("do_rotary"):
        raise Unsupported
    batch, length, _ = n.shape(0)
    packed = n.shape(1)[1]
    sizes = [*n.attributes.get("qkv_hidden_sizes", [packed // 3] * 3)]
    text, joined = n.plus(2, "p")
    return (
        f"{weight} p = MatMul (x, w) {text} sizes = Constant <value_ints = {sizes}> () "
        f"q, k, v = Split <axis = -1> ({joined}, sizes) {_heads(n, sizes, batch, [length] * 3, bias)}"
    )


def _attention(n: _Node) -> str:
    return _packed_attention(n, "x = Identity (i0) w = Identity (i1)", past=4, bias=5)


def _quantised_attention(n: _Node) -> str:
    return _packed_attention(n, "x = Cast <to = 1> (i0) w = Cast <to = 1> (i1)", past=8, bias=len(n.inputs))


def _multi_head_attention(n: _Node) -> str:
    separate = n.has(1) and n.has(2) and all(len(n.shape(place)) == 3 for place in range(3))
    if not separate or any(n.has(place) for place in (6, 7)) or n.makes(1):
        raise Unsupported
    sizes = [n.shape(place)[2] for place in range(3)]
    text = " ".join(f"{name}{'_in' if n.has(3) else ''} = Identity (i{place})" for place, name in enumerate("qkv"))
    if n.has(3):
        text += f" b_sizes = Constant <value_ints = {sizes}> () qb, kb, vb = Split <axis = 0> (i3, b_sizes) "
        text += " ".join(f"{name} = Add ({name}_in, {name}b)" for name in "qkv")
    lengths = [n.shape(place)[1] for place in range(3)]
    return f"{text} {_heads(n, sizes, n.shape(0)[0], lengths, 5)}"


DEFINITIONS: dict[str, Callable[[_Node], str]] = {
    "Attention": _attention,
    "BiasGelu": lambda n: "s = Add (i0, i1) o0 = Gelu (s)",
    "DequantizeLinear": lambda n: f"o0 = DequantizeLinear <axis = {n.number('axis', 1)}> ({_present(n)})",
    "DynamicQuantizeMatMul": _dynamic_matmul,
    "FastGelu": _fast_gelu,
    "FusedConv": _fused_conv,
    "FusedGemm": _gemm,
    "FusedMatMul": _matmul,
    "Gelu": lambda n: "o0 = Gelu (i0)",
    "LayerNormalization": _norm("LayerNormalization"),
    "MatMulIntegerToFloat": _integer_matmul,
    "MatMulNBits": _matmul_bits,
    "MultiHeadAttention": _multi_head_attention,
    "NhwcMaxPool": lambda n: f"{_channels_last(n, _pool(n, 'MaxPool'), 'i0')} o0 = Identity (y)",
    "QAttention": _quantised_attention,
    "QGemm": _quantised_gemm,
    "QLinearAdd": _both("Add"),
    "QLinearAveragePool": _quantised_pool("AveragePool"),
    "QLinearConcat": _quantised_concat,
    "QLinearConv": _quantised_conv,
    "QLinearGlobalAveragePool": _quantised_pool("GlobalAveragePool"),
    "QLinearLeakyRelu": _one("LeakyRelu"),
    "QLinearMul": _both("Mul"),
    "QLinearSigmoid": _one("Sigmoid"),
    "QLinearSoftmax": _quantised_softmax,
    "QuantizeLinear": lambda n: f"o0 = QuantizeLinear <axis = {n.number('axis', 1)}> ({_present(n)})",
    "QuickGelu": _quick_gelu,
    "SimplifiedLayerNormalization": _norm("RMSNormalization"),
    "SkipLayerNormalization": _skip_norm("LayerNormalization", beta=3, bias=4),
    "SkipSimplifiedLayerNormalization": _skip_norm("RMSNormalization", beta=None, bias=3),
}


def _present(n: _Node) -> str:
    return ", ".join(f"i{place}" for place in range(len(n.inputs)) if n.has(place))


def is_contrib(node: onnx.NodeProto) -> bool:
    """Whether it is an operator of onnxruntime's own that is defined here, in one form at least."""
    return node.domain in DOMAINS and node.op_type in DEFINITIONS


def contrib_function(node: onnx.NodeProto, inputs: Sequence[Value | None]) -> onnx.FunctionProto | None:
    """The definition of a node that `is_contrib`, for the inputs that it has; None for a form that is not written out.

    Args:
        inputs: None where an optional one is left out.

    Raises:
        Unsized: an input whose size does not follow from those of the graph's inputs.
    """
    view = _Node(node, inputs)
    try:
        body = DEFINITIONS[node.op_type](view)
    except Unsupported:
        return None
    formals = ", ".join(f"i{place}" for place in range(len(inputs)))
    results = ", ".join(f"o{place}" for place in range(len(node.output)))
    head = f'<domain: "com.microsoft", opset_import: ["": {OPSET}]> {node.op_type} ({formals}) => ({results})'
    return parser.parse_function(f"{head} {{ {body} }}")
