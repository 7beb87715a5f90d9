"""What DCASE 2025 Task 1's own checker prints. Shown beside the budget, never gated.

Source of both figures: `get_torch_macs_memory` and `get_model_size_bytes` of helpers/complexity.py in the challenge's
inference package. Its MACs are torchinfo's: it takes a Linear to run once, whatever the sequence, and sees no scan, so
for Mamba they are 3 to 17 times too low. Its bytes leave out buffers, so int8 weights kept in buffers count as nothing.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
import torchinfo
from torch import Tensor, nn

from aum_compress.models.factory import Model, build_model
from aum_compress.models.quantized import QuantizedLayer

INT8_NOTE = (
    "dcase_macs is counted on the float twin of this int8 model: torchinfo sees no multiplication in int8 layers"
)


def dcase_macs(model: nn.Module, feature_shape: Sequence[int]) -> int:
    """MACs that DCASE's script prints for one clip (1, *feature_shape): torchinfo 1.8.0 on a float copy.

    For one of our int8 models the float model of the same configuration is counted.
    """
    with torch.random.fork_rng(devices=[]):  # torchinfo draws its input: a check must not change what training draws
        twin = build_model(model.config) if holds_int8(model) else copy.deepcopy(model).float()
        return torchinfo.summary(twin, input_size=(1, *feature_shape), verbose=0).total_mult_adds


def dcase_bytes(model: nn.Module, stored: Mapping[str, Tensor]) -> int:
    """Bytes that DCASE's script prints: parameters alone, at the width in `stored`."""
    return sum(
        parameter.numel() * stored[name].element_size() if name in stored else parameter.nbytes
        for name, parameter in model.named_parameters()
    )


def holds_int8(model: nn.Module) -> bool:
    """Whether this is one of the project's models with layers that keep their weights in int8."""
    return isinstance(model, Model) and any(isinstance(module, QuantizedLayer) for module in model.modules())
