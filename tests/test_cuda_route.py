"""The CUDA route: what it asks of mamba-ssm and causal-conv1d, when it is taken, and its backward.

There is no GPU in most places, so stand-ins with the packages' own signatures and demands run on the CPU. The last
tests need a GPU and the packages themselves.
"""

import logging
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from test_scan import make_inputs, value_and_gradients
from tiny import features, student_config
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from aum_compress.compress.quantize import prepare
from aum_compress.kernels import cuda
from aum_compress.models.factory import build_model
from aum_compress.models.scan import selective_scan, selective_scan_oracle
from aum_compress.models.scan_loop import scan_loop_backward, scan_loop_forward
from aum_compress.recipe_schema import QuantizeSection

calls: list[str] = []


class StandIn(torch.autograd.Function):
    """What mamba-ssm's SelectiveScanFn takes, refuses and gives; the loop computes it."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        calls.append("scan forward")
        assert all(t.dtype == u.dtype for t in (delta, B, C, z) if t is not None)
        assert all(t.dtype == torch.float32 for t in (A, D, delta_bias) if t is not None)
        assert u.dtype in (torch.float32, torch.float16, torch.bfloat16)
        ctx.delta_softplus = delta_softplus
        tensors = (u, delta, A, B, C, D, z, delta_bias)
        ctx.save_for_backward(*tensors)
        wide = [None if t is None else t.float() for t in tensors]
        return scan_loop_forward(*wide, delta_softplus).to(u.dtype).transpose(1, 2).contiguous().transpose(1, 2)

    @staticmethod
    def backward(ctx, grad):
        calls.append("scan backward")
        wide = [None if t is None else t.float() for t in ctx.saved_tensors]
        gradients = scan_loop_backward(grad.float(), *wide, ctx.delta_softplus)
        return *(None if g is None else g.to(t.dtype) for g, t in zip(gradients, ctx.saved_tensors)), None


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
) -> Tensor:
    assert not return_last_state
    return StandIn.apply(u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None) -> Tensor:
    calls.append("convolution")
    assert activation == "silu"
    assert weight.dim() == 2
    padded = F.pad(x, (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None].to(x.dtype), bias.to(x.dtype), groups=x.shape[1]))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch) -> Iterator[None]:
    monkeypatch.delenv("AUM_NO_KERNEL", raising=False)
    calls.clear()
    found = (cuda._selective_scan_fn, cuda._causal_conv1d_fn)
    for function in found:
        function.cache_clear()
    yield
    for function in found:
        function.cache_clear()


@pytest.fixture
def packages(monkeypatch) -> None:
    """mamba-ssm and causal-conv1d, installed."""
    package, ops = ModuleType("mamba_ssm"), ModuleType("mamba_ssm.ops")
    interface = ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = selective_scan_fn
    convolution = ModuleType("causal_conv1d")
    convolution.causal_conv1d_fn = causal_conv1d_fn
    for module in (package, ops, interface, convolution):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def on_a_gpu(packages, monkeypatch) -> None:
    """As if the tensors of a test lay on one."""
    monkeypatch.setattr(cuda, "scans", lambda u, A: u.dtype != torch.float64)
    monkeypatch.setattr(cuda, "convolves", lambda x, n_taps: True)


def gpu_tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Tensors that say they lie on a GPU, without storage."""
    with FakeTensorMode():
        return [torch.empty(shape, dtype=dtype, device="cuda") for shape in shapes]


