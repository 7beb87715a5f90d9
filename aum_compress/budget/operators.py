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
        "add": "add sub rsub subtract logical_xor index_add scatter_add",
        "multiply": "mul multiply square",
        "negate": "neg negative",
        "divide": "div divide true_divide floor_divide reciprocal remainder fmod",
        "power": "pow float_power",
        "root": "sqrt rsqrt",
        "exp": "exp exp2 expm1",
        "log": "log log1p log10 log2",
        "softplus": "softplus log_sigmoid",
        "sigmoid": "sigmoid tanh erf softsign",
        "silu": "silu",
        "gelu": "gelu",
        "relu": "relu relu6 leaky_relu elu celu selu hardtanh hardswish hardsigmoid prelu mish threshold rrelu "
        "hardshrink softshrink",
        "compare": "clamp clamp_min clamp_max clip abs absolute sign maximum minimum fmax fmin where eq ne ge gt le lt "
        "isnan isinf isfinite nan_to_num logical_and logical_or logical_not",
        "bitwise": "bitwise_and bitwise_or bitwise_xor bitwise_not __and__ __or__ __xor__",
        "round": "round floor ceil trunc frac",
        "softmax": "softmax log_softmax",
        "batch_norm": "batch_norm",
        "norm": "layer_norm group_norm instance_norm rms_norm",
        "trigonometric": "sin cos tan asin acos atan atan2 sinh cosh angle polar",
        "interpolate": "upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d "
        "_upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler",
        "quantize": "quantize_per_tensor quantize_per_channel",
        "dequantize": "dequantize",
        "random": "rand randn rand_like randn_like randint normal uniform bernoulli exponential",
    }
)
"""aten operator -> kind, counted by the results that it writes. What works in place (`add_`) costs the same."""

TORCH_SEVERAL = {
    "addcmul": ("multiply", "add"),
    "addcdiv": ("divide", "add"),
    "lerp": ("add", "multiply", "add"),
    "glu": ("sigmoid", "multiply"),
    "logaddexp": ("exp", "add", "log"),
    "fake_quantize_per_tensor_affine": ("quantize", "dequantize"),
    "fake_quantize_per_channel_affine": ("quantize", "dequantize"),
}
"""aten operator -> kinds, each counted by the results that it writes."""

TORCH_READ = _by_operator(
    {
        "reduce": "sum mean prod cumsum cumprod var std var_mean std_mean max amax min amin aminmax argmax argmin any "
        "all norm frobenius_norm linalg_vector_norm linalg_norm logsumexp nansum nanmean count_nonzero col2im",
        "pool": "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
        "adaptive_max_pool3d",
        "norm": "_weight_norm",
        "sort": "sort argsort topk median kthvalue mode",
    }
)
"""aten operator -> kind, counted by the values that it reads."""

TORCH_POOLS = _names(
    "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices "
    "max_pool3d_with_indices fractional_max_pool2d fractional_max_pool3d"
)
"""Counted by the values that their windows read."""

TORCH_FREE = _names(
    # conversions of sizes, which trace as operators
    "Bool Float FloatImplicit Int IntImplicit ScalarImplicit dim device is_floating_point len numel size stride "
    "sym_size _shape_as_tensor "
    # constants
    "arange empty empty_like eye full full_like linspace new_empty new_full new_ones new_tensor new_zeros ones "
    "ones_like scalar_tensor tril_indices triu_indices zeros zeros_like fill zero "
    # another view of the same values
    "H T adjoint alias as_strided broadcast_tensors broadcast_to chunk conj contiguous detach diagonal dsplit expand "
    "expand_as flatten hsplit imag lift lift_fresh mH mT matrix_H movedim moveaxis narrow numpy_T permute positive "
    "ravel real requires_grad reshape reshape_as resolve_conj resolve_neg select slice split split_with_sizes squeeze "
    "swapaxes swapdims t tensor_split transpose unbind unflatten unfold unsqueeze view view_as view_as_complex "
    "view_as_real vsplit "
    # copies
    "_cast_Float _cast_Long _pad_circular _to_copy block_diag cat channel_shuffle clone column_stack complex concat "
    "concatenate constant_pad_nd copy diag diag_embed diag_scatter dstack embedding fliplr flip flipud gather hstack "
    "im2col index index_copy index_fill index_put index_select masked_fill max_unpool2d max_unpool3d meshgrid one_hot "
    "pad pixel_shuffle pixel_unshuffle reflection_pad1d reflection_pad2d reflection_pad3d repeat repeat_interleave "
    "replication_pad1d replication_pad2d replication_pad3d roll rot90 scatter select_scatter slice_scatter stack take "
    "take_along_dim tensor tile to tril triu type_as unsafe_chunk unsafe_split unsafe_split_with_sizes "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d vstack"
)
"""Moves or copies values. What works in place costs the same."""

