"""Layers that hold integer weights and quantise what they read: the simulation in torch *is* what is exported.

Weights are symmetric, one scale an output channel, in 8 or 4 bits; inputs, where a layer quantises them, are asymmetric
uint8, one scale a tensor. Rounding is half-to-even and division by the scale, as ONNX QuantizeLinear defines it, so
that onnxruntime with its optimisations off computes what torch computes. The multiplication itself stays in float32.
The bias of a convolution is a whole number of steps of its sums: integer kernels make it one in any case, and do so
differently from what a file says that has it in full.
All of these are `torch.library` operators, so that export writes them as QuantizeLinear, DequantizeLinear and Round.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aum_compress.errors import ModelFileError
from aum_compress.models.storage import QUANTISED_INPUTS, WEIGHT_BITS, NamedStorages, Storage, as_storages

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
    return weight.to(scale.dtype) * by_output(scale, weight)


@dequantize_weight.register_fake
def _(weight: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(weight, dtype=scale.dtype)


@torch.library.custom_op("aum_compress::round_bias", mutates_args=())
def round_bias(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """`bias` (outputs,) in whole steps of the sums: `input_scale` () times `weight_scale` (outputs,); float32."""
    step = input_scale * weight_scale
    return torch.round(bias / step) * step


@round_bias.register_fake
def _(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    return torch.empty_like(bias)


def by_output(scale: Tensor, weight: Tensor) -> Tensor:
    """`scale` (outputs,) in a shape that multiplies `weight` (outputs, ...)."""
    return scale.view(-1, *[1] * (weight.dim() - 1))


def geometry(layer: Quantizable) -> tuple | None:
    """What `apply_layer` has to know of a convolution beside its weights; None for a Linear."""
    return None if isinstance(layer, nn.Linear) else (layer.stride, layer.padding, layer.dilation, layer.groups)


def apply_layer(x: Tensor, weight: Tensor, bias: Tensor | None, convolution: tuple | None) -> Tensor:
    """A Linear, Conv1d or Conv2d. Args: convolution: `geometry`."""
    if convolution is None:
        return F.linear(x, weight, bias)
    convolve = F.conv1d if weight.dim() == 3 else F.conv2d
    return convolve(x, weight, bias, *convolution)


class ActivationSlot(nn.Identity):
    """Stands where an activation may be quantised, and passes it on until it is."""


class QuantizedActivation(nn.Module):
    """Rounds what passes to uint8, one scale a tensor; shapes stay."""

    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("input_zero_point", torch.zeros((), dtype=torch.uint8))

    @property
    def storage(self) -> Storage:
        return "uint8"

    def forward(self, x: Tensor) -> Tensor:
        return quantize_dequantize(x, self.input_scale, self.input_zero_point)


class QuantizedLayer(nn.Module):
    """A Linear, Conv1d or Conv2d with integer weights. Shapes in and out are those of the layer that it stands for."""

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(self, layer: Quantizable, storage: Storage = "int8") -> None:
        """Takes over geometry and bias of `layer`; weights and scales are set by `compress.quantize` or loaded.

        Weights of 4 bits lie here one a byte, and two a byte in bundles (`stored_tensors`) and files.
        """
        super().__init__()
        self.storage = storage
        self.convolution = geometry(layer)
        self.register_buffer("weight", torch.zeros(layer.weight.shape, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(layer.weight.shape[0]))
        self.input_factor: nn.Parameter | None = None
        if storage in QUANTISED_INPUTS:
            self.register_buffer("input_scale", torch.ones(()))
            self.register_buffer("input_zero_point", torch.zeros((), dtype=torch.uint8))
        if storage == "int8-smooth":
            self.input_factor = nn.Parameter(torch.ones(layer.weight.shape[1]), requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_factor is not None:
            x = x * self.input_factor
        if self.storage in QUANTISED_INPUTS:
            x = quantize_dequantize(x, self.input_scale, self.input_zero_point)
        bias = self.bias
        if bias is not None and self.convolution is not None and self.storage in QUANTISED_INPUTS:
            bias = round_bias(bias, self.input_scale, self.weight_scale)
        return apply_layer(x, dequantize_weight(self.weight, self.weight_scale), bias, self.convolution)


def quantizable_layers(model: nn.Module) -> dict[str, Quantizable]:
    """Name -> layer of everything whose weights can be stored as integers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantizable)}


