"""The scan and the causal convolution by mamba-ssm's and causal-conv1d's CUDA kernels, where they are installed.

Both packages are the optional extra `[cuda]`. They are imported when the first CUDA tensor comes, never before: the
import alone takes seconds. `AUM_NO_KERNEL=1` leaves them out, as it does the fused CPU scan. Their backward sums with
atomics, so on a GPU equal seeds give equal figures only up to rounding.
"""

import logging
import os
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

_MOST_STATES = 256
"""N that mamba-ssm's kernel holds."""
_CONVOLUTION_TAPS = (2, 3, 4)
"""K that causal-conv1d's kernel knows."""
_HOW = (
    "The values stay the same. To mend it: pip install --no-build-isolation 'aum-compress[cuda]', which needs nvcc of "
    "the CUDA version that torch was built with; AUM_NO_KERNEL=1 silences this message."
)


def scans(u: Tensor, A: Tensor) -> bool:
    """Whether `scan_forward` and `scan_backward` serve this input: `u` (B,D,L), `A` (D,N).

    Float64, no elements at all, more than 256 states and other devices are left to the loop. Without mamba-ssm the
    answer is no, after one logged warning.
    """
    fits = u.is_cuda and u.dtype != torch.float64 and u.numel() > 0 and A.shape[1] <= _MOST_STATES
    return fits and _selective_scan_fn() is not None


def scan_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """y (B,D,L) in the type of `u`; shapes of `models.scan.selective_scan`.

    `u`, `delta`, `B`, `C` and `z` have one type: float32, float16 or bfloat16; `A`, `D` and `delta_bias` are float32.
    The kernel computes in float32 whatever it reads. Ask `scans` first.
    """
    return _selective_scan_fn()(u, delta, A, B, C, D, z, delta_bias, delta_softplus).contiguous()


def scan_backward(
    grad_y: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of (u, delta, A, B, C, D, z, delta_bias) at `grad_y` (B,D,L), None where the input is None.

    mamba-ssm's forward runs a second time, for the states that its backward kernel wants: its own autograd function is
    called, which is the same in all its versions, and only the scan's inputs are kept between the passes.
    """
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    with torch.enable_grad():
        # Nothing may stand between: inside an operator only autograd functions are recorded, torch's own calls are not
        y = _selective_scan_fn()(*leaves, delta_softplus)
    gradients = iter(torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], grad_y))
    return tuple(None if leaf is None else next(gradients).contiguous() for leaf in leaves)


def convolves(x: Tensor, n_taps: int) -> bool:
    """Whether `causal_convolution` serves `x` (B,D,L) and a kernel of `n_taps`.

    Without causal-conv1d the answer is no, after one logged warning.
    """
    fits = x.is_cuda and x.dtype != torch.float64 and x.numel() > 0 and n_taps in _CONVOLUTION_TAPS
    return fits and _causal_conv1d_fn() is not None


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """silu of the causal depthwise convolution, differentiable: y[t] = silu(bias + sum_k weight[k] x[t - K + 1 + k]).

    `x` (B,D,L) float32, float16 or bfloat16; `weight` (D,K); `bias` (D,). Returns (B,D,L) in the type of `x`. Ask
    `convolves` first.
    """
    # contiguous: the kernel's channels-last path wants strides in multiples of 8, and the scan reads along L anyway
    return _causal_conv1d_fn()(x.contiguous(), weight, bias, activation="silu")


@lru_cache(maxsize=1)
def _selective_scan_fn() -> Callable[..., Tensor] | None:
    if os.environ.get("AUM_NO_KERNEL") == "1":
        return None
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except (ImportError, OSError, RuntimeError) as problem:  # not installed, or built for another torch or CUDA
        _log.warning(
            "mamba-ssm cannot be imported (%s): on the GPU the scan is a loop in torch, many times slower. %s",
            problem,
            _HOW,
        )
        return None
    return selective_scan_fn


@lru_cache(maxsize=1)
def _causal_conv1d_fn() -> Callable[..., Tensor] | None:
    if os.environ.get("AUM_NO_KERNEL") == "1":
        return None
    try:
        from causal_conv1d import causal_conv1d_fn
    except (ImportError, OSError, RuntimeError) as problem:
        _log.warning(
            "causal-conv1d cannot be imported (%s): on the GPU the causal convolution is torch's own, slower. %s",
            problem,
            _HOW,
        )
        return None
    return causal_conv1d_fn
