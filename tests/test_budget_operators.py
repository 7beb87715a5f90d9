"""What the torch witness counts for each operator, by hand, and against the same computed in smaller steps."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aum_compress.budget.contraction import einsum_macs, fft_macs
from aum_compress.budget.traced import traced_operations
from aum_compress.errors import AumError


class Function(nn.Module):
    """One function of the inputs and of a weight (3,6)."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(3, 6))

    def forward(self, *inputs: Tensor):
        return self.function(*inputs, self.weight)


def total(model: nn.Module, *inputs: Tensor) -> tuple[int, dict[str, int]]:
    """MACs and elementwise operations of all modules."""
    macs, elementwise = 0, {}
    for own in traced_operations(model, inputs).values():
        macs += own.macs
        for kind, count in own.elementwise.items():
            elementwise[kind] = elementwise.get(kind, 0) + count
    return macs, elementwise


def counted(function, *inputs: Tensor) -> tuple[int, dict[str, int]]:
    return total(Function(function), *inputs)


X = torch.zeros(1, 1, 4, 6)
ROW, SQUARE = torch.zeros(6), torch.zeros(6, 6)


@pytest.mark.parametrize(
    ("function", "macs", "elementwise"),
    [
        (lambda x, w: torch.mv(w, x[0, 0, 0]), 3 * 6, {}),
        (lambda x, w: torch.dot(x[0, 0, 0], w[0]), 6, {}),
        (lambda x, w: torch.outer(x[0, 0, 0], w[:, 0]), 6 * 3, {}),
        (lambda x, w: torch.inner(x, w), 4 * 3 * 6, {}),
        (lambda x, w: torch.kron(x[0, 0], w), 4 * 6 * 3 * 6, {}),
        (lambda x, w: torch.bmm(x[0], w.T[None]), 4 * 6 * 3, {}),
        (lambda x, w: torch.matmul(x[0, 0], w[0]), 4 * 6, {}),
        (lambda x, w: torch.baddbmm(w[None, :, :1], x[0, :, :3], w.T[None], beta=1, alpha=1), 54, {"add": 9}),
        (lambda x, w: torch.addbmm(w[:, :3], x[0, :, :3], w.T[None], alpha=2), 54, {"add": 9, "multiply": 9}),
        (lambda x, w: torch.addmv(w[:, 0], w, x[0, 0, 0]), 3 * 6, {"add": 3}),
        (
            lambda x, w: torch.addr(w, w[:, 0], x[0, 0, 0]),
            3 * 6,
            {
                "add": 18,
            },
        ),
        (lambda x, w: torch.tensordot(x, w, dims=([3], [1])), 4 * 6 * 3, {}),
        (lambda x, w: F.linear(x[0, 0, 0], w), 6 * 3, {}),
        (lambda x, w: x[0, 0] @ w.T + 1, 4 * 6 * 3, {"add": 12}),
        # (4 rows) x1 of 6, x2 of 6, 3 outputs: x1 with A, then with x2
        (lambda x, w: F.bilinear(x[0], x[0], w[:, :, None].expand(3, 6, 6)), 4 * 3 * 6 * 6 + 4 * 3 * 6, {}),
    ],
)
def test_products(function, macs, elementwise):
    assert counted(function, X) == (macs, elementwise)


@pytest.mark.parametrize(
    ("layer", "shape", "macs", "adds"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9), 5 * 6 * 3 * 2, 30),
        (nn.Conv1d(4, 6, 3, padding="same", dilation=2, bias=False), (4, 9), 9 * 6 * 3 * 4, 0),
        (nn.Conv2d(3, 2, (3, 2), padding=(1, 0), padding_mode="circular"), (3, 5, 4), 5 * 3 * 2 * 3 * 2 * 3, 30),
        (nn.Conv3d(2, 4, 2, groups=2, bias=False), (2, 3, 3, 3), 8 * 4 * 8, 0),
        # of a transposed convolution each value read meets all taps, also those that padding cuts off again
        (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2, output_padding=1), (4, 5), 20 * 3 * 3, 12 * 6),
        (nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, bias=False), (2, 4, 5), 40 * 3 * 9, 0),
        (nn.ConvTranspose3d(1, 2, 2), (1, 2, 2, 2), 8 * 2 * 8, 2 * 27),
    ],
)
@pytest.mark.parametrize("batched", [True, False])
def test_convolutions(layer, shape, macs, adds, batched):
    found = total(layer, torch.zeros(1, *shape) if batched else torch.zeros(shape))
    assert found == (macs, {"add": adds} if adds else {})


