"""Where int8 kernels of x86 CPUs without VNNI give wrong sums: VPMADDUBSW adds two products in 16 bits and saturates.

An input is at most 255, so a pair of weights is safe while 255 times the sum of its positive ones, and that of its
negative ones, stays within 16 bits: always with weights of 7 bits (255 * 126 = 32,130), not with 8 (255 * 254).
"""

import torch
from torch import Tensor, nn

from aum_compress.models.quantized import ZERO_POINT_MAX, QuantizedLayer
from aum_compress.models.storage import QUANTISED_INPUTS

LOWEST, HIGHEST = -(2**15), 2**15 - 1


def saturating_pairs(model: nn.Module) -> int:
    """How many neighbouring pairs of int8 weights could saturate, over all layers with integer inputs."""
    layers = [m for m in model.modules() if isinstance(m, QuantizedLayer) and m.storage in QUANTISED_INPUTS]
    return sum(int(_could_saturate(layer.weight).sum()) for layer in layers)


def _could_saturate(weight: Tensor) -> Tensor:
    """(outputs, pairs) of int8 `weight` (outputs, ...)."""
    first, second = _pairs(weight.flatten(1).int())
    up = ZERO_POINT_MAX * (first.clamp(min=0) + second.clamp(min=0))
    down = ZERO_POINT_MAX * (first.clamp(max=0) + second.clamp(max=0))
    return (up > HIGHEST) | (down < LOWEST)


def _pairs(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Even and odd columns; a row of odd length ends with a zero."""
    rows = nn.functional.pad(rows, (0, rows.shape[1] % 2))
    return rows[:, 0::2], rows[:, 1::2]


def saturating_product(inputs: Tensor, weight: Tensor) -> Tensor:
    """(n, outputs) int64 sums as VPMADDUBSW makes them: pairs of products saturate at 16 bits, then add up in 32.

    Args:
        inputs: (n, K) integers from 0 to 255. weight: (outputs, K) int8.
    """
    first, second = _pairs(weight.int())
    x, y = _pairs(inputs.int())
    found = torch.zeros(len(inputs), len(weight), dtype=torch.int64)
    for pair in range(first.shape[1]):
        sums = x[:, pair, None] * first[:, pair] + y[:, pair, None] * second[:, pair]
        found += sums.clamp(LOWEST, HIGHEST)
    return found
