"""torch's own int8 layers (torch.ao.nn.quantized), whose weights are packed: neither parameters nor traceable.

For bytes they are unpacked; for MACs each is counted as the float layer that it stands for, whose products are the
same.
"""

from collections.abc import Mapping

import torch
import torch.ao.nn.intrinsic.quantized as fused
import torch.ao.nn.intrinsic.quantized.dynamic as fused_dynamic
import torch.ao.nn.quantized as quantized
import torch.ao.nn.quantized.dynamic as dynamic
import torch.nn.functional as F
from torch import Tensor, nn

from aum_compress.errors import AumError

LINEAR = quantized.Linear  # dynamic and fused ones are subclasses
CONVOLUTIONS: dict[type[nn.Module], type[nn.Module]] = {
    quantized.Conv1d: nn.Conv1d,
    quantized.Conv2d: nn.Conv2d,
    quantized.Conv3d: nn.Conv3d,
}
WITH_RELU = (fused.LinearReLU, fused.ConvReLU1d, fused.ConvReLU2d, fused.ConvReLU3d, fused_dynamic.LinearReLU)
AT_THE_EDGES = (quantized.Quantize, quantized.DeQuantize)


def is_packed(module: nn.Module) -> bool:
    """Whether this layer keeps its weight packed, and can be unpacked."""
    return isinstance(module, (LINEAR, *CONVOLUTIONS)) and not isinstance(module, dynamic.Conv2d)


def unpacked(module: nn.Module) -> Mapping[str, Tensor]:
    """What a packed layer stores, at the widths that torch keeps.

    Its int8 weight, that weight's scales and zero points (one or one an output; torch keeps float64 and int64), the
    float32 bias, and the scale and zero point of its output, which a dynamic layer does not have.
    """
    weight, bias = module.weight(), module.bias()
    found = {"weight": weight.int_repr()}
    if weight.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams):
        found |= {
            "weight_scale": weight.q_per_channel_scales(),
            "weight_zero_point": weight.q_per_channel_zero_points(),
        }
    else:
        found["weight_scale"] = torch.tensor(weight.q_scale(), dtype=torch.float64)
        found["weight_zero_point"] = torch.tensor(weight.q_zero_point())
    if bias is not None:
        found["bias"] = bias.detach()
    if not isinstance(module, dynamic.Linear):
        found |= {"scale": torch.tensor(float(module.scale)), "zero_point": torch.tensor(int(module.zero_point))}
    return found


def in_float_layers(model: nn.Module) -> nn.Module:
    """`model` with every int8 layer of torch's replaced, in place, by the float layer of the same geometry.

    Raises:
        AumError: an int8 layer of torch's other than Linear, Conv1d, Conv2d and Conv3d.
    """
    made: dict[nn.Module, nn.Module] = {}  # a layer with two owners stays one
    for path, module in [*model.named_modules(remove_duplicate=False)]:
        if module not in made:
            made[module] = _in_float(path, module)
        if made[module] is not module and path:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, made[module])
    return made[model]


def _in_float(path: str, module: nn.Module) -> nn.Module:
    if isinstance(module, AT_THE_EDGES):
        return nn.Identity()
    if not is_packed(module):
        if type(module).__module__.startswith(("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.")) and (
            "packed" not in type(module).__name__.lower()
        ):
            raise AumError(
                f"{path or 'the model itself'}: {type(module).__name__} of torch.ao cannot be counted; of its int8 "
                "layers wanted Linear, Conv1d, Conv2d or Conv3d. Count the float model, and pass the int8 tensors as "
                "`stored`"
            )
        return module
    has_bias = module.bias() is not None
    if isinstance(module, LINEAR):
        layer = nn.Linear(module.in_features, module.out_features, has_bias)
    else:
        make = next(make for kind, make in CONVOLUTIONS.items() if isinstance(module, kind))
        geometry = {
            name: getattr(module, name)
            for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        }
        layer = make(module.in_channels, module.out_channels, bias=has_bias, **geometry)
    if isinstance(module, WITH_RELU):
        layer.register_forward_hook(lambda _, inputs, output: F.relu(output))
    return layer.eval()
