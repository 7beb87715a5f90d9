"""Bytes of a torch model: every tensor that the deployed model stores, at its stored width, by module.

What counts, for a model that is not ours:

- parameters and persistent buffers. A buffer that is not persistent is computed anew when the model is loaded;
- tensors that share their memory, and modules with two owners, once;
- a pruned weight (`torch.nn.utils.prune`) in full, zeros and all, but not its mask, which deployment multiplies in.
  Only a weight that has become smaller saves bytes;
- of a parametrised weight what is stored (of weight_norm: magnitude and direction), not what is computed from it;
- int8 layers of torch.ao with weight, scales, zero points and bias, as torch keeps them (`torch_quantized.unpacked`).
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping

from torch import Tensor, nn

from aum_compress.budget.records import Stored, wide_values
from aum_compress.budget.torch_quantized import is_packed, unpacked
from aum_compress.errors import AumError, join_problems
from aum_compress.models.quantized import QuantizedLayer


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Name -> every tensor that the deployed model stores, as the module docstring says; shared ones under each name.

    Raises:
        AumError: state that is no tensor.
    """
    packed = [path for path, module in model.named_modules(remove_duplicate=False) if is_packed(module)]
    inside = tuple(f"{path}." if path else "" for path in packed)
    state = {name: value for name, value in model.state_dict(keep_vars=True).items() if not name.startswith(inside)}
    problems = [
        f"{name}: found {type(value).__name__}, wanted a tensor"
        for name, value in state.items()
        if not isinstance(value, Tensor)
    ]
    if problems:
        raise AumError(
            join_problems(f"{type(model).__name__}: bytes cannot be counted:", problems)
            + "\nRegister it as a buffer or parameter, or keep it out of the state dict"
        )
    read = {
        name: tensor
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked") and not _is_pruning_mask(name, state)
    }
    for path, module in model.named_modules():
        if is_packed(module):
            read |= {f"{path}.{name}".lstrip("."): tensor for name, tensor in unpacked(module).items()}
    return read


def stored_by_module(model: nn.Module, stored: Mapping[str, Tensor] | None = None) -> dict[str, Stored]:
    """Module path -> what its own tensors take.

    Args:
        stored: name -> tensor at its stored width, for all of the model's state (`model_state`). What the model does
            not have, such as scales and zero points of a weight that is int8 or packed int4 here, is counted with the
            nearest module by its name. At the width in memory when left out.

    Raises:
        AumError: state of the model that `stored` lacks, or state that is no tensor.
    """
    state = model_state(model)
    if stored is None:
        stored = state
    weights = _weights(model, state)
    found: dict[str, Stored] = defaultdict(Stored)
    absent, seen = [], set()
    for name, tensor in state.items():
        if (memory := _memory(tensor)) in seen:
            continue
        seen.add(memory)
        if name not in stored:
            absent.append(f"{name}: absent")
        else:
            found[name.rpartition(".")[0]] += _stored(stored[name], tensor if name in weights else None)
    if absent:
        raise AumError(join_problems(f"{type(model).__name__}: stored tensors do not cover the model:", absent))
    known = model.state_dict()
    paths = {path for path, _ in model.named_modules()}
    for name in stored.keys() - state.keys() - known.keys():
        found[_nearest(name, paths)] += Stored(stored[name].nbytes)
    return dict(found)


def _is_pruning_mask(name: str, state: Mapping[str, Tensor]) -> bool:
    return name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in state


def _weights(model: nn.Module, state: Mapping[str, Tensor]) -> set[str]:
    """Names of what counts as parameters: of int8 layers too, whose weights are none to torch."""
    names = {name for name, _ in model.named_parameters()}
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLayer) or is_packed(module):
            names |= {f"{path}.{name}".lstrip(".") for name in ("weight", "bias")}
    return names & state.keys()


def _memory(tensor: Tensor) -> Hashable:
    """Equal for tensors that are the same memory."""
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    place = tensor.untyped_storage().data_ptr()
    return tensor.device, place, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _stored(tensor: Tensor, weight: Tensor | None) -> Stored:
    """Args: weight: the model's own, whose shape says how many values a packed `tensor` holds."""
    if weight is None or not weight.numel():
        return Stored(tensor.nbytes)
    bits = math.ceil(8 * tensor.nbytes / weight.numel())
    return Stored(tensor.nbytes, weight.numel(), wide_values(weight.shape, bits))


def _nearest(name: str, paths: set[str]) -> str:
    """The module that a tensor's name points into; the model itself where there is none."""
    while name and name not in paths:
        name = name.rpartition(".")[0]
    return name
