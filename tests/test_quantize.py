import numpy as np
import pytest
import torch
from tiny import aum_config, cp_config, features, student_config, trained_like

from aum_compress.compress.quantize import quantize, quantized_layer_names, signal_to_noise_db
from aum_compress.errors import AumError
from aum_compress.models.factory import build_model, fold_batch_norm
from aum_compress.models.quantized import (
    dequantize_weight,
    load_stored,
    quantize_dequantize,
    stored_tensors,
    swap_in_quantized,
)


def calibration():
    return [features(8, seed=seed) for seed in (7, 8)]


@pytest.mark.parametrize("config", [student_config(), aum_config(), cp_config()])
@pytest.mark.parametrize("weight_bits", [7, 8])
def test_int8_stays_near_float(config, weight_bits):
    model = trained_like(config)
    quantized = quantize(model, calibration(), weight_bits=weight_bits)
    with torch.inference_mode():
        noise = signal_to_noise_db(model(features()).numpy(), quantized(features()).numpy())
    assert noise > 20, f"SQNR {noise:.1f} dB is too low"
    top = 2 ** (weight_bits - 1) - 1
    for name in quantized_layer_names(quantized):
        layer = quantized.get_submodule(name)
        assert layer.weight.dtype == torch.int8
        assert int(layer.weight.abs().max()) == top  # the scale uses the whole range


def test_weights_are_within_half_a_step():
    model = trained_like(student_config())
    folded = fold_batch_norm(model)
    quantized = quantize(model, calibration(), weight_bits=8)
    for name in quantized_layer_names(quantized):
        layer = quantized.get_submodule(name)
        error = (dequantize_weight(layer.weight, layer.weight_scale) - folded.get_submodule(name).weight).abs()
        steps = error.flatten(1).amax(1) / layer.weight_scale
        assert float(steps.detach().max()) <= 0.5 + 1e-4


def test_everything_else_is_float16():
    quantized = quantize(trained_like(student_config()), calibration())
    stored = stored_tensors(quantized, half=True)
    floats = {n: t for n, t in stored.items() if t.dtype not in (torch.int8, torch.uint8)}
    assert all(t.dtype == torch.float32 for n, t in floats.items() if n.endswith("_scale"))
    assert all(t.dtype == torch.float16 for n, t in floats.items() if not n.endswith("_scale"))
    state = quantized.state_dict()
    assert all(torch.equal(t.float(), state[n]) for n, t in floats.items()), "storing at half width loses nothing"


def test_stored_tensors_rebuild_the_same_model():
    quantized = quantize(trained_like(student_config()), calibration())
    rebuilt = build_model(quantized.config)
    swap_in_quantized(rebuilt, quantized_layer_names(quantized))
    assert load_stored(rebuilt, stored_tensors(quantized, half=True)) == []
    assert torch.equal(rebuilt.eval()(features()), quantized(features()))


def test_load_stored_names_what_does_not_fit():
    quantized = quantize(trained_like(student_config()), calibration())
    stored = stored_tensors(quantized, half=True)
    del stored["norm_f.weight"]
    stored["extra"] = torch.zeros(1)
    stored["head.bias"] = torch.zeros(7)
    problems = load_stored(quantized, stored)
    assert problems == [
        "extra: not part of this model",
        "head.bias: shape (7,), wanted (3,)",
        "norm_f.weight: absent",
    ]


def test_keep_float_leaves_layers_alone():
    quantized = quantize(trained_like(student_config()), calibration(), keep_float=("layers.0.", "head"))
    names = quantized_layer_names(quantized)
    assert names
    assert not any(name.startswith(("layers.0.", "head")) for name in names)
    assert any(name.startswith("layers.1.") for name in names)


def test_unknown_layer_in_keep_float_is_refused():
    with pytest.raises(AumError, match="blocks.0: no such layer; the model has patch_embed"):
        quantize(trained_like(student_config()), calibration(), keep_float=("blocks.0",))


def test_no_calibration_clip_is_refused():
    with pytest.raises(AumError, match="no calibration clip reached"):
        quantize(trained_like(student_config()), [])


def test_input_that_is_not_finite_is_refused():
    with pytest.raises(AumError, match="is not finite on the calibration clips"):
        quantize(trained_like(student_config()), [torch.full((1, 1, 32, 17), float("nan"))])


def test_quantize_dequantize_follows_onnx():
    """Round half to even, saturate, exact zero."""
    scale, zero_point = torch.tensor(0.5), torch.tensor(10, dtype=torch.uint8)
    x = torch.tensor([0.0, 0.25, 0.75, -5.0, -100.0, 1000.0])
    wanted = torch.tensor([0.0, 0.0, 1.0, -5.0, -5.0, 122.5])
    torch.testing.assert_close(quantize_dequantize(x, scale, zero_point), wanted)


def test_signal_to_noise():
    reference = np.array([3.0, 4.0])
    assert signal_to_noise_db(reference, reference) == float("inf")
    assert signal_to_noise_db(reference, reference + np.array([0.5, 0.0])) == pytest.approx(20.0)
