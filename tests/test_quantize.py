"""Which tensor is stored how, what is refused, and that the simulation is what is stored."""

import math

import numpy as np
import pytest
import torch
from tiny import aum_config, cp_config, features, student_config, trained_like

from aum_compress.compress.quantize import in_float, layer_storages, prepare, quantize, signal_to_noise_db
from aum_compress.errors import AumError, RecipeError
from aum_compress.models.config import Mamba2BlockConfig
from aum_compress.models.factory import build_model, fold_batch_norm
from aum_compress.models.fake_quantized import converted, round_rest_to_half_
from aum_compress.models.quantized import (
    QuantizedLayer,
    dequantize_weight,
    load_stored,
    quantizable_layers,
    quantized_layers,
    stored_tensors,
    swap_in_quantized,
)
from aum_compress.recipe import validate_recipe
from aum_compress.recipe_schema import QuantizeSection

PLAIN = {"scan_inputs": (), "smoothing": 0.0}


def calibration():
    return [features(8, seed=seed) for seed in (7, 8)]


def quantised(config=None, **choices):
    return quantize(trained_like(config or student_config()), calibration(), QuantizeSection(**choices))


def integer_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def mamba2_config():
    block = Mamba2BlockConfig(d_inner=24, head_dim=8, d_state=4)
    return student_config().model_copy(update={"blocks": (block, block)})


@pytest.mark.parametrize("config", [student_config(), student_config(block_type="v1"), aum_config(), cp_config()])
@pytest.mark.parametrize("weight_bits", [7, 8])
def test_int8_stays_near_float(config, weight_bits):
    model = trained_like(config)
    quantized = quantize(model, calibration(), QuantizeSection(weight_bits=weight_bits))
    with torch.inference_mode():
        noise = signal_to_noise_db(model(features()).numpy(), quantized(features()).numpy())
    assert noise > 20, f"SQNR {noise:.1f} dB is too low"
    top = 2 ** (weight_bits - 1) - 1
    for layer in integer_layers(quantized).values():
        assert layer.weight.dtype == torch.int8
        assert int(layer.weight.abs().max()) == top  # the scale uses the whole range


@pytest.mark.parametrize(("weights", "least_db"), [("int8-weight", 35), ("int4-weight", 12)])
def test_weights_alone(weights, least_db):
    model, quantized = trained_like(student_config()), quantised(weights=weights)
    with torch.inference_mode():
        assert signal_to_noise_db(model(features()).numpy(), quantized(features()).numpy()) > least_db
    top = 127 if weights == "int8-weight" else 7
    assert all(int(layer.weight.abs().max()) == top for layer in integer_layers(quantized).values())
    assert not any(name.endswith(("input_scale", "input_factor")) for name in quantized.state_dict())


def test_weights_are_within_half_a_step():
    folded = fold_batch_norm(trained_like(student_config()))
    for name, layer in integer_layers(quantised(weight_bits=8, **PLAIN)).items():
        error = (dequantize_weight(layer.weight, layer.weight_scale) - folded.get_submodule(name).weight).abs()
        steps = error.flatten(1).amax(1) / layer.weight_scale
        assert float(steps.detach().max()) <= 0.5 + 1e-4


def test_everything_else_is_float16():
    quantized = quantised()
    stored = stored_tensors(quantized, half=True)
    floats = {n: t for n, t in stored.items() if t.dtype not in (torch.int8, torch.uint8)}
    assert all(t.dtype == torch.float32 for n, t in floats.items() if n.endswith("_scale"))
    assert all(t.dtype == torch.float16 for n, t in floats.items() if not n.endswith("_scale"))
    assert {"layers.0.mixer.A_log", "layers.0.mixer.D", "layers.0.mixer.dt_proj.bias", "norm_f.weight"} < floats.keys()
    state = quantized.state_dict()
    assert all(torch.equal(t.float(), state[n]) for n, t in floats.items()), "storing at half width loses nothing"


@pytest.mark.parametrize(
    "choices",
    [{}, PLAIN, {"weights": "int4-weight"}, {"layers": {"layers.0": "int4-weight", "head": "fp16"}}],
)
def test_stored_tensors_rebuild_the_same_model(choices):
    quantized = quantised(**choices)
    stored = stored_tensors(quantized, half=True)
    rebuilt = build_model(quantized.config)
    swap_in_quantized(rebuilt, quantized_layers(quantized))
    assert load_stored(rebuilt, stored) == []
    state = quantized.state_dict()
    scales = [name for name in state if name.endswith(("scale", "zero_point"))]
    assert scales
    assert all(torch.equal(rebuilt.state_dict()[name], state[name]) for name in scales)
    assert torch.equal(rebuilt.eval()(features()), quantized(features()))


