"""The scan as a loop over time on time-major tensors, with its own backward: any device, any float type.

Per-step indexing of one (B,D,L,N) tensor would make autograd's backward quadratic in L, because every select writes a
full zero tensor. Here each step touches one contiguous (B,D,N) slab, and the backward recomputes exp(dt A) instead of
keeping it: one (L,B,D,N) tensor lives in the forward, two in the backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Optional = Tensor | None


def _step_sizes(delta: Tensor, delta_bias: Optional, delta_softplus: bool) -> tuple[Tensor, Tensor]:
    raw = delta if delta_bias is None else delta + delta_bias[:, None]
    return raw, F.softplus(raw) if delta_softplus else raw


def _states(u: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """All states h_t, (L,B,D,N)."""
    states = torch.einsum("bdl,bnl->lbdn", dt * u, B).contiguous()
    dt_major = dt.permute(2, 0, 1)
    for t in range(1, states.shape[0]):
        states[t].addcmul_(torch.exp(dt_major[t].unsqueeze(-1) * A), states[t - 1])
    return states


def scan_loop_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional,
    z: Optional,
    delta_bias: Optional,
    delta_softplus: bool,
) -> Tensor:
    """y (B,D,L); arguments as in `models.scan.selective_scan`."""
    _, dt = _step_sizes(delta, delta_bias, delta_softplus)
    y = torch.einsum("lbdn,bnl->bdl", _states(u, dt, A, B), C)
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * F.silu(z)
    return y.contiguous()


def scan_loop_backward(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional,
    z: Optional,
    delta_bias: Optional,
    delta_softplus: bool,
) -> tuple[Optional, ...]:
    """Gradients of (u, delta, A, B, C, D, z, delta_bias), None where the input is None; shapes as in the forward."""
    raw, dt = _step_sizes(delta, delta_bias, delta_softplus)
    states = _states(u, dt, A, B)

    grad_z = None
    if z is not None:
        y = torch.einsum("lbdn,bnl->bdl", states, C)
        if D is not None:
            y = y + D[:, None] * u
        gate = torch.sigmoid(z)
        grad_z = grad * y * gate * (1 + z * (1 - gate))
        grad = grad * z * gate
    grad_D = None if D is None else (grad * u).sum((0, 2))
    grad_u = torch.zeros_like(u) if D is None else grad * D[:, None]
    grad_C = torch.einsum("bdl,lbdn->bnl", grad, states)

    # adjoint of the recurrence: g_t = C_t dy_t + exp(dt_{t+1} A) g_{t+1}
    adjoint = torch.einsum("bdl,bnl->lbdn", grad, C).contiguous()
    dt_major = dt.permute(2, 0, 1)
    grad_A = torch.zeros_like(A)
    grad_dt = torch.zeros_like(dt)
    for t in range(states.shape[0] - 1, 0, -1):
        decay = torch.exp(dt_major[t].unsqueeze(-1) * A)
        carried = decay * adjoint[t]
        through = carried * states[t - 1]  # d/d(dt_t A)
        grad_A += (through * dt_major[t].unsqueeze(-1)).sum(0)
        grad_dt[:, :, t] += (through * A).sum(-1)
        adjoint[t - 1] += carried

    drive = torch.einsum("lbdn,bnl->bdl", adjoint, B)
    grad_B = torch.einsum("lbdn,bdl->bnl", adjoint, dt * u)
    grad_u = grad_u + drive * dt
    grad_dt = grad_dt + drive * u
    grad_delta = grad_dt * torch.sigmoid(raw) if delta_softplus else grad_dt
    grad_bias = None if delta_bias is None else grad_delta.sum((0, 2))
    gradients = (grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias)
    return tuple(None if g is None else g.contiguous() for g in gradients)