def test_einsum_is_contracted_from_left_to_right():
    one, two, three = torch.zeros(2, 3), torch.zeros(3, 5), torch.zeros(5, 7)
    in_order = counted(lambda a, b, c, w: torch.einsum("ij,jk,kl->il", a, b, c), one, two, three)
    turned = counted(lambda a, b, c, w: torch.einsum("kl,jk,ij->il", c, b, a), one, two, three)
    assert in_order == (2 * 3 * 5 + 2 * 5 * 7, {})
    assert turned == (5 * 7 * 3 + 7 * 3 * 2, {})


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("ij,jk", [(2, 3), (3, 5)], 30),  # without an arrow
        ("...ij,...jk->...ik", [(4, 1, 2, 3), (5, 3, 6)], 4 * 5 * 2 * 3 * 6),
        ("i,j->ij", [(2,), (3,)], 6),
        ("ij,k->ik", [(2, 3), (5,)], 10),  # j is summed before anything is multiplied
        ("ij,ij->", [(2, 3), (2, 3)], 6),
        ("ij,jk->ik", [(2, 1), (3, 5)], 10),  # so is the j that meets a size of 1
        ("ii->i", [(4, 4)], 0),
        ("a,b,c->abc", [(2,), (3,), (5,)], 6 + 30),
        ("ij,jk,ij->ik", [(2, 3), (3, 5), (2, 3)], 30 + 30),  # j is kept for the third
    ],
)
def test_einsum_by_hand(equation, shapes, macs):
    assert einsum_macs(equation, shapes) == macs
    assert total(Function(lambda *given: torch.einsum(equation, *given[:-1])), *map(torch.zeros, shapes))[0] == macs


def test_einsum_follows_a_path_and_refuses_what_does_not_fit():
    shapes = [(2, 3), (3, 5), (5, 7)]
    assert einsum_macs("ij,jk,kl->il", shapes, path=[1, 2, 0, 1]) == 3 * 5 * 7 + 2 * 3 * 7
    with pytest.raises(AumError, match=r"'ij,jk': found an operand of 3 dimensions, 'jk' wants another number"):
        einsum_macs("ij,jk", [(2, 3), (3, 5, 7)])
    with pytest.raises(AumError, match="found 1 operands, wanted 2"):
        einsum_macs("ij,jk", [(2, 3)])


def test_attention_multiplies_twice_in_full():
    def attend(x: Tensor, w: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x[:, :, :3], x[:, :, :3, :2], is_causal=True)

    # 4 queries, 3 keys, width 6, values of width 2
    assert counted(attend, X) == (4 * 3 * 6 + 4 * 3 * 2, {"multiply": 12, "softmax": 12})
    masked = counted(lambda x, w: F.scaled_dot_product_attention(x, x, x, attn_mask=x[0, 0, :, :4]), X)
    assert masked == (2 * 4 * 4 * 6, {"add": 16, "multiply": 16, "softmax": 16})


ATTENTION_MACS = 5 * 8 * 24 + 2 * 2 * 5 * 5 * 4 + 5 * 8 * 8
"""5 tokens of width 8, 2 heads: projections in, two products a head, projection out."""


class SelfAttention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=self.need_weights)[0]


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_is_not_lost_in_its_fast_path(need_weights):
    macs, elementwise = total(SelfAttention(need_weights).eval(), torch.zeros(1, 5, 8))
    assert macs == ATTENTION_MACS
    assert elementwise["softmax"] == 2 * 5 * 5
    assert torch.backends.mha.get_fastpath_enabled(), "as it was"


@pytest.mark.parametrize("training", [True, False])
def test_a_transformer_layer_counts_attention_and_both_linear_layers(training):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
    found = traced_operations(encoder.train(training), torch.zeros(1, 5, 8))
    assert sum(own.macs for own in found.values()) == 3 * (ATTENTION_MACS + 2 * 5 * 8 * 16)
    assert found["layers.2.linear1"].macs == 5 * 8 * 16
    assert found["layers.0.norm1"].elementwise == {"norm": 40}
    assert encoder.training == training


def test_a_transformer_decoder_attends_twice():
    decoder = nn.TransformerDecoderLayer(8, 2, 16)
    macs, _ = total(decoder, torch.zeros(5, 1, 8), torch.zeros(7, 1, 8))
    across = 5 * 8 * 8 + 7 * 8 * 16 + 2 * 2 * 5 * 7 * 4 + 5 * 8 * 8
    assert macs == ATTENTION_MACS + across + 2 * 5 * 8 * 16


