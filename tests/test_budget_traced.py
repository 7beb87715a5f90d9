"""The traced graph against the configuration, and operators that may not count as zero."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aum_compress.budget.traced import traced_operations
from aum_compress.errors import AumError
from aum_compress.models.scan import selective_scan


class Function(nn.Module):
    """One function of x (1,1,4,6)."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def counted(function) -> tuple[int, dict[str, int]]:
    found = traced_operations(Function(function), torch.zeros(1, 1, 4, 6)).get("")
    return (0, {}) if found is None else (found.macs, dict(found.elementwise))


@pytest.mark.parametrize(
    ("function", "macs", "elementwise"),
    [
        (lambda x, w: F.linear(x, w), 4 * 6 * 3, {}),
        (lambda x, w: F.linear(x, w, w[:, 0]), 4 * 6 * 3, {"add": 12}),
        (lambda x, w: x @ w.T, 4 * 6 * 3, {}),
        (lambda x, w: w @ x.expand(5, 1, 4, 6).transpose(2, 3), 5 * 3 * 6 * 4, {}),
        (lambda x, w: torch.einsum("abij,kj->abik", x, w), 4 * 6 * 3, {}),
        (lambda x, w: torch.einsum("abij,kj->abikj", x, w), 4 * 6 * 3, {}),
        (lambda x, w: torch.addmm(w[:, :3], x[0, 0, :3], w.T), 3 * 6 * 3, {"add": 9}),
        (lambda x, w: F.conv2d(x.view(1, 2, 2, 6), w.view(2, 1, 3, 3), padding=1, groups=2), 24 * 9, {}),
        (lambda x, w: F.conv_transpose2d(x, w.view(1, 2, 3, 3), stride=2), 24 * 2 * 9, {}),
        (lambda x, w: F.silu(x) * 2, 0, {"silu": 24, "multiply": 24}),
        (lambda x, w: F.softplus(x).exp(), 0, {"softplus": 24, "exp": 24}),
        (lambda x, w: x.mean(-1), 0, {"reduce": 24}),
        (lambda x, w: F.avg_pool2d(x, 2), 0, {"pool": 24}),
        (lambda x, w: x[:, :, : x.shape[2] - 1].flip(2).reshape(-1), 0, {}),
    ],
)
def test_operators_by_hand(function, macs, elementwise):
    assert counted(function) == (macs, elementwise)


def test_scan_without_skip_and_gate_leaves_their_products_out():
    def scan(x: Tensor, weight: Tensor) -> Tensor:
        u = x[0]  # (1,4,6): D = 4, L = 6
        return selective_scan(u, u, -weight[:2, :4].T.exp(), u[:, :2], u[:, :2], delta_bias=u[0, :, 0])

    macs, elementwise = counted(scan)
    assert macs == 6 * (4 * 4 * 2 + 4)
    assert elementwise == {"add": 24, "exp": 8 + 6 * 4 * 2, "negate": 8}


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 1


def test_an_unknown_operator_is_an_error_that_names_it_and_its_layer():
    model = Outer(Function(lambda x, w: torch.linalg.svdvals(x) + torch.special.i0(x).sum()))
    with pytest.raises(AumError) as caught:
        traced_operations(model, torch.zeros(1, 1, 4, 6))
    assert "inner: aten::linalg_svdvals" in str(caught.value)
    assert "inner: aten::i0" in str(caught.value)
    assert "the model itself" not in str(caught.value)


def test_a_custom_autograd_function_is_unknown_not_free():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x * 2

    with pytest.raises(AumError, match=r"the model itself: prim::PythonOp\.Double"):
        counted(lambda x, w: Double.apply(x))


def test_a_model_that_does_not_take_the_features_is_an_error_without_traceback():
    with pytest.raises(AumError, match=r"Linear: cannot be traced on input \(1, 1, 4, 6\): RuntimeError"):
        traced_operations(nn.Linear(7, 2), torch.zeros(1, 1, 4, 6))