ONNX_WRITTEN = _by_operator(
    {
        "add": "Add Sub Sum Mean",
        "multiply": "Mul",
        "negate": "Neg",
        "divide": "Div Reciprocal Mod MelWeightMatrix",
        "power": "Pow",
        "root": "Sqrt",
        "exp": "Exp",
        "log": "Log",
        "softplus": "Softplus",
        "sigmoid": "Sigmoid Tanh Erf Softsign",
        "silu": "Swish",
        "gelu": "Gelu",
        "relu": "Relu LeakyRelu Elu Celu Selu HardSigmoid HardSwish PRelu Mish ThresholdedRelu Shrink",
        "compare": "Clip Abs Max Min Where Equal Greater GreaterOrEqual Less LessOrEqual And Or Xor Not Sign IsNaN "
        "IsInf",
        "bitwise": "BitShift BitwiseAnd BitwiseOr BitwiseXor BitwiseNot",
        "round": "Round Floor Ceil",
        "softmax": "Softmax LogSoftmax Hardmax",
        "batch_norm": "BatchNormalization",
        "norm": "LayerNormalization GroupNormalization InstanceNormalization RMSNormalization LRN LpNormalization "
        "MeanVarianceNormalization",
        "quantize": "QuantizeLinear",
        "dequantize": "DequantizeLinear",
        "trigonometric": "Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Acosh Atanh HannWindow HammingWindow "
        "BlackmanWindow",
        "random": "RandomNormal RandomNormalLike RandomUniform RandomUniformLike Bernoulli Multinomial",
        "interpolate": "GridSample Resize Upsample",
    }
)
"""ONNX operator -> kind, counted by the results that it writes."""

ONNX_READ = _by_operator(
    {
        "reduce": "ReduceMean ReduceSum ReduceMax ReduceMin ReduceL1 ReduceL2 ReduceProd ReduceSumSquare ReduceLogSum "
        "ReduceLogSumExp CumSum CumProd ArgMax ArgMin Col2Im",
        "pool": "GlobalAveragePool GlobalMaxPool GlobalLpPool",
        "sort": "TopK Unique",
        "compare": "NonZero",
        "quantize": "DynamicQuantizeLinear",
    }
)
"""ONNX operator -> kind, counted by the values that it reads."""

ONNX_POOLS = ("AveragePool", "MaxPool", "LpPool")
"""Counted by the values that their windows read."""

ONNX_FREE = _names(
    "BitCast Cast CastLike CenterCropPad Compress Concat ConcatFromSequence Constant ConstantOfShape DepthToSpace "
    "Dropout Expand EyeLike Flatten Gather GatherElements GatherND Identity MaxUnpool OneHot Optional "
    "OptionalGetElement OptionalHasElement Pad Range Reshape ReverseSequence Scatter ScatterElements ScatterND "
    "SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength Shape Size Slice "
    "SpaceToDepth Split SplitToSequence Squeeze TensorScatter Tile Transpose Trilu Unsqueeze"
)
"""Moves, copies or converts values. A scatter that reduces on the way counts the values that it reads as `reduce`."""

ONNX_VIEWS = _names(
    "Flatten Identity Optional OptionalGetElement Reshape SequenceAt SequenceConstruct SequenceErase SequenceInsert "
    "SplitToSequence Squeeze Unsqueeze"
)
"""Those that need no memory of their own."""

ONNX_BY_DEFINITION = _names("Attention CausalConvWithState LinearAttention RotaryEmbedding SwiGLU")
"""Counted as the function of other operators by which the standard defines them."""

ONNX_REFUSED = _names(
    "AffineGrid DeformConv Det ImageDecoder MaxRoiPool NegativeLogLikelihoodLoss NonMaxSuppression RegexFullMatch "
    "RoiAlign SequenceMap SoftmaxCrossEntropyLoss StringConcat StringNormalizer StringSplit TfIdfVectorizer"
)
"""Of the standard, but no part of a network for sound: losses, detection in images, text. Unknown to the counter."""
