"""Where int8 kernels without VNNI saturate, held against a plain loop over 16-bit sums."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aum_compress.compress.saturation import saturating_pairs, saturating_product
from aum_compress.models.quantized import QuantizedLayer, swap_in_quantized

LEVELS, WEIGHTS = st.integers(0, 255), st.integers(-127, 127)


def by_hand(levels: list[int], weights: list[int]) -> int:
    total = 0
    for first in range(0, len(levels), 2):
        pair = sum(level * weight for level, weight in zip(levels[first : first + 2], weights[first : first + 2]))
        total += int(np.clip(pair, -(2**15), 2**15 - 1))
    return total


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(LEVELS, WEIGHTS), min_size=1, max_size=9))
def test_pairs_saturate_at_16_bits_and_add_up_in_32(pairs):
    levels, weights = map(list, zip(*pairs))
    found = saturating_product(torch.tensor([levels]), torch.tensor([weights], dtype=torch.int8))
    assert int(found) == by_hand(levels, weights)
    if max(map(abs, weights)) <= 63:
        assert int(found) == sum(level * weight for level, weight in pairs)


def test_pairs_are_counted_where_they_could_and_inputs_are_integers():
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1))
    swap_in_quantized(model, {"0": "int8", "1": "int8-weight"})
    layer: QuantizedLayer = model[0]
    layer.weight.copy_(torch.tensor([[127, 127, 64, -127], [-127, -2, 63, 63]]))
    model[1].weight.fill_(127)  # multiplied in float32
    assert saturating_pairs(model) == 2  # 127 and 127; -127 and -2, whose 255 * 129 is just too much
    layer.weight.clamp_(-63, 63)
    assert saturating_pairs(model) == 0
