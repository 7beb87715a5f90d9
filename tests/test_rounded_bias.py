"""The bias of an int8 convolution: in whole steps of its sums, as integer kernels have it, whatever they optimise."""

import numpy as np
import pytest
import torch
from exported import CONFIG, metadata, model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aum_compress.compress.quantize import quantize, signal_to_noise_db
from aum_compress.export.onnx_writer import export_onnx, fold_if_needed
from aum_compress.export.runtime import open_session, run_session
from aum_compress.models.fake_quantized import MOST_BIAS_STEPS, FakeQuantizedLayer
from aum_compress.models.quantized import QuantizedLayer, round_bias


@settings(max_examples=40, deadline=None)
@given(bias=st.floats(-100, 100), input_scale=st.floats(1e-3, 1), scale=st.floats(1e-4, 1))
def test_a_bias_is_the_nearest_whole_number_of_steps(bias, input_scale, scale):
    values = torch.tensor([bias, 0.0])
    found = round_bias(values, torch.tensor(input_scale), torch.tensor([scale, scale]))
    step = np.float32(input_scale) * np.float32(scale)
    assert found[1] == 0
    assert float((found[0] - values[0]).abs()) <= 0.5 * step + 1e-5
    steps = found[0].double() / step
    assert float((steps - steps.round()).abs()) < 1e-6 * max(1.0, float(steps.abs()))


def convolutions(network: nn.Module) -> dict[str, QuantizedLayer]:
    layers = {name: module for name, module in network.named_modules() if isinstance(module, QuantizedLayer)}
    return {name: layer for name, layer in layers.items() if layer.convolution is not None}


@pytest.mark.parametrize("shrink", [1.0, 1e-6, 1e-10, 0.0])
def test_a_file_optimised_or_not_computes_what_torch_does_even_where_a_channel_has_died(shrink, tmp_path):
    """Nothing but its bias is left of a dead channel; integer kernels would lose that in steps of tiny weights."""
    plain = fold_if_needed(model("fp32"))
    first = next(module for module in plain.modules() if isinstance(module, nn.Conv2d))
    with torch.no_grad():
        first.weight[0] *= shrink
        first.bias[0] = 2.0
    heard = torch.randn(16, 1, CONFIG.n_mels, CONFIG.n_frames, generator=torch.Generator().manual_seed(1))
    integers = quantize(plain, [heard])
    for layer in convolutions(integers).values():
        steps = layer.bias / (layer.input_scale * layer.weight_scale)
        assert float(steps.abs().max()) <= MOST_BIAS_STEPS * 1.01
    path = tmp_path / "model-int8.onnx"
    export_onnx(integers, path, metadata("int8"))
    with torch.inference_mode():
        wanted = integers(heard).numpy()
    for optimise in (False, True):
        session = open_session(path, optimise=optimise, intra_op_num_threads=1)
        found = np.concatenate([run_session(session, clip[None]) for clip in heard.numpy()])
        assert signal_to_noise_db(wanted, found) > 40, f"optimised: {optimise}"


def test_training_sees_the_rounded_bias_and_moves_the_whole_one():
    torch.manual_seed(0)
    layer = FakeQuantizedLayer(nn.Conv2d(2, 3, 1), "int8", 7, 100)
    layer.input.set_range(-4.0, 4.0)
    with torch.no_grad():
        layer.weight.mul_(10)
    silent = torch.zeros(1, 2, 1, 1)
    found = layer(silent)
    found.sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.ones(3))
    wanted = round_bias(layer.bias.detach(), layer.input.scale(), layer.integers()[1])
    torch.testing.assert_close(found.detach().flatten(), wanted)
    assert not torch.equal(wanted, layer.bias.detach())


def test_weight_only_layers_and_matrices_keep_their_bias():
    layer = QuantizedLayer(nn.Conv2d(2, 3, 1), "int8-weight")
    layer.weight.fill_(1)
    torch.testing.assert_close(layer(torch.zeros(1, 2, 1, 1)).flatten(), layer.bias, rtol=0, atol=0)
    linear = QuantizedLayer(nn.Linear(2, 3), "int8")
    torch.testing.assert_close(linear(torch.zeros(1, 2)).flatten(), linear.bias, rtol=0, atol=0)
