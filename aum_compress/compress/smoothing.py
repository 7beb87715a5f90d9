"""SmoothQuant (Xiao et al. 2023) at out_proj, where Mamba's largest outliers are: channels that stand out are divided
before they are quantised, and the layer's weights take the factor over. Float32 logits do not change.

What feeds out_proj is gated (y * silu(z)), so there is no weight before it that could take the division: it is a
multiplication by a stored factor, 2 bytes a channel. Behind a norm (Mamba-2) the norm's weight takes it for nothing.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from aum_compress.models.factory import Model
from aum_compress.models.storage import QUANTISED_INPUTS, Storage

LARGEST_FACTOR = 1e3


@torch.no_grad()
def smooth(model: Model, batches: list[Tensor], storages: Mapping[str, Storage], strength: float) -> dict[str, Tensor]:
    """Rescales the weights of every out_proj with integer inputs, in place; with `strength` 0 of none.

    The factor of channel d is 1 / s_d, with s_d = max|x_d|^strength / max|W_d|^(1 - strength).

    Args:
        model: float, in evaluation mode.
        batches: (B,1,F,T) that show how large each channel gets.

    Returns:
        Name of each layer stored as `int8-smooth` -> factor (D,) by which its input is to be multiplied, float16
        values in float32.
    """
    names = [name for name in storages if name.endswith(".out_proj") and storages[name] in QUANTISED_INPUTS]
    layers = {name: model.get_submodule(name) for name in names} if strength else {}
    largest = _largest_inputs(model, layers, batches)
    factors = {}
    for name, layer in layers.items():
        inputs, weights = largest[name], layer.weight.abs().amax(0)
        spread = inputs.pow(strength) / weights.clamp_min(1e-12).pow(1 - strength)
        alive = (inputs > 0) & (weights > 0)
        # only the spread between channels matters; around 1, factors are at home in float16
        usual = spread[alive].log().mean().exp() if alive.any() else spread.new_ones(())
        relative = torch.where(alive, spread / usual, torch.ones_like(spread))
        factor = (1 / relative.clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR)).half().float()
        layer.weight /= factor
        if storages[name] == "int8-smooth":
            factors[name] = factor
        else:
            model.get_submodule(name.rpartition(".")[0]).norm.weight *= factor
    return factors


def _largest_inputs(model: Model, layers: Mapping[str, nn.Module], batches: list[Tensor]) -> dict[str, Tensor]:
    """Name -> (D,) largest magnitude of each input channel."""
    largest: dict[str, Tensor] = {}

    def observe(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found = inputs[0].abs().flatten(0, -2).amax(0)
            largest[name] = torch.maximum(largest[name], found) if name in largest else found

        return hook

    handles = [layer.register_forward_pre_hook(observe(name)) for name, layer in layers.items()]
    try:
        for batch in batches if layers else ():
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return largest
