"""Peak activation bytes: by hand on small graphs, against an independent account of our own models' runs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from aum_compress.budget.check import check_module
from aum_compress.budget.traced import traced_costs
from aum_compress.models.config import (
    AudioMambaConfig,
    BlockConfig,
    ConvBlockConfig,
    ConvStage,
    ConvStem,
    CPMobileConfig,
    Mamba2BlockConfig,
    PatchStem,
)
from aum_compress.models.factory import build_model, fold_batch_norm
from aum_compress.models.quantized import quantizable_layers, swap_in_quantized


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(100, 10))

    def forward(self, *inputs: Tensor):
        return self.function(*inputs, self.weight)


def peak(function, *shapes: tuple[int, ...]) -> int:
    return traced_costs(Function(function), tuple(map(torch.zeros, shapes))).peak_activation_bytes


@pytest.mark.parametrize(
    ("function", "values"),
    [
        (lambda x, w: x.exp(), 10 + 10),
        (lambda x, w: x.exp().exp().exp(), 10 + 10),  # two alive at a time
        (lambda x, w: x.exp().exp() + x, 10 + 10 + 10),  # the input is needed to the end
        (lambda x, w: (x.exp(), x.exp().exp()), 10 + 10 + 10),  # so is an output
        (lambda x, w: F.linear(x, w), 10 + 100),  # weights do not count
        (lambda x, w: F.linear(x, w).sum(), 10 + 100),
        (lambda x, w: F.linear(F.linear(x, w), w.T), 10 + 100),
        (lambda x, w: w.exp()[0] + x, 10 + 10),  # nor what is computed from them alone
        (lambda x, w: torch.zeros(50).add(1)[:10] + x, 10 + 10),
        (lambda x, w: torch.zeros(5, 10).index_copy_(0, torch.tensor([3]), x), 10 + 50),  # but where an input is put
        (lambda x, w: x.view(2, 5).T.unsqueeze(0)[:, 1:].exp(), 10 + 8),  # views take nothing
        (lambda x, w: x.view(2, 5).T.reshape(10).exp(), 10 + 10),  # here a reshape has to copy
        (lambda x, w: x.view(2, 5).T.reshape(10), 10 + 10),
        (lambda x, w: x.view(2, 5).reshape(10), 10),
        (lambda x, w: x.view(2, 5).T.contiguous().contiguous(), 10 + 10),
        (lambda x, w: x.exp().relu_().mul_(2), 10 + 10),  # in place
        (lambda x, w: torch.cat([x.exp(), x.exp()]), 10 + 10 + 20),  # x, freed before, is as large as one of them
        (lambda x, w: sum(part.exp() for part in x.chunk(5, -1)), 10 + 2 + 2 + 2),
        (lambda x, w: x.to(torch.float64), 10 + 20),  # eight bytes a value
        (lambda x, w: x.to(torch.float32).detach(), 10),
        (lambda x, w: F.dropout(x, training=False).exp(), 10 + 10),
        (lambda x, w: x.expand(50, 10).transpose(0, 1), 10),
        (lambda x, w: x.argmax(-1), 10 + 2),  # int64
        (lambda x, w: torch.arange(x.shape[1]), 10),  # of x only its size was wanted
    ],
)
def test_by_hand(function, values):
    assert peak(function, (1, 10)) == 4 * values


def test_an_input_is_freed_after_its_last_use():
    # x 10 and y 10, exp(x) 10: then x goes, and y * exp(x) is written
    assert peak(lambda x, y, w: y * x.exp(), (1, 10), (1, 10)) == 4 * 30
    # the product of 100 and the sum of 1 meet in a third value, y gone
    assert peak(lambda x, y, w: F.linear(x.exp(), w) + y.sum(), (1, 10), (1, 10)) == 4 * (100 + 1 + 100)


def test_a_report_carries_the_peak():
    report = check_module(nn.Sequential(nn.Linear(10, 30), nn.ReLU(), nn.Linear(30, 2)), torch.zeros(1, 10))
    assert report.peak_activation_bytes == 4 * 60
    assert report.to_dict()["peak_activation_bytes"] == 240


class Account(TorchFunctionMode):
    """All calls of torch functions in one run: which memory each reads and writes that depends on the input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.fixed = {place(tensor) for tensor in model.state_dict(keep_vars=True).values()}
        self.calls: list[set[int]] = []
        self.bytes: dict[int, int] = {}
        self.kept: list[Tensor] = []  # so that no memory is used twice

    def __torch_function__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        given, written = ([x for x in tree_leaves(part) if isinstance(x, Tensor)] for part in ((args, kwargs), outputs))
        if all(place(tensor) in self.fixed for tensor in given):
            self.fixed |= {place(tensor) for tensor in written}
        self.note(given + written)
        return outputs

    def note(self, tensors: list[Tensor]) -> None:
        with torch._C.DisableTorchFunction():
            self.kept += tensors
            found = {place(tensor): tensor for tensor in tensors if place(tensor) not in self.fixed}
            self.bytes |= {where: tensor.untyped_storage().nbytes() for where, tensor in found.items()}
            self.calls.append(set(found))

    def peak(self) -> int:
        first = {where: min(i for i, call in enumerate(self.calls) if where in call) for where in self.bytes}
        last = {where: max(i for i, call in enumerate(self.calls) if where in call) for where in self.bytes}
        return max(
            sum(size for where, size in self.bytes.items() if first[where] <= moment <= last[where])
            for moment in range(len(self.calls))
        )


def place(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage().data_ptr()


SIZES = {"n_mels": 32, "n_frames": 17, "n_classes": 4}
CONV_STEM = ConvStem(
    stages=(ConvStage(channels=8, stride_mels=4, expansion=0), ConvStage(channels=6)), token="cell", folded=True
)
MODELS = {
    "patch": AudioMambaConfig(
        **SIZES,
        d_model=12,
        blocks=(
            BlockConfig(d_inner=10, d_state=3, dt_rank=2),
            BlockConfig(d_inner=7, d_state=5, dt_rank=1, d_conv=3, block_type="v1"),
        ),
        stem=PatchStem(patch_mels=8, patch_frames=4, stride_mels=8, stride_frames=4),
        pool="class_token",
        position="absolute",
    ),
    "conv": AudioMambaConfig(
        **SIZES,
        d_model=12,
        blocks=(
            BlockConfig(d_inner=10, d_state=3, dt_rank=2, block_type="none", along="time"),
            Mamba2BlockConfig(d_inner=12, d_state=3, head_dim=4),
            ConvBlockConfig(d_inner=5, d_conv=3, along="mel"),
        ),
        stem=CONV_STEM,
        position="rope",
        head="mlp",
    ),
    "cp-mobile": CPMobileConfig(**SIZES, folded=True),
}


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
def test_the_peak_of_our_models_is_that_of_what_their_run_holds_in_memory(name, int8):
    model = build_model(MODELS[name]).eval()
    if int8:
        model = fold_batch_norm(model)
        swap_in_quantized(model, list(quantizable_layers(model)))
    features = torch.zeros(1, 1, 32, 17)
    with torch.no_grad(), Account(model) as account:
        account.note([features])
        account.note([model(features)])
    assert traced_costs(model, features).peak_activation_bytes == account.peak()
