"""The fused CPU scan against a plain float64 loop, and the build that makes it."""

import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aum_compress.errors import AumError
from aum_compress.kernels import build
from aum_compress.kernels.cpu import scan_backward, scan_forward, two_way_backward, two_way_forward
from aum_compress.models.scan import selective_scan_oracle

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
needs_kernel = pytest.mark.skipif(build.library() is None, reason="no C compiler here, or AUM_NO_KERNEL=1")


def random_inputs(batch: int, channels: int, length: int, state: int, seed: int = 0) -> list[Tensor | None]:
    """In the order of NAMES: ordinary values, as a Mamba block has them at the start of training."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    rows, per_state = (batch, channels, length), (batch, state, length)
    delta, A = normal(*rows) - 2, -torch.exp(normal(channels, state))
    return [
        *(normal(*rows), delta, A, normal(*per_state), normal(*per_state)),
        *(normal(channels), normal(*rows), normal(channels)),
    ]


def assert_near(name: str, found: Tensor, wanted: Tensor) -> None:
    """Relative 1e-4, with a floor for elements in which large terms cancel and for what float32 cannot hold."""
    assert found.shape == wanted.shape, name
    floor = 1e-30 + 2e-6 * (wanted.abs().max().item() if wanted.numel() else 0.0)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=floor, msg=lambda text: f"{name}: {text}")


def assert_equals_oracle(inputs: list[Tensor | None], softplus: bool, seed: int = 0) -> None:
    """Value and every gradient."""
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    wanted = selective_scan_oracle(*exact, softplus)
    grad_y = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(seed + 1))
    assert_near("y", scan_forward(*inputs, softplus), wanted.detach())
    gradients = iter(torch.autograd.grad(wanted, [x for x in exact if x is not None], grad_y.double()))
    found = scan_backward(grad_y, *inputs, softplus)
    assert [x is None for x in found] == [x is None for x in inputs]
    for name, source, gradient in zip(NAMES, exact, found, strict=True):
        if source is not None:
            assert_near(f"gradient of {name}", gradient, next(gradients))


@needs_kernel
@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 150), st.integers(1, 40), st.integers(1, 64)),
    present=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    softplus=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_value_and_gradients_equal_the_oracle(
    shape: tuple[int, int, int, int], present: tuple[bool, bool, bool], softplus: bool, seed: int
) -> None:
    inputs = random_inputs(*shape, seed=seed)
    if not softplus:
        inputs[1] = F.softplus(inputs[1])
        inputs[7] = inputs[7].abs()
    inputs[5:] = [x if keep else None for x, keep in zip(inputs[5:], present, strict=True)]
    assert_equals_oracle(inputs, softplus, seed)


@needs_kernel
@settings(max_examples=30, deadline=None)
@given(
    log_dt=st.tuples(st.floats(math.log(1e-6), math.log(50)), st.floats(math.log(1e-6), math.log(50))),
    log_a=st.tuples(st.floats(math.log(1e-3), math.log(60)), st.floats(math.log(1e-3), math.log(60))),
    softplus=st.booleans(),
)
def test_extreme_steps_and_decays(log_dt: tuple[float, float], log_a: tuple[float, float], softplus: bool) -> None:
    inputs = random_inputs(2, 17, 19, 5)
    rng = torch.Generator().manual_seed(2)
    dt = torch.exp(torch.empty(2, 17, 19).uniform_(min(log_dt), max(log_dt) + 1e-6, generator=rng))
    # The inverse of softplus; beyond its threshold of 20 both are the identity.
    inputs[1] = torch.where(dt > 20, dt, torch.log(torch.expm1(dt.clamp(max=20)))) if softplus else dt
    inputs[2] = -torch.exp(torch.empty(17, 5).uniform_(min(log_a), max(log_a) + 1e-6, generator=rng))
    inputs[7] = None
    assert_equals_oracle(inputs, softplus)


@needs_kernel
def test_published_sizes() -> None:
    for shape in [(2, 96, 257, 16), (1, 64, 64, 8), (1, 384, 33, 16)]:
        assert_equals_oracle(random_inputs(*shape), softplus=True)


@needs_kernel
def test_softplus_is_exact_at_both_ends() -> None:
    """With one step and u = B = C = 1 the scan returns softplus(delta) itself."""
    delta = torch.tensor([-100.0, -80.0, -20.0, -1e-3, 0.0, 1.0, 19.9, 20.1, 60.0, 1e30, math.inf, -math.inf])
    one = torch.ones(1, delta.numel(), 1)
    scalar = torch.ones(1, 1, 1)
    y = scan_forward(one, delta.view_as(one), -torch.ones(delta.numel(), 1), scalar, scalar, None, None, None, True)
    wanted = F.softplus(delta.double())
    torch.testing.assert_close(y.flatten().double(), wanted, rtol=5e-7, atol=1e-37)


@needs_kernel
def test_overflow_and_nan_come_out_as_in_torch() -> None:
    inputs = random_inputs(1, 3, 4, 2)
    inputs[1], inputs[7] = torch.full((1, 3, 4), 2.0), None
    inputs[2] = torch.full((3, 2), 50.0)  # exp(100) is beyond float32
    assert torch.equal(scan_forward(*inputs, False).isfinite(), selective_scan_oracle(*inputs, False).isfinite())
    inputs[2] = -torch.ones(3, 2)
    inputs[0][0, 1, 2] = math.nan
    y = scan_forward(*inputs, False)
    assert torch.equal(y.isnan(), selective_scan_oracle(*inputs, False).isnan())
    assert y.isnan().sum() == 2  # channel 1 from step 2 on, no other channel
    inputs = random_inputs(1, 3, 4, 2)
    inputs[1][0, 0, 0] = math.nan
    du, ddelta, *_ = scan_backward(torch.ones(1, 3, 4), *inputs, True)
    assert ddelta[0, 0, 0].isnan()
    assert du[0, 1:].isfinite().all()


@needs_kernel
def test_strided_inputs_equal_contiguous_ones() -> None:
    inputs = random_inputs(2, 12, 9, 4)
    strided = [None if x is None else x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    grad_y = torch.randn(2, 9, 12).transpose(1, 2)
    assert not strided[0].is_contiguous()
    assert torch.equal(scan_forward(*strided, True), scan_forward(*inputs, True))
    for a, b in zip(scan_backward(grad_y, *strided, True), scan_backward(grad_y, *inputs, True), strict=True):
        assert torch.equal(a, b)


@needs_kernel
def test_bits_depend_neither_on_run_nor_on_threads() -> None:
    inputs, before = random_inputs(5, 100, 50, 16), torch.get_num_threads()
    grad_y = torch.randn(5, 100, 50)
    runs = []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            both = (*inputs[:7], inputs[2] / 2)
            runs.append([scan_forward(*inputs, True), *scan_backward(grad_y, *inputs, True)])
            runs[-1] += [two_way_forward(*both), *two_way_backward(grad_y, *both)]
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def both_ways(inputs: list[Tensor], A_back: Tensor) -> Tensor:
    """The oracle from the first token and, of the same turned round, from the last one."""
    u, delta, A, B, C, D, z = inputs
    turned = [t.flip(-1) for t in (u, delta, B, C, z)]
    back = selective_scan_oracle(*turned[:2], A_back, *turned[2:4], D, turned[4], None, True)
    return selective_scan_oracle(u, delta, A, B, C, D, z, None, True) + back.flip(-1)


@needs_kernel
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 20), st.integers(1, 5), st.integers(0, 10**6))
def test_two_ways_in_one_equal_the_oracle_from_both_ends(batch, channels, length, state, seed) -> None:
    *inputs, _ = random_inputs(batch, channels, length, state, seed)
    A_back = random_inputs(batch, channels, length, state, seed + 1)[2]
    exact = [x.double().requires_grad_() for x in (*inputs, A_back)]
    wanted = both_ways(exact[:-1], exact[-1])
    grad_y = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(seed))
    gradients = torch.autograd.grad(wanted, exact, grad_y.double())
    assert_near("y", two_way_forward(*inputs, A_back), wanted.detach())
    found = two_way_backward(grad_y, *inputs, A_back)
    for name, gradient, other in zip((*NAMES[:7], "A_back"), found, gradients, strict=True):
        assert_near(f"gradient of {name}", gradient, other)


@needs_kernel
def test_two_ways_in_one_are_the_bits_of_two_scans_added() -> None:
    *inputs, _ = random_inputs(3, 40, 21, 4)
    u, delta, A, B, C, D, z = inputs
    turned = [t.flip(-1) for t in (u, delta, B, C, z)]
    back = scan_forward(*turned[:2], A / 2, *turned[2:4], D, turned[4], None, True)
    wanted = scan_forward(*inputs, None, True) + back.flip(-1)
    assert torch.equal(two_way_forward(*inputs, A / 2), wanted)


@needs_kernel
@pytest.mark.parametrize(("channels", "length"), [(1, 9), (5, 1), (16, 8), (64, 16), (130, 21)])
def test_two_ways_in_one_give_the_same_bits_however_their_inputs_lie(channels, length) -> None:
    *inputs, _ = random_inputs(3, channels, length, 4)
    grad_y, A_back = torch.randn(3, channels, length), inputs[2] / 2
    by_token = [t.transpose(1, 2).contiguous().transpose(1, 2) if t.dim() == 3 else t for t in inputs]
    assert torch.equal(two_way_forward(*by_token, A_back), two_way_forward(*inputs, A_back))
    found = two_way_backward(grad_y, *by_token, A_back)
    for a, b in zip(found, two_way_backward(grad_y, *inputs, A_back), strict=True):
        assert torch.equal(a, b)
    if channels > 1 and length > 1:
        assert found[0].transpose(1, 2).is_contiguous(), "what comes back lies as what went in"


@needs_kernel
def test_rates_of_the_way_back_that_do_not_fit_are_named() -> None:
    *inputs, _ = random_inputs(2, 6, 5, 4)
    with pytest.raises(AumError, match=r"A_back is \(6, 3\) torch.float32 on cpu, wanted what A is: \(6, 4\)"):
        two_way_forward(*inputs, inputs[2][:, :3])


@needs_kernel
@pytest.mark.parametrize("position", range(8), ids=NAMES)
def test_wrong_shape_is_named(position: int) -> None:
    inputs = random_inputs(2, 6, 5, 4)
    inputs[position] = torch.cat([inputs[position], inputs[position]])
    with pytest.raises(AumError, match=r"has shape \(.*wanted \("):
        scan_forward(*inputs, True)


@needs_kernel
def test_wrong_rank_type_and_gradient_are_named() -> None:
    inputs = random_inputs(2, 6, 5, 4)
    with pytest.raises(AumError, match=r"u is \(6, 5\).*wanted \(B,D,L\)"):
        scan_forward(inputs[0][0], *inputs[1:], True)
    with pytest.raises(AumError, match=r"u is torch.float64 on cpu, wanted torch.float32 on cpu"):
        scan_forward(inputs[0].double(), *inputs[1:], True)
    with pytest.raises(AumError, match=r"delta is torch.float32 on meta"):
        scan_forward(inputs[0], inputs[1].to("meta"), *inputs[2:], True)
    with pytest.raises(AumError, match=r"grad_y has shape \(2, 6, 1\)"):
        scan_backward(torch.ones(2, 6, 1), *inputs, True)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty kernel cache, and no memory of an earlier build."""
    monkeypatch.setenv("AUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("AUM_NO_KERNEL", raising=False)
    build.library.cache_clear()
    yield tmp_path / "cache"
    build.library.cache_clear()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == build.__name__ and r.levelno == logging.WARNING]