def test_weights_of_four_bits_are_stored_two_a_byte():
    quantized = quantised(weights="int4-weight")
    stored = stored_tensors(quantized, half=True)
    for name, layer in integer_layers(quantized).items():
        assert stored[f"{name}.weight"].nbytes == -(-layer.weight.numel() // 2)


def test_load_stored_names_what_does_not_fit():
    quantized = quantised()
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
    names = quantized_layers(quantised(keep_float=("layers.0.", "head")))
    assert names
    assert not any(name.startswith(("layers.0.", "head")) for name in names)
    assert any(name.startswith("layers.1.") for name in names)


def test_the_longest_beginning_decides():
    model = fold_batch_norm(build_model(student_config()))
    section = QuantizeSection(
        layers={"layers": "int4-weight", "layers.1.mixer.in_proj": "int8-weight", "layers.1": "fp16"}
    )
    found = layer_storages(model, section)
    assert {name: storage for name, storage in found.items() if name.startswith("layers.1")} == {
        "layers.1.mixer.in_proj": "int8-weight"
    }
    assert found["layers.0.mixer.in_proj"] == "int4-weight"
    assert found["head"] == "int8"


@pytest.mark.parametrize("choices", [{"keep_float": ("blocks.0",)}, {"layers": {"blocks.0": "fp16"}}])
def test_unknown_layer_is_refused(choices):
    (key,) = choices
    with pytest.raises(AumError, match=rf"quantize.{key}: blocks.0: no such layer; the model has patch_embed"):
        quantised(**choices)


@pytest.mark.parametrize("weights", ["int8", "int8-weight", "int4-weight"])
def test_layers_whose_scales_take_what_they_save_stay_float16(weights):
    """A scale takes 4 bytes an output: nothing is saved with 4 weights an output, nor with 2 of 4 bits."""
    model = fold_batch_norm(trained_like(student_config()))  # 4 taps, and dt_rank 2
    found = layer_storages(model, QuantizeSection(weights=weights))
    small = {name: math.prod(layer.weight.shape[1:]) for name, layer in quantizable_layers(model).items()}
    least = {"int8": 4, "int8-weight": 4, "int4-weight": 2}[weights]
    assert {name for name in small if name not in found} == {name for name, values in small.items() if values <= least}
    named = layer_storages(model, QuantizeSection(weights=weights, layers={"layers.0.mixer.conv1d": weights}))
    assert named["layers.0.mixer.conv1d"] == weights, "who names a layer knows why"


def test_scan_inputs_have_scales_of_their_own():
    quantized = quantised()
    mixer = quantized.layers[0].mixer
    for suffix in ("", "_b"):
        slots = {name: getattr(mixer, f"scan_{name}{suffix}") for name in ("u", "B", "C", "delta")}
        scales = [float(slots[name].input_scale) for name in ("u", "B", "C")]
        assert len(set(scales)) == 3
        assert not hasattr(slots["delta"], "input_scale")
        projection = getattr(mixer, f"x_proj{suffix}")
        assert float(projection.input_scale) == scales[0], "u is rounded once for both that read it"
        assert int(projection.input_zero_point) == int(slots["u"].input_zero_point)
    before_softplus = quantised(scan_inputs=("delta",))  # asked for, it is rounded, however small dt_proj is
    assert set(quantized_layers(before_softplus).values()) == {"int8", "int8-smooth", "uint8"}


def test_inputs_of_a_scan_whose_projection_reads_floats_stay_floats():
    found = quantized_layers(quantised(layers={"layers.0": "int8-weight", "layers.1.mixer.x_proj": "fp16"}))
    assert "uint8" not in found.values()


@pytest.mark.parametrize("config", [student_config(), mamba2_config()])
def test_smoothing_changes_nothing_in_float_and_helps_where_channels_stand_out(config):
    model = fold_batch_norm(trained_like(config))
    with torch.no_grad():  # one channel of out_proj's input much larger than all others
        for block in model.layers:
            if config.blocks[0].mixer == "mamba":
                for suffix in ("", "_b"):
                    getattr(block.mixer, f"D{suffix}")[3] = 60.0
            else:
                block.mixer.norm.weight[3] = 60.0
            block.mixer.out_proj.weight[:, 3] /= 60.0
    heard = features()
    noise = {}
    with torch.inference_mode():
        wanted = model(heard)
        for strength in (0.0, 0.5):
            prepared = prepare(model, calibration(), QuantizeSection(smoothing=strength))
            with in_float(prepared):
                torch.testing.assert_close(prepared(heard), wanted, rtol=1e-4, atol=1e-5)
            noise[strength] = signal_to_noise_db(wanted.numpy(), prepared(heard).numpy())
    assert noise[0.5] > noise[0.0] + 1, noise
    factors = [name for name in converted(prepared).state_dict() if name.endswith("input_factor")]
    assert bool(factors) == (config.blocks[0].mixer == "mamba"), "a norm takes the factor for nothing"


@pytest.mark.parametrize("choices", [{}, {"weights": "int4-weight"}, {"scan_inputs": ("u", "B", "C", "delta")}])
def test_the_simulation_is_the_model_that_is_stored(choices):
    prepared = prepare(trained_like(student_config()), calibration(), QuantizeSection(**choices))
    stored = converted(prepared)
    round_rest_to_half_(prepared)
    with torch.inference_mode():
        assert torch.equal(prepared(features()), stored(features()))


def test_no_calibration_clip_is_refused():
    with pytest.raises(AumError, match="no calibration clip"):
        quantize(trained_like(student_config()), [])


def test_silent_calibration_clips_are_refused():
    silence = torch.full((3, 1, 32, 17), -1.7)
    with pytest.raises(AumError, match="all 6 calibration clips are silent"):
        quantize(trained_like(student_config()), [silence, silence])
    quantize(trained_like(student_config()), [silence, features(1)])  # one with sound sets ranges


def test_input_that_is_not_finite_is_refused():
    with pytest.raises(AumError, match="is not finite on the calibration clips"):
        quantize(trained_like(student_config()), [torch.full((1, 1, 32, 17), float("nan"))])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["layers.0.mixer.in_proj.weight", "layers.1.mixer.A_log"])
