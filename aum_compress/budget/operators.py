"""What each operator of torch and of ONNX costs, but for products of matrices and convolutions. Torch-free.

Both graphs are counted in the same kinds. An operator that stands nowhere here is unknown, and an error to its counter.
"""

MAC = "mac"
"""The kind of everything that the budget gates; the others are listed apart."""


def _by_operator(names_by_kind: dict[str, str]) -> dict[str, str]:
    return {name: kind for kind, names in names_by_kind.items() for name in names.split()}


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


TORCH_WRITTEN = _by_operator(
    {
        "add": "add add_ sub sub_ rsub",
        "multiply": "mul mul_ square",
        "negate": "neg",
        "divide": "div div_ reciprocal",
        "power": "pow",
        "root": "sqrt rsqrt",
        "exp": "exp exp_ expm1",
        "log": "log log1p log10 log2",
        "softplus": "softplus",
        "sigmoid": "sigmoid sigmoid_ tanh tanh_ erf",
        "silu": "silu silu_",
        "gelu": "gelu",
        "relu": "relu relu_ relu6 relu6_ leaky_relu elu hardtanh hardtanh_ hardswish hardswish_ hardsigmoid prelu mish",
        "compare": "clamp clamp_ clamp_min abs maximum minimum where eq ne ge gt le lt logical_and logical_not",
        "round": "round floor ceil",
        "softmax": "softmax log_softmax",
        "batch_norm": "batch_norm",
        "norm": "layer_norm group_norm instance_norm rms_norm",
        "trigonometric": "sin cos",
    }
)
"""aten operator -> kind, counted by the results that it writes."""

TORCH_READ = _by_operator(
    {
        "reduce": "sum mean cumsum var std max amax min amin argmax",
        "pool": "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d",
    }
)
"""aten operator -> kind, counted by the values that it reads."""

TORCH_POOLS = ("avg_pool1d", "avg_pool2d", "max_pool1d", "max_pool2d")
"""Counted by the values that their windows read."""

TORCH_FREE = _names(
    "alias clone constant_pad_nd copy dropout dropout_ empty_like expand_as feature_dropout flip index_select "
    "lift_fresh mT masked_fill_ movedim new_ones numel numpy_T ones_like pad repeat reshape_as scalar_tensor "
    "select_scatter slice_scatter squeeze_ swapaxes tensor_split tile tril triu unflatten unfold view_as"
)
"""Moves or copies values; fvcore itself knows the commonest."""

ONNX_WRITTEN = _by_operator(
    {
        "add": "Add Sub Sum",
        "multiply": "Mul",
        "negate": "Neg",
        "divide": "Div Reciprocal",
        "power": "Pow",
        "root": "Sqrt",
        "exp": "Exp",
        "log": "Log",
        "softplus": "Softplus",
        "sigmoid": "Sigmoid Tanh Erf",
        "silu": "Swish",
        "gelu": "Gelu",
        "relu": "Relu LeakyRelu Elu Selu HardSigmoid HardSwish PRelu Mish",
        "compare": "Clip Abs Max Min Where Equal Greater GreaterOrEqual Less LessOrEqual And Or Not Sign",
        "round": "Round Floor Ceil",
        "softmax": "Softmax LogSoftmax",
        "batch_norm": "BatchNormalization",
        "norm": "LayerNormalization GroupNormalization InstanceNormalization RMSNormalization",
        "quantize": "QuantizeLinear",
        "dequantize": "DequantizeLinear",
        "trigonometric": "Sin Cos",
    }
)
"""ONNX operator -> kind, counted by the results that it writes."""

ONNX_READ = _by_operator(
    {
        "reduce": "ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceSumSquare CumSum ArgMax",
        "pool": "GlobalAveragePool GlobalMaxPool",
    }
)
"""ONNX operator -> kind, counted by the values that it reads."""

ONNX_POOLS = ("AveragePool", "MaxPool")
"""Counted by the values that their windows read."""

ONNX_FREE = _names(
    "Cast CastLike Concat Constant ConstantOfShape DepthToSpace Dropout Expand EyeLike Flatten Gather GatherElements "
    "GatherND Identity Pad Range Reshape ScatterElements ScatterND Shape Size Slice SpaceToDepth Split Squeeze Tile "
    "Transpose Trilu Unsqueeze"
)
"""Moves, copies or converts values."""
