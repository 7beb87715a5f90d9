import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aum_compress.models import scan as scan_module
from aum_compress.models.scan import selective_scan, selective_scan_oracle
from aum_compress.models.scan_loop import scan_loop_backward, scan_loop_forward


def make_inputs(batch, d_inner, length, d_state, *, seed=0, dtype=torch.float64, optional=True):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    u, delta = normal(batch, d_inner, length), normal(batch, d_inner, length)
    A = -torch.rand(d_inner, d_state, generator=generator, dtype=dtype) * 4
    B, C = normal(batch, d_state, length), normal(batch, d_state, length)
    D, z, bias = (normal(d_inner), normal(batch, d_inner, length), normal(d_inner)) if optional else (None,) * 3
    return [u, delta, A, B, C, D, z, bias]


def value_and_gradients(function, inputs):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves, delta_softplus=True)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    (y * weights).sum().backward()
    return y.detach(), [None if t is None else t.grad for t in leaves]


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    d_inner=st.integers(1, 9),
    length=st.integers(1, 12),
    d_state=st.integers(1, 5),
    optional=st.booleans(),
    double=st.booleans(),
)
def test_operator_equals_oracle_in_value_and_gradient(batch, d_inner, length, d_state, optional, double):
    inputs = make_inputs(batch, d_inner, length, d_state, optional=optional)
    wanted, wanted_gradients = value_and_gradients(selective_scan_oracle, inputs)
    if not double:
        inputs = [None if t is None else t.float() for t in inputs]
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if double else {"rtol": 2e-4, "atol": 2e-5}
    found, gradients = value_and_gradients(selective_scan, inputs)
    torch.testing.assert_close(found.double(), wanted, **tolerance)
    for gradient, expected in zip(gradients, wanted_gradients, strict=True):
        if expected is not None:
            torch.testing.assert_close(gradient.double(), expected, **tolerance)


def test_loop_serves_float32_where_there_is_no_kernel(monkeypatch):
    inputs = [t.float() for t in make_inputs(2, 6, 7, 3)]
    wanted, wanted_gradients = value_and_gradients(selective_scan, inputs)
    calls = []

    def counted(*arguments):
        calls.append(1)
        return scan_loop_forward(*arguments)

    monkeypatch.setattr(scan_module.build, "library", lambda: None)
    monkeypatch.setattr(scan_module, "scan_loop_forward", counted)
    found, gradients = value_and_gradients(selective_scan, inputs)
    assert calls
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for gradient, expected in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=2e-4, atol=2e-5)


def test_operator_passes_torch_library_checks():
    inputs = [t.requires_grad_() for t in make_inputs(2, 3, 4, 2)]
    torch.library.opcheck(torch.ops.aum_compress.selective_scan.default, (*inputs, True))


def test_loop_backward_gives_none_for_absent_inputs():
    inputs = make_inputs(1, 2, 3, 2, optional=False)
    gradients = scan_loop_backward(torch.ones(1, 2, 3, dtype=torch.float64), *inputs, True)
    assert [g is None for g in gradients] == [False] * 5 + [True] * 3


def test_half_input_is_scanned_in_float32():
    inputs = [t.to(torch.bfloat16) for t in make_inputs(1, 4, 16, 2)]
    found = selective_scan(*inputs, delta_softplus=True)
    wanted = selective_scan(*[t.float() for t in inputs], delta_softplus=True)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted.to(torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu():
    inputs = [t.float() for t in make_inputs(2, 8, 16, 4)]
    wanted = selective_scan(*inputs, delta_softplus=True)
    found = selective_scan(*[t.cuda() for t in inputs], delta_softplus=True).cpu()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
