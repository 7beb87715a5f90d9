"""What each quantised layer loses: its weights, and what it puts out, against the float model that it was made of."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aum_compress.models.quantized import QuantizedLayer, dequantize_weight


def layer_signal(full: nn.Module, quantized: nn.Module, inputs: Tensor) -> list[dict[str, Any]]:
    """name, weight_sqnr_db and output_sqnr_db of each quantised layer, in the model's order; None: nothing was lost.

    Args:
        full: the float model with the same layers, batch normalisation folded as in `quantized`.
        inputs: (B,1,F,T) normalised features.
    """
    names = [name for name, module in quantized.named_modules() if isinstance(module, QuantizedLayer)]
    with _outputs(full, names) as wanted, torch.inference_mode():
        full.eval()(inputs)
    with _outputs(quantized, names) as found, torch.inference_mode():
        quantized.eval()(inputs)
    return [
        {
            "name": name,
            "weight_sqnr_db": _weight_sqnr_db(full.get_submodule(name), quantized.get_submodule(name)),
            "output_sqnr_db": _sqnr_db(wanted[name], found[name]),
        }
        for name in names
    ]


@contextmanager
def _outputs(model: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Layer -> its latest output, while a run goes on."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
        for name in names
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _weight_sqnr_db(layer: nn.Module, quantized: QuantizedLayer) -> float | None:
    stored = dequantize_weight(quantized.weight, quantized.weight_scale)
    if quantized.input_factor is not None:  # its inputs are multiplied by it
        stored = stored * quantized.input_factor.detach().view(1, -1, *[1] * (stored.dim() - 2))
    return _sqnr_db(layer.weight.detach(), stored)


def _sqnr_db(wanted: Tensor, found: Tensor) -> float | None:
    error = float((wanted - found).double().square().sum())
    power = float(wanted.double().square().sum())
    return 10 * math.log10(power / error) if error and power else None
