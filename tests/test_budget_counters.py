"""The torch witness against other counters, where they define the same: torch's FlopCounterMode and fvcore itself."""

import math

import pytest
import torch
import torch.nn.functional as F
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from aum_compress.budget.analytic import analytic_macs, scan_macs
from aum_compress.budget.traced import traced_operations
from aum_compress.models.config import AudioMambaConfig, ConvStage, ConvStem, uniform_blocks
from aum_compress.models.factory import build_model

pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration")
SIZES = st.integers(1, 5)
LENGTHS = st.integers(7, 10)


def our_macs(model: nn.Module, *inputs: Tensor) -> int:
    return sum(own.macs for own in traced_operations(model, inputs).values())


def torch_macs(model: nn.Module, *inputs: Tensor) -> int:
    """Two operations a MAC, counted below autograd, where every product is mm, addmm, bmm or a convolution.

    What it does not see, fused kernels, is switched off: oneDNN's LSTM, the CPU's attention.
    """
    fused_off = torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), fused_off[0], fused_off[1]:
        model.eval()(*inputs)
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


@st.composite
def convolutions(draw) -> tuple[nn.Module, Tensor]:
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    transposed = draw(st.booleans())
    make = (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        if transposed
        else (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    )[dims - 1]
    inputs, outputs = groups * draw(SIZES), groups * draw(SIZES)
    stride = draw(st.integers(1, 3))
    options = {"output_padding": draw(st.integers(0, stride - 1))} if transposed else {}
    layer = make(
        inputs,
        outputs,
        draw(st.integers(1, 3)),
        stride=stride,
        padding=draw(st.integers(0, 2)),
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
        **options,
    )
    batch = draw(st.integers(1, 2))
    return layer, torch.zeros(batch, inputs, *(draw(LENGTHS) for _ in range(dims)))


@settings(max_examples=60, deadline=None)
@given(case=convolutions())
def test_random_convolutions(case):
    layer, x = case
    assert our_macs(layer, x) == torch_macs(layer, x)


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


@settings(max_examples=40, deadline=None)
@given(batch=st.lists(SIZES, max_size=2), rows=SIZES, inner=SIZES, columns=SIZES, bias=st.booleans())
def test_random_linear_layers(batch, rows, inner, columns, bias):
    x = torch.zeros(*batch, rows, inner)
    layer = nn.Linear(inner, columns, bias=bias)
    assert our_macs(layer, x) == torch_macs(layer, x) == math.prod(batch) * rows * inner * columns


@settings(max_examples=40, deadline=None)
@given(
    batch=st.lists(SIZES, max_size=2),
    broadcast=st.tuples(*[st.booleans()] * 4),
    rows=SIZES,
    inner=SIZES,
    columns=SIZES,
)
def test_random_matrix_products(batch, broadcast, rows, inner, columns):
    first = [1 if one else size for one, size in zip(broadcast[:2], batch)]
    second = [1 if one else size for one, size in zip(broadcast[2:], batch)]
    inputs = torch.zeros(*first, rows, inner), torch.zeros(*second, inner, columns)
    product = Function(torch.matmul)
    assert our_macs(product, *inputs) == torch_macs(product, *inputs)


@settings(max_examples=30, deadline=None)
@given(batch=SIZES, heads=SIZES, queries=SIZES, keys=SIZES, width=SIZES, masked=st.booleans())
def test_random_attention(batch, heads, queries, keys, width, masked):
    q, k = torch.zeros(batch, heads, queries, width), torch.zeros(batch, heads, keys, width)
    mask = torch.zeros(queries, keys) if masked else None
    attend = Function(lambda q, k: F.scaled_dot_product_attention(q, k, k, attn_mask=mask))
    assert our_macs(attend, q, k) == torch_macs(attend, q, k) == 2 * batch * heads * queries * keys * width


LETTERS = "abcde"


@st.composite
def chains(draw) -> tuple[str, list[tuple[int, ...]]]:
    """An einsum whose operands each share a letter with the one before, so that each step multiplies matrices."""
    n_operands = draw(st.integers(2, 4))
    letters = draw(st.permutations(LETTERS))
    sizes = {letter: draw(st.integers(2, 5)) for letter in LETTERS}
    terms = [letters[place : place + 2] for place in range(n_operands)]
    equation = ",".join(map("".join, terms)) + f"->{letters[0]}{letters[n_operands]}"
    return equation, [tuple(sizes[letter] for letter in term) for term in terms]


@settings(max_examples=30, deadline=None)
@given(case=chains())
def test_random_einsums_run_from_left_to_right(case):
    equation, shapes = case
    contract = Function(lambda *operands: torch.einsum(equation, *operands))
    inputs = [torch.zeros(shape) for shape in shapes]
    assert our_macs(contract, *inputs) == torch_macs(contract, *inputs)


@settings(max_examples=25, deadline=None)
@given(
    make=st.sampled_from([nn.RNN, nn.GRU, nn.LSTM]),
    width=SIZES,
    hidden=st.integers(2, 5),
    steps=SIZES,
    layers=st.integers(1, 2),
    both_ways=st.booleans(),
    projected=st.booleans(),
    bias=st.booleans(),
)
def test_random_recurrent_layers(make, width, hidden, steps, layers, both_ways, projected, bias):
    options = {"proj_size": 1} if projected and make is nn.LSTM else {}
    layer = make(width, hidden, num_layers=layers, bidirectional=both_ways, bias=bias, **options)
    x = torch.zeros(steps, 2, width)
    assert our_macs(layer, x) == torch_macs(layer, x)


@settings(max_examples=10, deadline=None)
@given(heads=st.integers(1, 3), width=st.integers(1, 3), tokens=SIZES, hidden=SIZES, training=st.booleans())
def test_random_transformer_layers(heads, width, tokens, hidden, training):
    layer = nn.TransformerEncoderLayer(heads * width, heads, hidden, batch_first=True).train(training)
    x = torch.zeros(2, tokens, heads * width)
    counted = our_macs(layer, x)
    torch.backends.mha.set_fastpath_enabled(False)  # torch's own counter does not see the fast path
    try:
        assert counted == torch_macs(layer, x)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("n_dims", [1, 2])
def test_tensordot_and_bilinear_forms(n_dims):
    one, two = torch.zeros(2, 3, 4), torch.zeros(3, 4, 5) if n_dims == 2 else torch.zeros(4, 5)
    contract = Function(lambda a, b: torch.tensordot(a, b, n_dims))
    assert our_macs(contract, one, two) == torch_macs(contract, one, two)


def test_fvcore_by_itself_counts_our_model_alike_with_a_handle_for_the_scan():
    config = AudioMambaConfig(
        n_mels=32,
        n_frames=17,
        n_classes=4,
        d_model=16,
        blocks=uniform_blocks(2, 16, d_state=4),
        stem=ConvStem(stages=(ConvStage(channels=8, expansion=0), ConvStage(channels=8, stride_mels=4))),
    )
    model = build_model(config).eval()

    def scan(inputs, outputs) -> int:
        batch, d_inner, n_tokens = get_shape(inputs[0])
        return batch * scan_macs(d_inner, get_shape(inputs[2])[1], n_tokens)

    analysis = FlopCountAnalysis(model, torch.zeros(1, 1, 32, 17)).unsupported_ops_warnings(False)
    # it takes the scaling of a batch normalisation for MACs
    two_ways = {"aum_compress::two_way_scan": lambda inputs, outputs: 2 * scan(inputs, outputs)}
    analysis.set_op_handle(**two_ways, **{"aten::batch_norm": lambda *_: 0})
    with torch.no_grad():
        assert analysis.total() == our_macs(model, torch.zeros(1, 1, 32, 17)) == sum(analytic_macs(config).values())
