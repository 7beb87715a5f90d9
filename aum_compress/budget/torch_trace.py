"""One run of a torch model, written down as a graph whose nodes know the module that they belong to.

The tracing is fvcore's, which puts the path of the running module on every node of `torch.jit`'s graph.
"""

import copy
import linecache
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fvcore.nn.jit_analysis import _get_scoped_trace_graph
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from aum_compress.budget.torch_quantized import in_float_layers
from aum_compress.errors import AumError, join_problems

Example = Tensor | Sequence[Any] | Mapping[str, Any]
"""What a model is called with: a tensor, a tuple of positional arguments or a dict of keyword arguments."""

_aten = torch.ops.aten
READS_VALUES = {
    _aten._local_scalar_dense.default,
    _aten.equal.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.unique_consecutive.default,
    _aten.bincount.default,
    _aten.repeat_interleave.Tensor,
}
"""Operators whose result is a Python value, or a tensor whose size hangs on values."""
LEAVES_TORCH = ("NumPy array", "Python list")
"""In torch's warnings: where values went out of sight of the trace."""


@dataclass(frozen=True)
class Trace:
    """The graph of one run."""

    graph: Any
    """torch._C.Graph. Its inputs are the `n_inputs` tensors of the example, then the model's own tensors."""
    n_inputs: int

    def nodes(self) -> Iterator[tuple[Any, str]]:
        """Each node in the order of execution, with the path of its module ("" for the model itself)."""
        for node in self.graph.nodes():
            innermost = node.scopeName().rpartition("/")[2]
            yield node, innermost.removeprefix(_Caller.MODEL).removeprefix(".")


def trace(model: nn.Module, example: Example) -> Trace:
    """Runs a float32 copy of `model` on the CPU, in evaluation mode: once to see what it reads, once for the graph.

    nn.MultiheadAttention's fast path is switched off, so that its products stand in the graph one by one.

    Raises:
        AumError: a model that does not run on the example, or that reads values of it in Python, so that what it
            computes is not the same for every input.
    """
    name = type(model).__name__
    twin = in_float_layers(float_copy(model))
    leaves, structure = tree_flatten(float_example(example))
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
    if not tensors:
        raise AumError(f"{name}: example: found no tensor, wanted a tensor, or a tuple or dict that holds some")
    reads = _ValueReads()
    caller = _Caller(twin, lambda given: tree_unflatten(_filled(leaves, given), structure), reads)
    paths = {module: path for path, module in caller.named_modules()}
    try:
        # a check must not change what training draws
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _slow_attention(), _warnings() as found:
            # apart from the trace: it would not see what an operator calls under a dispatch mode, such as convolutions
            with reads:
                caller(*tensors)
            graph = _get_scoped_trace_graph(caller, tensors, paths)
    except AumError:
        raise
    except Exception as error:  # whatever the traced model itself raises
        reason = (str(error).splitlines() or [""])[0]  # some print whole tensors behind
        raise AumError(
            f"{name}: cannot be traced on input {shapes}: {type(error).__name__}: {reason}. Wanted a module in plain "
            "torch, without TorchScript, that registers its layers and takes this example"
        ) from error
    places = [*reads.places, *(_line(w.filename, w.lineno) for w in found if _leaves_torch(w))]
    if places:
        raise AumError(
            join_problems(
                f"{name}: reads values of its input in Python, so that what it computes, and costs, hangs on them:",
                list(dict.fromkeys(places)),
            )
            + "\nWrite it in tensor operations (torch.where instead of if, no numpy), or count each branch on its own"
        )
    return Trace(graph, len(tensors))


def float_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU in float32 and evaluation mode; of a model on `meta`, which has no values, one of zeros.

    Raises AumError for a model that cannot be copied.
    """
    computed = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    # what torch.nn.utils.prune and weight_norm computed last is no leaf, and would stop deepcopy
    known = {id(value): value.detach().clone() for value in computed if not value.is_leaf}
    try:
        twin = copy.deepcopy(model, known)
    except Exception as error:  # whatever a part of the model raises
        raise AumError(
            f"{type(model).__name__}: cannot be copied: {type(error).__name__}: {error}. Wanted a module that "
            "copy.deepcopy can copy, as the check must not change it"
        ) from error
    if any(tensor.is_meta for tensor in (*twin.parameters(), *twin.buffers())):
        twin.to_empty(device="cpu")
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.detach().zero_()  # an index among them must be one
    return twin.cpu().float().eval()


def float_example(example: Example) -> Example:
    """The example on the CPU, its floating-point tensors in float32, as the copy of the model wants them."""

    def changed(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = torch.zeros(leaf.shape, dtype=leaf.dtype) if leaf.is_meta else leaf.detach().cpu()
        return leaf.float() if leaf.is_floating_point() else leaf

    return tree_map(changed, example)


class _Caller(nn.Module):
    """Calls the model with flat tensors, and returns all the tensors that it returns, however they are packed."""

    MODEL = "model"

    def __init__(self, model: nn.Module, rebuild: Callable[[Sequence[Tensor]], Any], reads: "_ValueReads") -> None:
        super().__init__()
        self.model = model
        self.rebuild, self.reads = rebuild, reads
        # the tracer takes state for tensors, and packed int8 layers add a dtype
        self.register_state_dict_post_hook(_tensors_only)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.reads.depends.update(dict.fromkeys(tensors))
        arguments = self.rebuild(tensors)
        if isinstance(arguments, Tensor):
            outputs = self.model(arguments)
        elif isinstance(arguments, Mapping):
            outputs = self.model(**arguments)
        else:
            outputs = self.model(*arguments)
        found = tuple(leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
        if not found:
            raise AumError(f"{type(self.model).__name__}: returns {type(outputs).__name__}, wanted tensors")
        return found


def _leaves_torch(warning: warnings.WarningMessage) -> bool:
    return issubclass(warning.category, torch.jit.TracerWarning) and any(
        f"Converting a tensor to a {what}" in str(warning.message) for what in LEAVES_TORCH
    )


def _tensors_only(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name, value in state.items() if not isinstance(value, Tensor)]:
        del state[name]


class _ValueReads(TorchDispatchMode):
    """Follows what depends on the inputs, and notes where Python reads a value of it."""

    def __init__(self) -> None:
        super().__init__()
        self.depends = WeakIdKeyDictionary()
        self.places: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf in self.depends]
        by_mask = function is _aten.index.Tensor and any(t.dtype in (torch.bool, torch.uint8) for t in given)
        if (given and function in READS_VALUES) or by_mask:
            self.places.append(_line_of_the_model())
        outputs = function(*args, **(kwargs or {}))
        if given:
            self.depends.update({leaf: None for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)})
        return outputs


def _line_of_the_model() -> str:
    """The innermost line that is running outside torch and this file."""
    here, torch_folder = Path(__file__), Path(torch.__file__).parent
    frame = sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path != here and torch_folder not in path.parents and path.exists():
            return _line(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return "inside torch"


def _line(filename: str, number: int) -> str:
    return f"{Path(filename).name}, line {number}: {linecache.getline(filename, number).strip()}"


def _filled(leaves: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """`leaves` with its tensors replaced in order."""
    remaining = iter(tensors)
    return [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


@contextmanager
def _warnings() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


@contextmanager
def _slow_attention() -> Iterator[None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
