"""The convolution of Mamba blocks as training on a CPU runs it, against torch's own."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aum_compress.models.config import BlockConfig
from aum_compress.models.mamba import MambaMixer
from aum_compress.models.short_conv import MOST_TAPS, causal_convolution, convolves


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 9), st.integers(1, MOST_TAPS), st.integers(0, 10**6))
def test_value_and_gradients_are_those_of_a_padded_convolution(batch, length, channels, taps, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, length, channels), (channels, 1, taps), (channels,), (batch, length, channels))
    x, weight, bias, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    padded = F.pad(exact[0].transpose(1, 2), (taps - 1, 0))
    wanted = F.conv1d(padded, *exact[1:], groups=channels).transpose(1, 2)
    own = [t.requires_grad_() for t in (x, weight, bias)]
    found = causal_convolution(*own)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    gradients = [
        torch.autograd.grad(y, inputs, g) for y, inputs, g in ((found, own, grad), (wanted, exact, grad.double()))
    ]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-4)


def test_a_mixer_in_training_computes_what_it_computes_outside():
    torch.manual_seed(0)
    for block_type in ("none", "v1", "v2"):
        mixer = MambaMixer(16, BlockConfig(d_inner=24, d_state=4, dt_rank=2, block_type=block_type), 9)
        tokens = torch.randn(2, 9, 16)
        with torch.no_grad():
            wanted = mixer.eval()(tokens)
        torch.testing.assert_close(mixer.train()(tokens), wanted, rtol=1e-4, atol=1e-6)


def test_it_is_taken_for_training_in_single_precision_alone():
    x, convolution = torch.randn(2, 9, 4), nn.Conv1d(4, 4, 3, groups=4)
    assert convolves(x, convolution)
    assert not convolves(x.double(), convolution)
    assert not convolves(x, nn.Conv1d(4, 4, MOST_TAPS + 1, groups=4))
    assert not convolves(x, nn.Conv1d(4, 4, 3))
    assert not convolves(x, nn.Identity())
    with torch.no_grad():
        assert not convolves(x, convolution)
