"""The traced graph against the configuration, and operators that may not count as zero."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from aum_compress.budget.analytic import analytic_macs
from aum_compress.budget.records import agree
from aum_compress.budget.traced import traced_operations
from aum_compress.errors import AumError
from aum_compress.models.config import AudioMambaConfig, BlockConfig, ConvStage, ConvStem, CPMobileConfig, PatchStem
from aum_compress.models.factory import build_model, fold_batch_norm
from aum_compress.models.quantized import quantizable_layers, swap_in_quantized
from aum_compress.models.scan import selective_scan

SIZES = st.integers(1, 12)
BLOCKS = st.builds(
    BlockConfig,
    d_inner=SIZES,
    d_state=SIZES,
    dt_rank=st.integers(1, 4),
    d_conv=st.integers(1, 5),
    block_type=st.sampled_from(["none", "v1", "v2"]),
)
STRIDES = st.integers(1, 3)
PLAIN_STAGES = st.builds(ConvStage, channels=SIZES, stride_mels=STRIDES, stride_frames=STRIDES, expansion=st.just(0.0))
STAGES = st.builds(
    ConvStage,
    channels=SIZES,
    stride_mels=STRIDES,
    stride_frames=STRIDES,
    expansion=st.sampled_from([0.0, 1.0, 1.7, 3.0]),
)
CONV_STEMS = st.builds(
    lambda first, rest, token, folded: ConvStem(stages=(first, *rest), token=token, folded=folded),
    PLAIN_STAGES,
    st.lists(STAGES, max_size=3),
    st.sampled_from(["frame", "cell"]),
    st.booleans(),
)
PATCH_STEMS = st.builds(
    PatchStem,
    patch_mels=st.integers(2, 8),
    patch_frames=st.integers(2, 8),
    stride_mels=st.integers(2, 8),
    stride_frames=st.integers(2, 8),
)
AUDIO_MAMBAS = st.builds(
    AudioMambaConfig,
    n_mels=st.integers(8, 20),
    n_frames=st.integers(8, 20),
    n_classes=st.integers(2, 6),
    d_model=st.integers(1, 3).map(lambda quarter: 4 * quarter),
    blocks=st.lists(BLOCKS, min_size=1, max_size=2).map(tuple),
    stem=CONV_STEMS | PATCH_STEMS,
    pool=st.sampled_from(["class_token", "mean"]),
    position=st.sampled_from(["absolute", "rope", "none"]),
    head=st.sampled_from(["linear", "mlp"]),
)
CP_MOBILES = st.builds(
    CPMobileConfig,
    n_mels=st.integers(8, 70),
    n_frames=st.integers(8, 70),
    n_classes=st.integers(2, 12),
    base_channels=st.sampled_from([8, 16, 32, 37]),
    channels_multiplier=st.sampled_from([1.0, 1.5, 1.8]),
    expansion_rate=st.sampled_from([1.0, 2.1, 3.0]),
    folded=st.booleans(),
)


@settings(max_examples=30, deadline=None)
@given(config=AUDIO_MAMBAS | CP_MOBILES, int8=st.booleans())
def test_configuration_and_traced_graph_agree_in_every_layer(config, int8):
    model = build_model(config)
    if int8:
        model = fold_batch_norm(model)
        swap_in_quantized(model, list(quantizable_layers(model)))
    traced = traced_operations(model, torch.zeros(1, 1, config.n_mels, config.n_frames))
    agree({"configuration": analytic_macs(config), "traced graph": {n: own.macs for n, own in traced.items()}})


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