ROWS, STATES = (2, 8, 16), (8, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gpu_tensors_take_the_packages(packages, dtype):
    u, A = gpu_tensors(ROWS, STATES, dtype=dtype)
    assert cuda.scans(u, A)
    assert cuda.convolves(u, 4)


def test_what_the_kernels_do_not_take_is_left_to_the_loop(packages):
    u, A = gpu_tensors(ROWS, STATES)
    (wide,) = gpu_tensors(ROWS, dtype=torch.float64)
    empty, many_states = gpu_tensors((0, 8, 16), (8, 257))
    assert [cuda.scans(*pair) for pair in ((wide, A), (empty, A), (u, many_states))] == [False] * 3
    assert [cuda.convolves(x, taps) for x, taps in ((wide, 4), (empty, 4), (u, 5), (u, 1))] == [False] * 4
    on_the_cpu = torch.empty(ROWS)
    assert not cuda.scans(on_the_cpu, torch.empty(STATES))
    assert not cuda.convolves(on_the_cpu, 4)


def test_without_the_packages_one_warning_each(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    u, A = gpu_tensors(ROWS, STATES)
    with caplog.at_level(logging.WARNING, cuda.__name__):
        assert not any([cuda.scans(u, A), cuda.scans(u, A), cuda.convolves(u, 4), cuda.convolves(u, 4)])
    scan, convolution = (record.getMessage() for record in caplog.records)
    assert "mamba-ssm cannot be imported" in scan
    assert "causal-conv1d cannot be imported" in convolution
    for message in (scan, convolution):
        assert "pip install --no-build-isolation 'aum-compress[cuda]'" in message


def test_the_switch_is_silent(packages, monkeypatch, caplog):
    monkeypatch.setenv("AUM_NO_KERNEL", "1")
    u, A = gpu_tensors(ROWS, STATES)
    assert not cuda.scans(u, A)
    assert not cuda.convolves(u, 4)
    assert not caplog.records


def test_cpu_tensors_never_import_the_packages(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    build_model(student_config()).train()(features(2)).sum().backward()
    assert not caplog.records


@pytest.mark.parametrize("optional", [True, False])
def test_value_and_gradients_equal_the_oracle(on_a_gpu, optional):
    exact = make_inputs(2, 5, 9, 3, optional=optional)
    wanted, wanted_gradients = value_and_gradients(selective_scan_oracle, exact)
    inputs = [None if t is None else t.float() for t in exact]
    found, gradients = value_and_gradients(selective_scan, inputs)
    assert calls == ["scan forward", "scan forward", "scan backward"]
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), wanted, rtol=2e-4, atol=2e-5)
    for gradient, expected in zip(gradients, wanted_gradients, strict=True):
        assert (gradient is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(gradient.double(), expected, rtol=2e-4, atol=2e-5)


def test_half_precision_reaches_the_kernel_as_it_is(on_a_gpu):
    inputs = [t.to(torch.bfloat16) for t in make_inputs(1, 4, 16, 2)]
    found, gradients = value_and_gradients(selective_scan, inputs)
    wanted, wanted_gradients = value_and_gradients(selective_scan_oracle, [t.float() for t in inputs])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=2e-2)
    for gradient, expected in zip(gradients, wanted_gradients, strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.float(), expected, rtol=5e-2, atol=5e-2 * expected.abs().max().item())


def test_float64_is_left_to_the_loop(on_a_gpu):
    inputs = make_inputs(1, 2, 3, 2)
    torch.testing.assert_close(
        selective_scan(*inputs, delta_softplus=True), selective_scan_oracle(*inputs, delta_softplus=True)
    )
    assert calls == []


def test_operator_passes_torch_library_checks(on_a_gpu):
    inputs = [t.float().requires_grad_() for t in make_inputs(2, 3, 4, 2)]
    torch.library.opcheck(torch.ops.aum_compress.selective_scan.default, (*inputs, True))


def test_checkpointed_scan_has_the_same_gradients(on_a_gpu):
    inputs = [t.float() for t in make_inputs(2, 3, 6, 2)]
    _, wanted = value_and_gradients(selective_scan, inputs)
    _, found = value_and_gradients(
        lambda *leaves, **flags: checkpoint(selective_scan, *leaves, use_reentrant=False, **flags), inputs
    )
    for gradient, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0)


def test_model_gives_the_same_gradients_by_either_route(packages, monkeypatch):
    model = build_model(student_config()).train()
    x = features(3)
    model(x).square().sum().backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    assert calls == []
    monkeypatch.setattr(cuda, "scans", lambda u, A: True)
    monkeypatch.setattr(cuda, "convolves", lambda x, n_taps: True)
    model(x).square().sum().backward()
    assert calls.count("convolution") == calls.count("scan backward") == 4  # two blocks, two directions
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-5, msg=name)


def test_training_for_integers_rounds_the_convolution_by_either_route(packages, monkeypatch):
    model = build_model(student_config()).eval()
    fake = prepare(model, [features(4)], QuantizeSection(layers={"layers": "int8"})).train()
    wanted = fake(features(3))
    monkeypatch.setattr(cuda, "convolves", lambda x, n_taps: True)
    torch.testing.assert_close(fake(features(3)), wanted, rtol=0, atol=0)


def test_convolution_stays_a_module_outside_training(on_a_gpu):
    model = build_model(student_config()).eval()
    model(features(1))
    assert calls == ["scan forward"] * 4


on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("shape", [(2, 64, 1, 16), (3, 96, 257, 16), (2, 40, 2500, 8)])
def test_mamba_ssm_equals_the_oracle(dtype, tolerance, shape):
    pytest.importorskip("mamba_ssm")
    inputs = [t.to(dtype).cuda() for t in make_inputs(*shape, dtype=torch.float32)]
    assert cuda.scans(inputs[0], inputs[2])
    wanted, wanted_gradients = value_and_gradients(selective_scan_oracle, [t.double() for t in inputs])
    found, gradients = value_and_gradients(selective_scan, inputs)
    for result, expected in zip([found, *gradients], [wanted, *wanted_gradients], strict=True):
        assert result.dtype == dtype
        floor = tolerance * expected.abs().max().item()
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=floor)


@pytest.mark.gpu
@on_cuda
def test_causal_conv1d_equals_torch():
    pytest.importorskip("causal_conv1d")
    x = torch.randn(2, 33, 70, device="cuda").transpose(1, 2)
    weight, bias = torch.randn(70, 4, device="cuda"), torch.randn(70, device="cuda")
    assert cuda.convolves(x, 4)
    wanted = F.silu(F.conv1d(F.pad(x, (3, 0)), weight[:, None], bias, groups=70))
    torch.testing.assert_close(cuda.causal_convolution(x, weight, bias), wanted, rtol=1e-4, atol=1e-5)
