"""The fused CPU scan on torch tensors. Callers ask `kernels.build.library()` first whether there is one."""

import ctypes

import torch
from torch import Tensor

from aum_compress.errors import AumError
from aum_compress.kernels.build import library

_FLOATS = ctypes.c_void_p


class _Scan(ctypes.Structure):
    """`struct scan` of scan.c, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "channels", "length", "state", "softplus", "threads")),
        *((name, ctypes.c_int64) for name in ("from_end", "add", "by_token")),
        *((name, _FLOATS) for name in ("u", "delta", "A", "B", "C", "D", "z", "bias")),
        *((name, _FLOATS) for name in ("scratch", "y", "grad_y")),
        *((name, _FLOATS) for name in ("du", "ddelta", "dz", "dA", "dB", "dC", "dD", "dbias")),
    ]


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
    """The selective scan of mamba-ssm's `selective_scan_ref` in one pass, without a (B, L, D, N) tensor.

    `u`, `delta`, `z` (B,D,L); `A` (D,N); `B`, `C` (B,N,L); `D`, `delta_bias` (D); float32 on the CPU, any strides.
    Returns y (B,D,L), the same bits on any number of threads (there are `torch.get_num_threads()`, and the interpreter
    lock is released). Raises AumError for another shape, type or device, and where there is no kernel.
    """
    inputs = _checked(u, delta, A, B, C, D, z, delta_bias)
    y = torch.empty_like(inputs["u"])
    _call(inputs, {"y": y}, delta_softplus)
    return y


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (du, ddelta, dA, dB, dC, dD, dz, ddelta_bias) at `grad_y` (B,D,L); None for an input that is None.

    Inputs and errors as for `scan_forward`; each gradient has its input's shape. The states are computed again, chunk
    by chunk, from one saved state in eight. The same inputs give the same bits, on any number of threads.
    """
    inputs = _checked(u, delta, A, B, C, D, z, delta_bias, grad_y=grad_y)
    out = _gradients(inputs)
    _call(inputs, out, delta_softplus)
    total = {name: None if out[name] is None else out[name].sum(0) for name in ("dA", "dB", "dC", "dD", "dbias")}
    return out["du"], out["ddelta"], total["dA"], total["dB"], total["dC"], total["dD"], out["dz"], total["dbias"]


def two_way_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, A_back: Tensor
) -> Tensor:
    """Two scans with softplus, skip and gate that read the same from both ends, added: y (B,D,L).

    `A`, `A_back` (D,N): of the scan that begins at the first and at the last token; the others, and errors, as for
    `scan_forward`. Nothing is turned round in memory, and where the channels of `u` lie side by side, as projections
    make them, what is returned lies so too and nothing is transposed.
    """
    forward = _checked(u, delta, A, B, C, D, z, None, by_token=_is_by_token(u))
    y = torch.empty_like(forward["u"])
    for inputs, second in ((forward, False), (forward | _checked_rates(A_back, A), True)):
        _call(inputs, {"y": y}, True, from_end=second, add=second)
    return y


