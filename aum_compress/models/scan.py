"""The selective scan, the one seam of DESIGN section 4.

Glossary: `B` batch, `L` tokens, `D` d_inner, `N` d_state. `u` the scan's input, `delta` the input-dependent step size,
`A` the (negative) state matrix's diagonal, `B` and `C` the input and output maps, `D` the skip weight, `z` the gate.

`selective_scan` is a `torch.library` operator, so that tracing, MAC counting and export see one node.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from aum_compress.kernels import build, cpu, cuda
from aum_compress.models.scan_loop import scan_loop_backward, scan_loop_forward


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Mamba-1 selective scan; signature and shapes of mamba-ssm's `selective_scan_fn`.

    With dt = softplus(delta + delta_bias) where asked for:
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t;  y_t = C_t . h_t + D u_t;  y is gated by silu(z).
    (Gu and Dao 2023, "Mamba", section 3; B is discretised by Euler's rule, as in the authors' code.)

    Args:
        u, delta, z: (B,D,L). A: (D,N), negative. B, C: (B,N,L). D, delta_bias: (D,).
        delta_softplus: pass delta through softplus, after the bias.

    Returns:
        (B,D,L), in the dtype of `u`. The recurrence runs in float32 (float64 for float64 input) under any autocast;
        mamba-ssm's kernels read half precision as it is, which halves what is kept for the backward.
    """
    work = torch.float64 if u.dtype == torch.float64 else torch.float32
    by_token = u.dtype if cuda.scans(u, A) else work

    def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    parts = (*(cast(t, by_token) for t in (u, delta)), cast(A, work), *(cast(t, by_token) for t in (B, C)))
    y = _scan(*parts, cast(D, work), cast(z, by_token), cast(delta_bias, work), delta_softplus)
    return y.to(u.dtype)


def two_way_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    A_back: Tensor,
    back: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """The sequence scanned from both ends, each scan with softplus, skip and gate as in `selective_scan`, and added.

    Args:
        u, delta, A, B, C, D, z: of `selective_scan`, for the direction that begins at the first token.
        A_back: (D,N), of the direction that begins at the last one.
        back: u, delta, B, C and D of that direction, its tokens in the order in which it reads them; when left out,
            both directions read the same (AuM's Fo-Bi).

    Returns:
        (B,D,L), in the order of `u`.
    """
    parts = (u, delta, A, B, C, D, z, A_back, *(back or (None,) * 5))
    # the operator stands for one node in traces and exports; what the fused kernel has no backward for goes through the
    # autograd of the two scans
    return _both_ways(*parts) if torch.is_grad_enabled() and not _is_fused(*parts) else _two_way_node(*parts)


def _is_fused(*parts: Tensor | None) -> bool:
    """Whether the CPU kernel computes both directions in one: where they read the same."""
    *shared, u_back = parts[:9]
    on_cpu = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in shared)
    return on_cpu and u_back is None and build.library() is not None


def selective_scan_oracle(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False) -> Tensor:
    """The definition as a plain loop; shapes of `selective_scan`. Only tests and verification call it."""
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    dt = F.softplus(delta) if delta_softplus else delta
    state = u.new_zeros(u.shape[0], *A.shape)
    outputs = []
    for t in range(u.shape[2]):
        drive = (dt[:, :, t] * u[:, :, t])[:, :, None] * B[:, None, :, t]
        state = torch.exp(dt[:, :, t, None] * A) * state + drive
        outputs.append((state * C[:, None, :, t]).sum(-1))
    y = torch.stack(outputs, dim=2)
    if D is not None:
        y = y + D[:, None] * u
    return y if z is None else y * F.silu(z)


@torch.library.custom_op("aum_compress::selective_scan", mutates_args=())
def _scan(
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
    forward, _ = _implementation(u, A)
    return forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus)


@torch.library.custom_op("aum_compress::selective_scan_backward", mutates_args=())
def _scan_backward(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    _, backward = _implementation(u, A)
    gradients = backward(grad, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return [g for g in gradients if g is not None]


def _both_ways(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    A_back: Tensor,
    u_back: Tensor | None,
    delta_back: Tensor | None,
    B_back: Tensor | None,
    C_back: Tensor | None,
    D_back: Tensor | None,
) -> Tensor:
    if _is_fused(u, delta, A, B, C, D, z, A_back, u_back):
        return cpu.two_way_forward(u, delta, A, B, C, D, z, A_back)
    y = selective_scan(u, delta, A, B, C, D, z, delta_softplus=True)
    if u_back is None:
        u_back, delta_back, B_back, C_back = (t.flip(-1) for t in (u, delta, B, C))
        D_back = D
    turned = selective_scan(u_back, delta_back, A_back, B_back, C_back, D_back, z.flip(-1), delta_softplus=True)
    return (y + turned.flip(-1)).contiguous()


_two_way_node = torch.library.custom_op("aum_compress::two_way_scan", _both_ways, mutates_args=())


@torch.library.custom_op("aum_compress::two_way_scan_backward", mutates_args=())
def _two_way_backward(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    A_back: Tensor,
) -> list[Tensor]:
    return list(cpu.two_way_backward(grad, u, delta, A, B, C, D, z, A_back))


@_two_way_node.register_fake
def _(u, delta, A, B, C, D, z, A_back, u_back, delta_back, B_back, C_back, D_back):
    return torch.empty_like(u, memory_format=torch.contiguous_format)


def _implementation(u: Tensor, A: Tensor) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor | None, ...]]]:
    """Forward and backward of the same scan for this device and dtype."""
    if cuda.scans(u, A):
        return cuda.scan_forward, cuda.scan_backward
    if u.device.type == "cpu" and u.dtype == torch.float32 and build.library() is not None:
        return cpu.scan_forward, cpu.scan_backward
    return scan_loop_forward, scan_loop_backward


@_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@_scan_backward.register_fake
def _(grad, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    inputs = (u, delta, A, B, C, D, z, delta_bias)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs if t is not None]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.delta_softplus = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor):
    tensors = ctx.saved_tensors
    gradients = iter(_scan_backward(grad.contiguous(), *tensors, ctx.delta_softplus))
    return *(None if t is None else next(gradients) for t in tensors), None


_scan.register_autograd(_backward, setup_context=_setup_context)


@_two_way_backward.register_fake
def _(grad, u, delta, A, B, C, D, z, A_back):
    parts = (u, delta, A, B, C, D, z, A_back)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in parts]


def _two_way_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:8])


def _two_way_gradients(ctx, grad: Tensor):
    return *_two_way_backward(grad.contiguous(), *ctx.saved_tensors), *(None,) * 5


_two_way_node.register_autograd(_two_way_gradients, setup_context=_two_way_context)
