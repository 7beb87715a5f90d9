"""A model whose parameters are what it stores, at their stored width, in layers that torchinfo counts at their length.

The challenge's script adds up `model.parameters()` and lets torchinfo 1.8.0 count multiplications. Both would be too
low for the model as it is trained: int8 weights are buffers, which the script leaves out, and torchinfo takes a Linear
to run once, however long the sequence. So here every stored tensor is a parameter, and every Linear stands in a layer
that torchinfo takes for the 1x1 convolution that it is. What is computed stays the model's own forward.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from aum_compress.models.factory import Model
from aum_compress.models.quantized import QuantizedLayer


class StoredModel(nn.Module):
    """(B,1,F,T) normalised features to logits (B,C), float32. Parameters of two bytes are widened while it computes."""

    def __init__(self, network: Model, stored: Mapping[str, Tensor]) -> None:
        """Takes `network` over, in evaluation mode; `stored` names each of its tensors at the width to keep it in."""
        super().__init__()
        network.requires_grad_(False)
        for name, module in list(network.named_modules()):
            if isinstance(module, nn.Linear | QuantizedLayer):
                parent, _, child = name.rpartition(".")
                own = {key: stored[f"{name}.{key}"] for key in module.state_dict()}
                setattr(network.get_submodule(parent), child, _counted(module, own))
        for prefix, module in network.named_modules():
            if isinstance(module, StoredConv):
                continue
            for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                name = f"{prefix}.{key}".lstrip(".")
                if name in stored:
                    module._buffers.pop(key, None)
                    setattr(module, key, _parameter(stored[name].to(tensor.device)))
        self.network = network.eval()

    def forward(self, features: Tensor) -> Tensor:
        own = self.network.named_parameters()
        widened = {name: tensor.float() for name, tensor in own if tensor.dtype == torch.float16}
        return functional_call(self.network, widened, (features.float(),))


class StoredConv(nn.Module):
    """A convolution, or a Linear as a 1x1 convolution: its tensors are parameters, its output has channels second.

    torchinfo knows a convolution by `Conv` in the name of its class, and its parameters by `weight` and `bias`: no
    other parameter may have one of these words in its name.
    """

    def __init__(self, layer: nn.Module, stored: Mapping[str, Tensor], *, linear: bool) -> None:
        super().__init__()
        self._layer = (layer.to("meta"),)  # in a tuple, so that it is no child: torchinfo counts what has no children
        self._names = {name: name if name in ("weight", "bias") else name.replace("weight", "w") for name in stored}
        for name, key in self._names.items():
            setattr(self, key, _parameter(stored[name]))
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """(B,I,...) to (B,O,...)."""
        tensors = {name: getattr(self, key) for name, key in self._names.items()}
        if not self.linear:
            return functional_call(self._layer[0], tensors, (x,))
        return functional_call(self._layer[0], tensors, (x.transpose(1, -1),)).transpose(1, -1)


class Pointwise(nn.Module):
    """(...,I) to (...,O) through a 1x1 convolution over all that stands before I."""

    def __init__(self, convolution: StoredConv) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(len(x), -1, x.shape[-1])
        return self.convolution(rows.transpose(1, 2)).transpose(1, 2).reshape(*x.shape[:-1], -1)


def _counted(layer: nn.Module, stored: Mapping[str, Tensor]) -> nn.Module:
    linear = getattr(layer, "convolution", None) is None
    convolution = StoredConv(layer, stored, linear=linear)
    return Pointwise(convolution) if linear else convolution


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