def two_way_backward(
    grad_y: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, A_back: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients (du, ddelta, dA, dB, dC, dD, dz, dA_back) of `two_way_forward` at `grad_y` (B,D,L)."""
    forward = _checked(u, delta, A, B, C, D, z, None, by_token=_is_by_token(u), grad_y=grad_y)
    back = forward | _checked_rates(A_back, A)
    out = _gradients(forward)
    _call(forward, out, True)
    out_back = out | {"dA": torch.empty_like(out["dA"])}
    _call(back, out_back, True, from_end=True, add=True)
    dA, dB, dC, dD = (out[name].sum(0) for name in ("dA", "dB", "dC", "dD"))
    return out["du"], out["ddelta"], dA, dB, dC, dD, out["dz"], out_back["dA"].sum(0)


def _gradients(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Room for them. The kernel leaves sums over tasks to its caller, whose order is fixed."""
    u, A, B = inputs["u"], inputs["A"], inputs["B"]
    batch, channels, _ = u.shape
    groups = _kernel().aum_scan_groups(channels)

    def like_B() -> Tensor:
        state, length = B.shape[1:]
        if _is_by_token(u):
            return u.new_empty(groups, batch, length, state).transpose(2, 3)
        return u.new_empty(groups, batch, state, length)

    return {
        "du": torch.empty_like(u),  # and laid out like it
        "ddelta": torch.empty_like(u),
        "dA": u.new_empty(batch, *A.shape),
        "dB": like_B(),
        "dC": like_B(),
        "dD": None if inputs["D"] is None else u.new_empty(batch, channels),
        "dz": None if inputs["z"] is None else torch.empty_like(u),
        "dbias": None if inputs["bias"] is None else u.new_empty(batch, channels),
    }


def _checked_rates(A_back: Tensor, A: Tensor) -> dict[str, Tensor]:
    if (A_back.shape, A_back.dtype, A_back.device) != (A.shape, A.dtype, A.device):
        raise AumError(
            f"two-way scan: A_back is {tuple(A_back.shape)} {A_back.dtype} on {A_back.device}, wanted what A is: "
            f"{tuple(A.shape)} {A.dtype} on {A.device}"
        )
    return {"A": A_back.contiguous()}


def _kernel() -> ctypes.CDLL:
    lib = library()
    if lib is None:
        raise AumError("the fused CPU scan is not available here: ask kernels.build.library() before calling it")
    return lib


def _checked(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    by_token: bool = False,
    **grad_y: Tensor,
) -> dict[str, Tensor | None]:
    """Inputs by their name in `struct scan`: contiguous, or `by_token`, (B,D,L) and (B,N,L) lying as (B,L,D), (B,L,N).

    C reads raw memory, so nothing of another shape may pass.
    """
    if u.dim() != 3 or A.dim() != 2:
        raise AumError(f"selective scan: u is {tuple(u.shape)} and A {tuple(A.shape)}, wanted (B,D,L) and (D,N)")
    batch, channels, length = u.shape
    state = A.shape[1]
    rows, per_state = (batch, channels, length), (batch, state, length)
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "bias": delta_bias, **grad_y}
    wanted = {
        **dict.fromkeys(("u", "delta", "z", "grad_y"), rows),
        **dict.fromkeys(("B", "C"), per_state),
        **dict.fromkeys(("D", "bias"), (channels,)),
        "A": (channels, state),
    }
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != wanted[name]:
            raise AumError(
                f"selective scan: {name} has shape {tuple(tensor.shape)}, wanted {wanted[name]} beside "
                f"u {rows} (B,D,L) and A {(channels, state)} (D,N)"
            )
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise AumError(f"selective scan: {name} is {tensor.dtype} on {tensor.device}, wanted torch.float32 on cpu")
    return {name: None if tensor is None else _laid_out(tensor, by_token) for name, tensor in tensors.items()}


def _is_by_token(u: Tensor) -> bool:
    return u.dim() == 3 and not u.is_contiguous() and u.transpose(1, 2).is_contiguous()


def _laid_out(tensor: Tensor, by_token: bool) -> Tensor:
    if by_token and tensor.dim() == 3:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor.contiguous()


def _call(
    inputs: dict[str, Tensor | None],
    outputs: dict[str, Tensor | None],
    delta_softplus: bool,
    *,
    from_end: bool = False,
    add: bool = False,
) -> None:
    lib = _kernel()
    batch, channels, length = inputs["u"].shape
    state = inputs["A"].shape[1]
    backward = "grad_y" in inputs
    tasks = batch * lib.aum_scan_groups(channels)
    threads = max(1, min(torch.get_num_threads(), tasks))
    # Scratch comes from torch, aligned to 64 bytes: running out of memory is torch's ordinary error and C cannot fail.
    scratch = torch.empty(threads * lib.aum_scan_scratch(length, state, backward), dtype=torch.float32)
    arrays = {**inputs, **outputs, "scratch": scratch}
    scan = _Scan(batch, channels, length, state, delta_softplus, threads, from_end, add, _is_by_token(inputs["u"]))
    for name, tensor in arrays.items():
        setattr(scan, name, None if tensor is None else tensor.data_ptr())
    (lib.aum_scan_backward if backward else lib.aum_scan_forward)(ctypes.byref(scan))
