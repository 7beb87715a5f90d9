"""What DCASE 2025 Task 1's own checker prints. Shown beside the budget, never gated.

Source of both figures: `get_torch_macs_memory` and `get_model_size_bytes` of helpers/complexity.py in the challenge's
inference package. Its MACs are torchinfo's: it takes a Linear to run once, whatever the sequence, and sees no scan, so
for Mamba they are 3 to 17 times too low. Its bytes leave out buffers, so int8 weights, which are kept in buffers or
packed, count as nothing.
"""

import copy
from collections.abc import Mapping

import torch
import torchinfo
from torch import Tensor, nn

from aum_compress.budget.torch_trace import Example, float_copy, float_example
from aum_compress.models.factory import Model, build_model
from aum_compress.models.quantized import QuantizedLayer

INT8_NOTE = (
    "dcase_macs is counted on the float twin of this int8 model: torchinfo sees no multiplication in int8 layers"
)


def dcase_macs(model: nn.Module, example: Example) -> int | None:
    """MACs that DCASE's script prints for one clip: torchinfo 1.8.0 on a float copy, run on `example`.

    For one of our int8 models the float model of the same configuration is counted. None where torchinfo fails.
    """
    with torch.random.fork_rng(devices=[]):  # a check must not change what training draws
        twin = build_model(model.config) if holds_int8(model) else float_copy(model)
        try:
            return torchinfo.summary(twin, input_data=float_example(example), device="cpu", verbose=0).total_mult_adds
        except Exception:  # whatever it meets in a model that it was not made for; nothing hangs on this figure
            return None


def dcase_bytes(model: nn.Module, stored: Mapping[str, Tensor]) -> int:
    """Bytes that DCASE's script prints: parameters alone, at the width in `stored`."""
    return sum(
        parameter.numel() * stored[name].element_size() if name in stored else parameter.nbytes
        for name, parameter in model.named_parameters()
    )


def submission_complexity(model: nn.Module, input_size: tuple[int, ...]) -> tuple[int, int]:
    """MACs and bytes that DCASE's script prints for one device's model of a submission, as it stands.

    Args: input_size: of what the model reads for one clip, the batch axis included.
    """
    twin = copy.deepcopy(model).float()
    macs = torchinfo.summary(twin, input_size=input_size, verbose=0).total_mult_adds
    return macs, sum(parameter.nbytes for parameter in model.parameters())


def dcase_notes(model: nn.Module, param_bytes: int, printed_bytes: int, printed_macs: int | None) -> list[str]:
    """What has to be said beside the two figures.

    Args:
        param_bytes: all that the model stores. printed_bytes, printed_macs: `dcase_bytes` and `dcase_macs` of it.
    """
    notes = [INT8_NOTE] if holds_int8(model) else []
    if param_bytes and not printed_bytes:
        notes.append(
            f"dcase_bytes is 0: DCASE's script counts nn.Parameters alone, and all {param_bytes:,} bytes of this model "
            "lie in buffers or packed weights"
        )
    if printed_macs is None:
        notes.append("dcase_macs is absent: torchinfo 1.8.0, which DCASE's script runs, fails on this model")
    return notes


def holds_int8(model: nn.Module) -> bool:
    """Whether this is one of the project's models with layers that keep their weights in int8."""
    return isinstance(model, Model) and any(isinstance(module, QuantizedLayer) for module in model.modules())
