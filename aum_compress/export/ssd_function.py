"""The scan of Mamba-2 in ONNX: products of matrices in a model-local function that viewers show as one node.

No step, no control flow: what `models.ssd` computes, in the same order.
"""

import onnx

from aum_compress.export.scan_function import SCAN_DOMAIN

SSD_NAMES = {True: "StateSpaceDualTwoWay", False: "StateSpaceDual"}
"""Both directions, or forward alone."""

_CAUSAL = {True: "decays = Identity (all_decays)", False: "decays = Trilu <upper = 0> (all_decays)"}

_TEXT = """
<domain: "{domain}", opset_import: ["": {opset}]>
{name} (x, dt, A, B, C, D) => (y)
{{
    exponents = Mul (dt, A)
    token_axis = Constant <value_int = 1> ()
    wide_exponents = Cast <to = 11> (exponents)
    sums = CumSum (wide_exponents, token_axis)
    sums_by_head = Transpose <perm = [0, 2, 1]> (sums)
    last = Constant <value_ints = [-1]> ()
    before_last = Constant <value_ints = [2]> ()
    sums_column = Unsqueeze (sums_by_head, last)
    sums_row = Unsqueeze (sums_by_head, before_last)
    differences = Sub (sums_column, sums_row)
    distances = Abs (differences)
    wide_negative = Neg (distances)
    negative = Cast <to = 1> (wide_negative)
    all_decays = Exp (negative)
    {causal}

    B_by_state = Transpose <perm = [0, 2, 1]> (B)
    products = MatMul (C, B_by_state)
    head_axis = Constant <value_ints = [1]> ()
    products_of_heads = Unsqueeze (products, head_axis)
    weights = Mul (decays, products_of_heads)

    dt_column = Unsqueeze (dt, last)
    driven = Mul (x, dt_column)
    driven_by_head = Transpose <perm = [0, 2, 1, 3]> (driven)
    mixed = MatMul (weights, driven_by_head)
    mixed_by_token = Transpose <perm = [0, 2, 1, 3]> (mixed)
    D_column = Unsqueeze (D, last)
    skipped = Mul (D_column, x)
    y = Add (mixed_by_token, skipped)
}}
"""


def ssd_function(opset: int, two_way: bool) -> onnx.FunctionProto:
    """`models.ssd.ssd` over operators of `opset`, for float32; shapes alike."""
    name, causal = SSD_NAMES[two_way], _CAUSAL[two_way]
    return onnx.parser.parse_function(_TEXT.format(domain=SCAN_DOMAIN, name=name, opset=opset, causal=causal))
