"""The arithmetic of integers: grids, packing, rounding, and gradients that pass it."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aum_compress.models.fake_quantized import (
    FakeQuantize,
    FakeQuantizedLayer,
    round_weight,
    set_observing,
    top_of,
    uint8_grid,
    value_range,
    weight_scale,
)
from aum_compress.models.quantized import dequantize_weight, pack_int4, quantize_dequantize, unpack_int4

ROOT = Path(__file__).parent.parent
TOPS = st.sampled_from((7, 63, 127))
FEW = settings(max_examples=40, deadline=None)
finite = st.floats(-1e3, 1e3, width=32)


def tensors(*shapes: tuple[int, ...]):
    def filled(shape):
        count = torch.Size(shape).numel()
        return st.lists(finite, min_size=count, max_size=count).map(lambda values: torch.tensor(values).view(shape))

    return st.sampled_from(shapes).flatmap(filled)


def test_quantize_dequantize_follows_onnx():
    """Round half to even, saturate, exact zero."""
    scale, zero_point = torch.tensor(0.5), torch.tensor(10, dtype=torch.uint8)
    x = torch.tensor([0.0, 0.25, 0.75, -5.0, -100.0, 1000.0])
    wanted = torch.tensor([0.0, 0.0, 1.0, -5.0, -5.0, 122.5])
    torch.testing.assert_close(quantize_dequantize(x, scale, zero_point), wanted)


@FEW
@given(st.lists(st.integers(-8, 7), max_size=40))
def test_packing_keeps_every_value(values):
    weights = torch.tensor(values, dtype=torch.int8)
    packed = pack_int4(weights)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-len(values) // 2)
    assert torch.equal(unpack_int4(packed, weights.shape), weights)


def test_packing_is_that_of_onnx():
    assert pack_int4(torch.tensor([1, -1, 7], dtype=torch.int8)).tolist() == [0xF1, 0x07]


@FEW
@given(weight=tensors((3, 4), (2, 1, 3), (2, 2, 3, 3)), top=TOPS)
def test_rounded_weights_are_as_near_as_their_steps_allow(weight, top):
    scale = weight_scale(weight, top)
    integers = round_weight(weight, scale, top)
    assert int(integers.abs().max()) <= top
    error = (dequantize_weight(integers, scale) - weight).flatten(1)
    plain = weight.abs().flatten(1).amax(1) / top
    if top > 7:  # the whole range is covered
        assert (error.abs().amax(1) <= 0.5 * plain * (1 + 1e-4) + 1e-30).all()
    # clipping is chosen only where it helps
    unclipped = (torch.round(weight.flatten(1) / plain.clamp_min(1e-30)[:, None]) * plain[:, None]) - weight.flatten(1)
    assert (error.square().sum(1) <= unclipped.square().sum(1) * (1 + 1e-3) + 1e-12).all()


@pytest.mark.parametrize("top", [7, 63, 127])
def test_channels_of_zeros_and_of_one_value_are_exact(top):
    weight = torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.3, 0.3], [-0.7, -0.7, -0.7]])
    scale = weight_scale(weight, top)
    found = dequantize_weight(round_weight(weight, scale, top), scale)
    assert torch.isfinite(scale).all()
    assert torch.equal(found[0], weight[0])
    torch.testing.assert_close(found, weight, rtol=1e-6, atol=0)


def test_an_outlier_costs_other_channels_nothing():
    weight = torch.linspace(-1, 1, 32).repeat(2, 1)
    weight[0, 0] = 1e4
    scale = weight_scale(weight, 63)
    assert float(scale[1]) == pytest.approx(1 / 63)
    assert float(scale[0]) == pytest.approx(1e4 / 63)


@FEW
@given(low=st.floats(-1e4, 1e4), high=st.floats(-1e4, 1e4))
def test_zero_is_on_every_grid_and_the_range_is_covered(low, high):
    low, high = sorted((low, high))
    scale, zero_point = uint8_grid(torch.tensor(low), torch.tensor(high))
    assert float(scale) > 0
    assert float(quantize_dequantize(torch.zeros(()), scale, zero_point)) == 0.0
    for end in (low, high):
        found = float(quantize_dequantize(torch.tensor(end), scale, zero_point))
        assert abs(found - end) <= float(scale) * (1 + 1e-3)


@FEW
@given(st.floats(-1e3, 1e3, width=32))
def test_a_constant_activation_is_kept(value):
    low, high = value_range(torch.full((4, 5), value), 99.9)
    scale, zero_point = uint8_grid(low, high)
    found = quantize_dequantize(torch.tensor(value), scale, zero_point)
    assert float(found) == pytest.approx(value, rel=0.01, abs=1e-9)


def test_the_sample_of_a_range_reaches_every_channel():
    x = torch.zeros(40, 1000, 4)
    x[..., 3] = 9.0  # with a step of 4, or of any divisor of the size, it might never be met
    _, high = value_range(x, 99.0, most=40_000)
    assert float(high) == 9.0
    assert float(value_range(x, 100.0, most=10)[1]) == 9.0


def test_percentiles_clip_outliers():
    x = torch.linspace(-1, 1, 10_001)
    x[0] = -1e6
    low, high = value_range(x, 99.9)
    assert -1.1 < float(low) < -0.9
    assert 0.9 < float(high) <= 1.0


@pytest.mark.parametrize(("storage", "bits", "top"), [("int8", 7, 63), ("int8", 8, 127), ("int8-weight", 7, 127)])
def test_seven_bits_are_for_integer_products_alone(storage, bits, top):
    assert top_of(storage, bits) == top
    assert top_of("int4-weight", bits) == 7


def test_gradients_pass_the_rounding_and_stop_where_values_are_clipped():
    quantizer = FakeQuantize(100.0).train()
    quantizer.set_range(-1.0, 1.0)
    x = torch.tensor([-3.0, -0.5, 0.013, 0.5, 3.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("storage", ["int8", "int4-weight"])
def test_gradients_reach_float_weights(storage):
    torch.manual_seed(0)
    layer = FakeQuantizedLayer(nn.Linear(6, 4), storage, 7, 99.9).train()
    if layer.input is not None:
        layer.input.set_range(-3, 3)
    x = torch.randn(8, 6)
    layer(x).square().sum().backward()
    exact = nn.functional.linear(x, layer.weight.detach().requires_grad_(), layer.bias.detach())
    assert layer.weight.grad.abs().sum() > 0
    assert torch.isfinite(layer.weight.grad).all()
    assert float((layer(x) - exact).detach().abs().max()) < 0.5


def test_ranges_move_in_training_alone_and_only_while_observed():
    quantizer = FakeQuantize(100.0)
    quantizer.set_range(-1.0, 1.0)
    loud = torch.tensor([-9.0, 9.0])
    quantizer.train()(loud)
    assert float(quantizer.high) == 1.0
    set_observing(quantizer, True)
    quantizer.eval()(loud)
    assert float(quantizer.high) == 1.0
    quantizer.train()(loud)
    assert float(quantizer.high) == pytest.approx(1.08)
    assert float(quantizer.low) == pytest.approx(-1.08)


def test_the_table_of_choices_is_the_measured_one():
    measured = json.loads((ROOT / "benchmarks" / "quantize_choices.json").read_text())["choices"]
    page = (ROOT / "docs" / "quantisation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([+-][\d.]+) \| ([\d,]+) \|$", page, flags=re.MULTILINE)
    assert rows == [
        (name, f"{one['sqnr_db']:.1f}", f"{one['accuracy_drop']:+.2f}", f"{one['param_bytes']:,}")
        for name, one in measured.items()
    ]


def test_the_agreement_on_the_page_is_the_measured_one():
    found = json.loads((ROOT / "benchmarks" / "quantize_agreement.json").read_text())
    page = (ROOT / "docs" / "quantisation.md").read_text(encoding="utf-8")
    assert found["clips"] == 2000
    assert all(pair["met"] for pair in found["pairs"].values())
    for pair in found["pairs"].values():
        assert f"| {pair['same_class_percent']:.2f} | {pair['sqnr_db']:.1f} |" in page
    for bits, one in found["without_vnni"].items():
        figures = (one["sqnr_db_exact"], one["sqnr_db_without_vnni"], one["same_class_percent_without_vnni"])
        row = " | ".join((f"{one['pairs_that_could_saturate']:,}", *(f"{figure:.1f}" for figure in figures)))
        assert re.search(rf"^\| {bits}[^|]*\| {re.escape(row)} \|$", page, flags=re.MULTILINE), row
