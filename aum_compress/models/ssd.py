"""State space duality: a Mamba-2 scan as products of matrices, one decay a head.

Letters of DESIGN section 2, and `H` heads of `P` channels each (D = H*P). Over a whole sequence the scan is
y = (G * C B^T) x with G[i, j] = exp(-|s_i - s_j|), s the running sum of dt*A (Dao and Gu 2024, "Transformers are SSMs",
section 5: the quadratic form). Costs L*L*(N + D) MACs a sequence and no steps, which for the short sequences of a
student is less than any loop.
"""

import torch
from torch import Tensor


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, two_way: bool) -> Tensor:
    """Mixes x along the sequence.

    One way: h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t; y_t = C_t . h_t + D x_t, one A and one dt a head.
    Two ways: the same weights read the sequence from both ends, a token's own drive taken once; between tokens i < j
    both directions decay by the step sizes of i+1..j.

    Args:
        x: (B,L,H,P). dt: (B,L,H), positive. A: (H,), negative. B, C: (B,L,N). D: (H,).

    Returns:
        (B,L,H,P), in the dtype of `x`; the decays are computed in float32 under any autocast, their exponents summed in
        float64.
    """
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    parts = (t.to(work) for t in (x, dt, A, B, C, D))
    # the operator stands for one node in traces and exports; training goes through its autograd
    mix = _mix if torch.is_grad_enabled() else _mix_node
    return mix(*parts, two_way).to(x.dtype)


def ssd_oracle(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, two_way: bool) -> Tensor:
    """The definition as a plain loop; shapes of `ssd`. Only tests call it."""
    y = D[:, None] * x + _loop(x, dt, dt, A, B, C)
    if not two_way:
        return y
    ahead = torch.cat([dt[:, 1:], torch.zeros_like(dt[:, :1])], dim=1)  # from t+1 to t the step is that of t+1
    back = _loop(*(t.flip(1) for t in (x, dt, ahead)), A, B.flip(1), C.flip(1)).flip(1)
    own = dt[..., None] * x * (B * C).sum(-1)[:, :, None, None]
    return y + back - own


def _loop(x: Tensor, dt: Tensor, decay_dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1])
    outputs = []
    for t in range(x.shape[1]):
        drive = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, None, None, :]
        state = torch.exp(decay_dt[:, t] * A)[..., None, None] * state + drive
        outputs.append((state * C[:, t, None, None, :]).sum(-1))
    return torch.stack(outputs, dim=1)


def _mix(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, two_way: bool) -> Tensor:
    # in float64: behind large steps, small ones would be the rounding of a difference of large sums
    sums = torch.cumsum((dt * A).double(), dim=1).transpose(1, 2)  # (B,H,L)
    # of a difference, never exp(s_i) * exp(-s_j), which overflows for ordinary step sizes
    decays = torch.exp(-(sums[..., :, None] - sums[..., None, :]).abs().to(x.dtype))
    if not two_way:
        decays = decays.tril()
    weights = decays * (C @ B.transpose(1, 2))[:, None]
    driven = (x * dt[..., None]).transpose(1, 2)  # (B,H,L,P)
    return (weights @ driven).transpose(1, 2) + D[:, None] * x


@torch.library.custom_op("aum_compress::ssd", mutates_args=())
def _mix_node(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, two_way: bool) -> Tensor:
    return _mix(x, dt, A, B, C, D, two_way).contiguous()


@_mix_node.register_fake
def _(x, dt, A, B, C, D, two_way):
    return torch.empty_like(x, memory_format=torch.contiguous_format)
