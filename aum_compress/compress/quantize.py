"""Post-training quantisation: int8 weights an output channel, uint8 inputs with ranges calibrated on training clips.

What is not a matrix or a convolution (A, D, biases, norms: 3 % of a large Mamba but over 10 % of a tiny one) is rounded
to float16; step sizes, the scan and its state stay in float32.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from aum_compress.errors import AumError
from aum_compress.models.factory import Model, fold_batch_norm
from aum_compress.models.quantized import (
    ZERO_POINT_MAX,
    QuantizedLayer,
    quantizable_layers,
    round_to_half_,
    swap_in_quantized,
)

SAMPLES_A_BATCH = 50_000
"""Values of a layer's input that one batch adds to the estimate of its range."""


def quantize(
    model: Model,
    calibration: Iterable[Tensor],
    *,
    percentile: float = 99.99,
    weight_bits: int = 7,
    keep_float: tuple[str, ...] = (),
) -> Model:
    """A copy with batch normalisation folded, int8 layers in place of matrices and convolutions, the rest in float16.

    Args:
        calibration: batches (B,1,F,T) of normalised features of *training* clips.
        percentile: of each layer's input values that its range covers, either way.
        weight_bits: 7 keeps products within 16 bits on x86 CPUs without VNNI; 8 uses the full range.
        keep_float: names or beginnings of names of layers that stay float16.

    Raises:
        AumError: a name in `keep_float` fits no layer; no calibration batch; a layer whose input was not finite.
    """
    folded = fold_batch_norm(model)
    layers = quantizable_layers(folded)
    if unknown := [name for name in keep_float if not any(layer.startswith(name) for layer in layers)]:
        raise AumError(f"quantize.keep_float: {', '.join(unknown)}: no such layer; the model has {', '.join(layers)}")
    names = [name for name in layers if not name.startswith(tuple(keep_float))] if keep_float else list(layers)
    ranges = _input_ranges(folded, {name: layers[name] for name in names}, calibration, percentile)
    swap_in_quantized(folded, names)
    top = 2 ** (weight_bits - 1) - 1
    for name in names:
        quantized = folded.get_submodule(name)
        _set_weight(quantized, layers[name].weight.detach(), top)
        _set_input_range(quantized, *ranges[name])
    round_to_half_(folded)
    return folded.eval()


def quantized_layer_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the int8 layers, as the bundle's card records them."""
    return tuple(name for name, module in model.named_modules() if isinstance(module, QuantizedLayer))


def signal_to_noise_db(reference: np.ndarray, approximation: np.ndarray) -> float:
    """SQNR: 20 log10(|reference| / |reference - approximation|); infinite where they are equal."""
    noise = float(np.linalg.norm(reference.astype(np.float64) - approximation))
    return float("inf") if noise == 0 else 20 * float(np.log10(np.linalg.norm(reference) / noise))


def _input_ranges(
    model: Model, layers: dict[str, nn.Module], calibration: Iterable[Tensor], percentile: float
) -> dict[str, tuple[float, float]]:
    """Lowest and highest value of each layer's input, `percentile` wide either way: extremes over batches of each
    batch's percentiles, on an even sample of its values."""
    ranges: dict[str, tuple[float, float]] = {}

    def observe(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            values = inputs[0].detach().flatten()
            values = values[:: max(1, len(values) // SAMPLES_A_BATCH)].numpy()
            low, high = np.percentile(values, [100 - percentile, percentile])
            seen = ranges.get(name, (0.0, 0.0))  # zero stays representable: padding must be exact
            ranges[name] = (float(np.minimum(seen[0], low)), float(np.maximum(seen[1], high)))  # NaN stays NaN

        return hook

    handles = [layer.register_forward_pre_hook(observe(name)) for name, layer in layers.items()]
    try:
        with torch.inference_mode():
            for batch in calibration:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    if missing := layers.keys() - ranges.keys():
        raise AumError(f"quantize: no calibration clip reached {', '.join(sorted(missing))}; are there training clips?")
    if bad := [name for name, pair in ranges.items() if not np.isfinite(pair).all()]:
        raise AumError(f"quantize: the input of {', '.join(bad)} is not finite on the calibration clips")
    return ranges


def _set_weight(layer: QuantizedLayer, weight: Tensor, top: int) -> None:
    """Symmetric, one scale an output channel, integers in [-top, top]."""
    largest = weight.abs().flatten(1).amax(1).clamp_min(torch.finfo(torch.float32).tiny * top)
    scale = largest / top
    layer.weight_scale.copy_(scale)
    layer.weight.copy_(torch.round(weight / scale.view(-1, *[1] * (weight.dim() - 1))).clamp(-top, top).to(torch.int8))


def _set_input_range(layer: QuantizedLayer, low: float, high: float) -> None:
    """Asymmetric uint8 over [low, high], which contains 0."""
    scale = max((high - low) / ZERO_POINT_MAX, 1e-12)
    layer.input_scale.fill_(scale)
    layer.input_zero_point.fill_(int(np.clip(round(-low / scale), 0, ZERO_POINT_MAX)))