STEPS, WIDTH, HIDDEN = 5, 4, 3


@pytest.mark.parametrize(("make", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_recurrent_layers_by_formula(make, gates):
    one_layer = STEPS * gates * HIDDEN * (WIDTH + HIDDEN)
    x = torch.zeros(STEPS, 1, WIDTH)
    assert total(make(WIDTH, HIDDEN), x)[0] == one_layer
    assert total(make(WIDTH, HIDDEN, batch_first=True), x.transpose(0, 1))[0] == one_layer
    assert total(make(WIDTH, HIDDEN), x[:, 0])[0] == one_layer, "without a batch"
    assert total(make(WIDTH, HIDDEN), x.expand(-1, 2, -1))[0] == 2 * one_layer
    second = STEPS * gates * HIDDEN * (2 * HIDDEN + HIDDEN)
    assert total(make(WIDTH, HIDDEN, num_layers=2, bidirectional=True), x)[0] == 2 * (one_layer + second)


def test_an_lstm_with_projections_multiplies_once_more():
    macs, _ = total(nn.LSTM(WIDTH, HIDDEN, num_layers=2, proj_size=2), torch.zeros(STEPS, 1, WIDTH))
    first = 4 * HIDDEN * (WIDTH + 2) + 2 * HIDDEN
    second = 4 * HIDDEN * (2 + 2) + 2 * HIDDEN
    assert macs == STEPS * (first + second)


class Steps(nn.Module):
    """A cell called once a step."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x:
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("make", "cell", "options"),
    [
        (nn.RNN, nn.RNNCell, {}),
        (nn.RNN, nn.RNNCell, {"nonlinearity": "relu"}),
        (nn.GRU, nn.GRUCell, {}),
        (nn.LSTM, nn.LSTMCell, {}),
    ],
)
def test_a_recurrent_layer_costs_what_its_cells_cost(make, cell, options, bias):
    x = torch.zeros(STEPS, 1, WIDTH)
    layer = total(make(WIDTH, HIDDEN, bias=bias, **options), x)
    assert layer == total(Steps(cell(WIDTH, HIDDEN, bias=bias, **options)), x)


def test_a_lookup_is_free_and_a_bag_of_embeddings_is_summed():
    tokens = torch.tensor([[1, 0, 4]])
    assert total(nn.Embedding(5, 4), tokens) == (0, {})
    assert total(nn.EmbeddingBag(5, 4, mode="mean"), tokens) == (0, {"reduce": 12})
    weighted = total(nn.EmbeddingBag(5, 4, mode="sum"), tokens, None, torch.ones(1, 3))
    assert weighted == (0, {"multiply": 12, "reduce": 12})


@pytest.mark.parametrize(
    ("layer", "shape", "elementwise"),
    [
        (nn.BatchNorm1d(4), (4, 6), {"batch_norm": 24}),
        (nn.GroupNorm(2, 4), (4, 6), {"norm": 24}),
        (nn.InstanceNorm1d(4), (4, 6), {"norm": 24}),
        (nn.LayerNorm(6), (4, 6), {"norm": 24}),
        (nn.RMSNorm(6), (4, 6), {"norm": 24}),
        (nn.AvgPool1d(3), (4, 6), {"pool": 24}),
        (nn.AvgPool3d(2), (1, 4, 4, 4), {"pool": 64}),
        (nn.MaxPool2d(2, stride=1), (1, 3, 3), {"pool": 16}),
        (nn.MaxPool3d(2, return_indices=True), (1, 4, 4, 4), {"pool": 64}),
        (nn.AdaptiveAvgPool2d(1), (2, 3, 4), {"pool": 24}),
        (nn.AdaptiveMaxPool1d(2), (4, 6), {"pool": 24}),
        (nn.FractionalMaxPool2d(2, output_size=2), (1, 4, 4), {"pool": 16, "random": 2}),
        (nn.Upsample(scale_factor=2), (4, 6), {}),
        (nn.Upsample(scale_factor=2, mode="bilinear"), (1, 2, 3), {"interpolate": 24}),
        (nn.Upsample(scale_factor=2, mode="trilinear"), (1, 1, 2, 3), {"interpolate": 48}),
        (nn.GLU(), (4, 6), {"multiply": 12, "sigmoid": 12}),
        (nn.Softmax(-1), (4, 6), {"softmax": 24}),
        (nn.LogSoftmax(-1), (4, 6), {"softmax": 24}),
        (nn.Softmin(-1), (4, 6), {"negate": 24, "softmax": 24}),
        (nn.SELU(), (4, 6), {"relu": 24}),
        (nn.Hardswish(), (4, 6), {"relu": 24}),
        (nn.Hardsigmoid(), (4, 6), {"relu": 24}),
        (nn.LogSigmoid(), (4, 6), {"softplus": 24}),
        (nn.Tanhshrink(), (4, 6), {"add": 24, "sigmoid": 24}),
        (nn.PReLU(), (4, 6), {"relu": 24}),
        (nn.ReLU(inplace=True), (4, 6), {"relu": 24}),
        (nn.Dropout(), (4, 6), {}),
        (nn.PixelShuffle(2), (4, 2, 3), {}),
        (nn.ReflectionPad1d(1), (4, 6), {}),
        (nn.Unfold(2), (1, 3, 3), {}),
        (nn.Fold((3, 3), 2), (4, 4), {"reduce": 16}),
        (nn.ChannelShuffle(2), (4, 2, 3), {}),
        (nn.Identity(), (4, 6), {}),
    ],
)
def test_layers_that_multiply_nothing_gated(layer, shape, elementwise):
    assert total(layer, torch.zeros(1, *shape)) == (0, elementwise)


@pytest.mark.parametrize(
    ("function", "elementwise"),
    [
        (lambda x, w: x.cumsum(-1), {"reduce": 24}),
        (lambda x, w: x.std(-1), {"reduce": 24}),
        (lambda x, w: x.max(-1).values, {"reduce": 24}),
        (lambda x, w: F.normalize(x, dim=-1), {"compare": 4, "divide": 24, "reduce": 24}),
        (lambda x, w: torch.lerp(x, x, 0.5), {"add": 48, "multiply": 24}),
        (lambda x, w: torch.addcmul(x, x, x), {"add": 24, "multiply": 24}),
        (lambda x, w: x.clamp(0, 1).floor() // 2, {"compare": 24, "divide": 24, "round": 24}),
        (lambda x, w: torch.where(x > 0, x, -x), {"compare": 48, "negate": 24}),
        (lambda x, w: x.add(1).mul_(2).relu_(), {"add": 24, "multiply": 24, "relu": 24}),
        (lambda x, w: x.topk(2).values, {"sort": 24}),
        (lambda x, w: torch.cat([x, x], 1).split(1, 1)[0].roll(1, -1).repeat(1, 2, 1, 1), {}),
    ],
)
def test_functions_that_multiply_nothing_gated(function, elementwise):
    assert counted(function, X) == (0, elementwise)


def test_fourier_transforms_by_the_stated_rule():
    assert fft_macs(8, real=False) == 8 // 2 * 3 * 4
    assert fft_macs(8, real=True) == 24
    assert fft_macs(6, real=True) == 2 * 6 * 6
    signal = torch.zeros(2, 8)
    assert counted(lambda x, w: torch.fft.rfft(x).abs(), signal) == (2 * 24, {"compare": 10})
    assert counted(lambda x, w: torch.fft.irfft(torch.fft.rfft(x)), signal)[0] == 2 * 2 * 24
    assert counted(lambda x, w: torch.fft.fft(x, dim=0).abs(), torch.zeros(8, 3, dtype=torch.cfloat))[0] == 3 * 48


@pytest.mark.parametrize("center", [True, False])
def test_stft_counts_each_frame_and_its_window(center):
    def stft(x: Tensor, w: Tensor) -> Tensor:
        return torch.stft(x, 8, 4, window=torch.ones(8), center=center, return_complex=True).abs()

    frames = 5 if center else 3
    found = counted(stft, torch.zeros(2, 16))
    assert found == (2 * frames * 24, {"compare": 2 * frames * 5, "multiply": 2 * frames * 8})


def test_modules_that_are_nested_shared_or_functional_are_all_counted():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(6, 6, bias=False)
            self.parts = nn.ModuleList([nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 6)), self.shared])
            self.named = nn.ModuleDict({"a": nn.Linear(6, 2, bias=False)})
            self.matrix = nn.Parameter(torch.zeros(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = part(x)
            return self.named["a"](self.shared(x) @ self.matrix)

    found = {name: own.macs for name, own in traced_operations(Net(), torch.zeros(1, 6)).items()}
    assert found == {"parts.0.0": 24, "parts.0.1": 24, "shared": 2 * 36, "": 36, "named.a": 12}