def test_without_a_compiler_one_warning(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.library() is None
    assert build.library() is None
    (message,) = warnings_of(caplog)
    assert "no C compiler found (looked for cc, gcc, clang)" in message
    assert "AUM_NO_KERNEL=1" in message
    with pytest.raises(AumError, match=r"ask kernels\.build\.library\(\)"):
        scan_forward(*random_inputs(1, 1, 1, 1), True)


@pytest.mark.parametrize(
    ("cc", "wanted"),
    [
        ("no-such-compiler -m64", "no C compiler found (looked for no-such-compiler, from CC)"),
        ("false", "`false --version` ended with 1"),
        ("'cc", "No closing quotation"),
        ("{fake}", "scan.c: cannot compile today"),
    ],
)
def test_a_broken_compiler_is_told(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, cc: str, wanted: str
) -> None:
    fake = tmp_path / "fake-cc"
    fake.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo fake 1.0 && exit 0\necho "scan.c: cannot compile today" >&2\nexit 1\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("CC", cc.format(fake=fake))
    assert build.library() is None
    (message,) = warnings_of(caplog)
    assert wanted in message
    assert not fresh.exists() or not list(fresh.iterdir())


def test_a_cache_that_cannot_be_written_is_told(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.write_text("a file where the folder should be")
    monkeypatch.setenv("CC", sys.executable)
    assert build.library() is None
    (message,) = warnings_of(caplog)
    assert str(fresh) in message


def test_the_switch_is_silent(fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("AUM_NO_KERNEL", "1")
    assert build.library() is None
    assert not warnings_of(caplog)
    assert not fresh.exists()


@needs_kernel
def test_flags_that_the_compiler_refuses_are_left_out(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A build without OpenMP and without the processor's own instructions gives the same values."""
    monkeypatch.setattr(build, "_MACHINE_FLAGS", [["-march=no-such-processor"], []])
    assert build.library() is not None
    assert not warnings_of(caplog)
    assert_equals_oracle(random_inputs(2, 21, 18, 6), softplus=True)


@needs_kernel
def test_two_processes_build_at_once_and_a_third_reuses(fresh: Path) -> None:
    code = (
        "import sys; from aum_compress.kernels import build; lib = build.library(); assert 'torch' not in sys.modules; "
        "print(lib.aum_scan_groups(1))"
    )
    start = [sys.executable, "-c", code]
    environment = {**os.environ, "AUM_CACHE": str(fresh)}
    both = [subprocess.Popen(start, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out.strip()) == (0, b"1"), err.decode()
    (built,) = fresh.iterdir()  # one library, and nothing left of the builds
    before = built.stat()
    build.library.cache_clear()
    assert build.library() is not None
    assert built.stat().st_mtime_ns == before.st_mtime_ns
    assert built.stat().st_ino == before.st_ino


@needs_kernel
def test_a_damaged_cache_file_is_built_again(fresh: Path) -> None:
    assert build.library() is not None
    (built,) = fresh.iterdir()
    whole = built.stat().st_size
    built.unlink()  # a new inode: the loader keeps the old one mapped in this process
    built.write_bytes(b"\x7fELF cut short")
    build.library.cache_clear()
    assert build.library() is not None
    assert built.stat().st_size == whole
