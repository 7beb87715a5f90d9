"""Bytes of a torch model: every tensor that the deployed model stores, at its stored width, by module."""

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, nn

from aum_compress.budget.records import Stored, wide_values
from aum_compress.errors import AumError, join_problems
from aum_compress.models.quantized import QuantizedLayer, stored_tensors


def state_as_it_is(model: nn.Module) -> dict[str, Tensor]:
    """The model's state at the width that it has in memory.

    Raises:
        AumError: state that is no tensor, such as torch's own packed int8 weights.
    """
    problems = [
        f"{name}: found {type(value).__name__}, wanted a tensor"
        for name, value in model.state_dict().items()
        if not isinstance(value, Tensor)
    ]
    if problems:
        raise AumError(
            join_problems(f"{type(model).__name__}: bytes cannot be counted:", problems)
            + "\nPass the tensors that the deployed model stores as `stored`"
        )
    return stored_tensors(model, half=False)


def stored_by_module(model: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, Stored]:
    """Module path -> what its own tensors take.

    Args:
        stored: the model's state at its stored width: parameters, persistent buffers, quantisation scales and zero
            points. A tensor that the model has under several names counts once.

    Raises:
        AumError: state of the model that `stored` lacks.
    """
    weights = {name for name, _ in model.named_parameters()}
    weights |= {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    found: dict[str, Stored] = defaultdict(Stored)
    absent, seen = [], set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.endswith("num_batches_tracked") or id(tensor) in seen:  # inference never reads the former
            continue
        seen.add(id(tensor))
        if name not in stored:
            absent.append(f"{name}: absent")
            continue
        found[name.rpartition(".")[0]] += _stored(stored[name], weight=name in weights)
    if absent:
        raise AumError(join_problems(f"{type(model).__name__}: stored tensors do not cover the model:", absent))
    return dict(found)


def _stored(tensor: Tensor, *, weight: bool) -> Stored:
    if not weight:
        return Stored(tensor.nbytes)
    return Stored(tensor.nbytes, tensor.numel(), wide_values(tensor.shape, 8 * tensor.element_size()))