def activation_slots(model: nn.Module) -> dict[str, ActivationSlot]:
    """Name -> place of each activation that can be quantised."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ActivationSlot)}


def quantized_layers(model: nn.Module) -> dict[str, Storage]:
    """Name -> storage of all that is quantised, as the bundle's card records it."""
    kinds = QuantizedLayer | QuantizedActivation
    return {name: module.storage for name, module in model.named_modules() if isinstance(module, kinds)}


def swap_in_quantized(model: nn.Module, layers: NamedStorages) -> None:
    """Replaces the named layers and slots of `model` by quantised ones, in place."""
    for name, storage in as_storages(layers).items():
        replace_module(
            model,
            name,
            QuantizedActivation() if storage == "uint8" else QuantizedLayer(model.get_submodule(name), storage),
        )


def unfit_layers(model: nn.Module, layers: NamedStorages) -> list[str]:
    """Of the named modules of `model` those that cannot be stored so, in words."""
    problems = []
    for name, storage in as_storages(layers).items():
        module = model.get_submodule(name)
        if not isinstance(module, ActivationSlot if storage == "uint8" else Quantizable):
            problems.append(f"{name} is a {type(module).__name__}, which cannot be stored as {storage}")
    return problems


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def param_bytes_of(model: nn.Module, storages: Mapping[str, Storage]) -> int:
    """Bytes of a float `model`, its batch normalisation folded, once it is stored so: those of `stored_tensors`."""
    total = sum(2 * tensor.numel() for tensor in model.state_dict().values())
    for name, storage in storages.items():
        if storage in (*QUANTISED_INPUTS, "uint8"):
            total += 4 + 1  # scale and zero point
        if storage == "uint8":
            continue
        weight = model.get_submodule(name).weight
        total += -(-weight.numel() * WEIGHT_BITS[storage] // 8) - 2 * weight.numel() + 4 * len(weight)
        if storage == "int8-smooth":
            total += 2 * weight.shape[1]
    return total


def pack_int4(values: Tensor) -> Tensor:
    """int8 values from -8 to 7, of any shape -> uint8 (ceil(n/2),), two a byte, the first in the low half (as ONNX)."""
    flat = values.flatten().to(torch.int16) & 0xF
    flat = F.pad(flat, (0, len(flat) % 2))
    return (flat[0::2] | flat[1::2] << 4).to(torch.uint8)


def unpack_int4(packed: Tensor, shape: torch.Size) -> Tensor:
    """What `pack_int4` packed, int8."""
    halves = torch.stack([packed & 0xF, packed >> 4], dim=1).flatten()[: shape.numel()].to(torch.int8)
    return torch.where(halves > 7, halves - 16, halves).view(shape)


def _packed_weights(model: nn.Module) -> dict[str, torch.Size]:
    """Name -> shape of the weights that are stored two a byte."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    return {f"{n}.weight": layer.weight.shape for n, layer in layers.items() if WEIGHT_BITS[layer.storage] == 4}


def stored_tensors(model: nn.Module, *, half: bool, pack: bool = True) -> dict[str, Tensor]:
    """What a bundle stores of `model`: the state dict, contiguous, on the CPU.

    Args:
        half: store floating-point tensors as float16, all but quantisation scales.
        pack: two weights of 4 bits a byte; without it, one.
    """
    packed = _packed_weights(model) if pack else {}
    stored = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):  # inference never reads it
            continue
        if half and tensor.is_floating_point() and not name.endswith(("weight_scale", "input_scale")):
            tensor = tensor.half()
        tensor = tensor.detach().cpu().contiguous()
        stored[name] = pack_int4(tensor) if name in packed else tensor
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
    packed = _packed_weights(model)
    shapes = {name: tuple(t.shape) for name, t in wanted.items()}
    shapes |= {name: (-(-shape.numel() // 2),) for name, shape in packed.items()}
    problems = [f"{name}: absent" for name in wanted.keys() - stored.keys()]
    problems += [f"{name}: not part of this model" for name in stored.keys() - wanted.keys()]
    problems += [
        f"{name}: shape {tuple(stored[name].shape)}, wanted {shapes[name]}"
        for name in wanted.keys() & stored.keys()
        if tuple(stored[name].shape) != shapes[name]
    ]
    if not problems:
        state = {
            name: unpack_int4(tensor, packed[name]) if name in packed else tensor.to(wanted[name].dtype)
            for name, tensor in stored.items()
        }
        model.load_state_dict(state, strict=False)
    return sorted(problems)
