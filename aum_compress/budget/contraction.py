"""MACs of an einsum of any number of operands, and of a Fourier transform. Torch-free.

Operands are contracted two at a time, from left to right, which is what torch does without opt_einsum and what
onnxruntime does. An index that is in one of the two alone, and in no later operand nor in the result, is summed out
before they are multiplied, so it costs additions and no product.
"""

import math
from collections.abc import Sequence

from aum_compress.errors import AumError

Index = str
"""A letter of the equation, or a dimension under the ellipsis, such as "...1" for the last but one."""


def einsum_macs(equation: str, shapes: Sequence[Sequence[int]], path: Sequence[int] | None = None) -> int:
    """Products of all contractions of an einsum; with one operand, which is only summed or moved, none.

    >>> einsum_macs("ij,jk->ik", [(2, 3), (3, 5)])
    30
    >>> einsum_macs("ij,jk,kl->il", [(2, 3), (3, 5), (5, 7)])  # (ij,jk->ik), then (ik,kl->il)
    100

    Args:
        equation: as torch, numpy and ONNX write it; without "->", the result has the letters that occur once.
        shapes: of the operands. A size of 1 is broadcast.
        path: places of the two operands to contract at each step, one list of pairs; the result goes to the end. It is
            what torch takes from opt_einsum. From left to right when left out.

    Raises:
        AumError: letters that do not fit the shapes.
    """
    left_side, arrow, result = equation.replace(" ", "").partition("->")
    terms = left_side.split(",")
    if len(terms) != len(shapes):
        raise AumError(f"einsum {equation!r}: found {len(shapes)} operands, wanted {len(terms)}")
    sizes: dict[Index, int] = {}
    operands = []
    for term, shape in zip(terms, shapes):
        indices = _indices(term, len(shape), equation)
        for index, size in zip(indices, shape):
            sizes[index] = max(size, sizes.get(index, 1))
        operands.append({index for index, size in zip(indices, shape) if size != 1})
    if arrow:
        wanted = set(_letters(result)) | {index for index in sizes if index.startswith("...") and "..." in result}
    else:
        letters = _letters(left_side)
        wanted = {index for index in sizes if index.startswith("...") or letters.count(index) == 1}
    macs = 0
    pairs = iter(zip(path[::2], path[1::2])) if path else None
    while len(operands) > 1:
        one, other = next(pairs) if pairs else (0, 1)
        first, second = operands[one], operands[other]
        others = [operand for place, operand in enumerate(operands) if place not in (one, other)]
        kept = wanted.union(*others)
        multiplied = (first & second) | ((first | second) & kept)
        macs += math.prod(sizes[index] for index in multiplied)
        operands = [*others, multiplied & kept] if pairs else [multiplied & kept, *others]
    return macs


def _letters(term: str) -> str:
    return term.replace(".", "")


def _indices(term: str, n_dims: int, equation: str) -> list[Index]:
    """One a dimension; those under an ellipsis are numbered from the last, as broadcasting aligns them."""
    before, ellipsis, after = term.partition("...")
    hidden = n_dims - len(before) - len(after)
    if hidden < 0 or (hidden and not ellipsis):
        raise AumError(f"einsum {equation!r}: found an operand of {n_dims} dimensions, {term!r} wants another number")
    return [*before, *(f"...{place}" for place in reversed(range(hidden))), *after]


def fft_macs(length: int, *, real: bool) -> int:
    """Real multiplications of one discrete Fourier transform of `length` values; libraries differ, this is the rule.

    A power of two: radix 2, `length/2 * log2(length)` butterflies of one complex product, four real ones. Any other
    length: the definition, `length**2` complex products, as no one algorithm fits all lengths. Of real values half.

    >>> fft_macs(512, real=True)
    4608
    """
    steps = length.bit_length() - 1 if length & (length - 1) == 0 else 2 * length
    return length * steps * (1 if real else 2)