def test_weights_that_are_not_finite_are_refused(name, value):
    model = trained_like(student_config())
    model.get_parameter(name).data.view(-1)[1] = value
    with pytest.raises(AumError, match=f"values that are not finite in {name}"):
        quantize(model, calibration())


def test_a_value_beyond_float16_is_refused():
    model = trained_like(student_config())
    model.layers[0].mixer.D.data[0] = 1e6
    with pytest.raises(AumError, match="layers.0.mixer.D: holds values up to 1e"):
        quantize(model, calibration())


@pytest.mark.parametrize(("loud", "silent"), [(1.0, True), (1e2, False), (1e4, True)])
def test_dead_and_outlying_channels_keep_a_model_finite(loud, silent):
    model = trained_like(student_config())
    with torch.no_grad():
        model.layers[0].mixer.out_proj.weight[0] *= loud
        model.layers[0].mixer.in_proj.weight[3] = 0.0 if silent else loud
    quantized = quantize(model, calibration())
    assert torch.isfinite(quantized(features())).all()


def test_signal_to_noise():
    reference = np.array([3.0, 4.0])
    assert signal_to_noise_db(reference, reference) == float("inf")
    assert signal_to_noise_db(reference, reference + np.array([0.5, 0.0])) == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("quantize_section", "precisions", "problem"),
    [
        ({"weights": "int4-weight"}, ["int8"], "int8, but quantize makes int4"),
        ({"layers": {"head": "int4-weight"}}, ["int4"], "int4, but quantize makes mixed"),
        ({"layers": {"head": "int2"}}, ["int8"], "quantize.layers.head"),
        ({"smoothing": 1.5}, ["int8"], "quantize.smoothing"),
        ({"scan_inputs": ["A"]}, ["int8"], "quantize.scan_inputs"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(tmp_path, quantize_section, precisions, problem):
    raw = {
        "data": {"kind": "folders", "root": str(tmp_path)},
        "student": {"preset": "student", "train": {"epochs": 1}},
        "quantize": quantize_section,
        "export": {"precisions": precisions},
    }
    with pytest.raises(RecipeError, match=problem):
        validate_recipe(raw, "test")
