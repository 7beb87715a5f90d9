"""Layers that hold int8 weights and quantise what they read: the simulation in torch *is* the model that is exported.

Weights are symmetric int8, one scale an output channel; inputs are asymmetric uint8, one scale a tensor. Rounding is
half-to-even and division by the scale, as ONNX QuantizeLinear defines it, so that onnxruntime with its optimisations
off computes what torch computes. The multiplication itself stays in float32. Both operations are `torch.library`
operators, so that export writes them as QuantizeLinear / DequantizeLinear.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aum_compress.errors import ModelFileError

Quantizable = nn.Linear | nn.Conv1d | nn.Conv2d
ZERO_POINT_MAX = 255


@torch.library.custom_op("aum_compress::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """x rounded to the uint8 grid of (`scale` (), `zero_point` () uint8); any shape, float32."""
    offset = zero_point.to(x.dtype)
    return (torch.clamp(torch.round(x / scale) + offset, 0, ZERO_POINT_MAX) - offset) * scale


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("aum_compress::dequantize_weight", mutates_args=())
def dequantize_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """int8 `weight` (outputs, ...) times `scale` (outputs,): float32."""
    return weight.to(scale.dtype) * scale.view(-1, *[1] * (weight.dim() - 1))


@dequantize_weight.register_fake
def _(weight: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(weight, dtype=scale.dtype)


class QuantizedLayer(nn.Module):
    """A Linear, Conv1d or Conv2d with int8 weights. Shapes in and out are those of the layer that it stands for."""

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(self, layer: Quantizable) -> None:
        """Takes over geometry and bias of `layer`; weights and scales are set by `compress.quantize` or loaded."""
        super().__init__()
        self.convolution: tuple | None = None
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            self.convolution = (layer.stride, layer.padding, layer.dilation, layer.groups)
        self.register_buffer("weight", torch.zeros(layer.weight.shape, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(layer.weight.shape[0]))
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("input_zero_point", torch.zeros((), dtype=torch.uint8))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = quantize_dequantize(x, self.input_scale, self.input_zero_point)
        weight = dequantize_weight(self.weight, self.weight_scale)
        if self.convolution is None:
            return F.linear(x, weight, self.bias)
        convolve = F.conv1d if weight.dim() == 3 else F.conv2d
        return convolve(x, weight, self.bias, *self.convolution)


def quantizable_layers(model: nn.Module) -> dict[str, Quantizable]:
    """Name -> layer of everything that can be stored in int8."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantizable)}


def swap_in_quantized(model: nn.Module, names: Iterable[str]) -> None:
    """Replaces the named layers of `model` by `QuantizedLayer`s, in place."""
    for name in names:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, QuantizedLayer(owner.get_submodule(child)))


def stored_tensors(model: nn.Module, *, half: bool) -> dict[str, Tensor]:
    """What a bundle stores of `model`: the state dict, contiguous, on the CPU.

    Args:
        half: store floating-point tensors as float16, all but quantisation scales.
    """
    stored = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):  # inference never reads it
            continue
        if half and tensor.is_floating_point() and not name.endswith(("weight_scale", "input_scale")):
            tensor = tensor.half()
        stored[name] = tensor.detach().cpu().contiguous()
    return stored


def round_to_half_(model: nn.Module) -> None:
    """Rounds every floating-point tensor but quantisation scales to what float16 can hold, in place.

    Raises:
        ModelFileError: a value beyond float16's 65,504, with the tensor named.
    """
    state = model.state_dict()
    for name, tensor in stored_tensors(model, half=True).items():
        if tensor.dtype != torch.float16:
            continue
        if not torch.isfinite(tensor).all():
            largest = state[name].abs().max()
            raise ModelFileError(f"{name}: holds values up to {largest:.3g}, float16 ends at 65504: use fp32")
        state[name].copy_(tensor)


def load_stored(model: nn.Module, stored: Mapping[str, Tensor]) -> list[str]:
    """Loads `stored_tensors` into `model`, widening float16 to float32; returns what does not fit, in words."""
    wanted = {name: t for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    problems = [f"{name}: absent" for name in wanted.keys() - stored.keys()]
    problems += [f"{name}: not part of this model" for name in stored.keys() - wanted.keys()]
    problems += [
        f"{name}: shape {tuple(stored[name].shape)}, wanted {tuple(wanted[name].shape)}"
        for name in wanted.keys() & stored.keys()
        if stored[name].shape != wanted[name].shape
    ]
    if not problems:
        model.load_state_dict({name: tensor.to(wanted[name].dtype) for name, tensor in stored.items()}, strict=False)
    return sorted(problems)
