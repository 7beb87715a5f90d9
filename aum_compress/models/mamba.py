"""The Mamba-1 mixer of Vim and AuM, one way and both ways; parameters are named as in published checkpoints."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aum_compress.kernels import cuda
from aum_compress.models import scan, short_conv
from aum_compress.models.config import BlockConfig
from aum_compress.models.quantized import ActivationSlot

# the range that Mamba draws its initial step sizes from (Gu and Dao 2023, section 3.6), for sequences of hundreds
DT_MIN, DT_MAX = 1e-3, 1e-1
SHORT_SEQUENCE = 64
FORWARD, BACKWARD = "", "_b"
SCAN_SLOTS = ("u", "B", "C", "delta")
"""What may be quantised before it enters the scan; delta is what softplus makes a step size of."""


def drawn_step_bias(count: int, length: int) -> Tensor:
    """(count,) biases that softplus turns into step sizes, log-uniform over Mamba's range.

    A step size of dt remembers about 1/dt tokens. Over a short sequence, Mamba's own would remember all of it and add
    next to nothing at each token, so the scan would start as a bystander: from 1/(2L) to 1 then.
    """
    low, high = (DT_MIN, DT_MAX) if length > SHORT_SEQUENCE else (1 / (2 * length), 1.0)
    dt = torch.exp(torch.rand(count) * (math.log(high) - math.log(low)) + math.log(low))
    return dt + torch.log(-torch.expm1(-dt))


class MambaMixer(nn.Module):
    """(B,L,M) -> (B,L,M). One input and output projection; between them what `config.block_type` says. The step sizes
    start for sequences of `length`.

    Source: `Mamba.forward` with `bimamba_type` "none", "v1" and "v2" (`if_devide_out=True`, which halves v2 alone) and
    `BiMambaInnerFn` in AuM's vim-mamba_ssm. All projections are called as modules, so that quantisation and hooks reach
    them; so is the convolution, but for float training on a GPU with causal-conv1d.
    """

    def __init__(self, d_model: int, config: BlockConfig, length: int) -> None:
        super().__init__()
        self.config = config
        d_inner = config.d_inner
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        for suffix in config.projections:
            self._add_projections(suffix, config, length)
        rates = torch.arange(1, config.d_state + 1, dtype=torch.float32).repeat(d_inner, 1)
        for suffix in config.scans:
            setattr(self, f"A{suffix}_log", nn.Parameter(rates.log()))

    def _add_projections(self, suffix: str, config: BlockConfig, length: int) -> None:
        d_inner, d_state, dt_rank = config.d_inner, config.d_state, config.dt_rank
        convolution = nn.Conv1d(d_inner, d_inner, config.d_conv, groups=d_inner)
        dt_proj = nn.Linear(dt_rank, d_inner)
        nn.init.uniform_(dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
        with torch.no_grad():  # the bias alone gives the drawn step size
            dt_proj.bias.copy_(drawn_step_bias(d_inner, length))
        setattr(self, f"conv1d{suffix}", convolution)
        setattr(self, f"x_proj{suffix}", nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False))
        setattr(self, f"dt_proj{suffix}", dt_proj)
        setattr(self, f"D{suffix}", nn.Parameter(torch.ones(d_inner)))
        for name in SCAN_SLOTS:
            setattr(self, f"scan_{name}{suffix}", ActivationSlot())

    def forward(self, tokens: Tensor) -> Tensor:
        x, z = (half.transpose(1, 2) for half in self.in_proj(tokens).chunk(2, dim=-1))  # (B,D,L) each
        if self.config.block_type == "v2":
            y = self._two_ways(x, z) * 0.5
        else:
            u, delta, b, c = self.scan_inputs(x, FORWARD)
            if self.config.block_type == "v1":  # the convolution has been causal: only what it gave is turned round
                y = scan.two_way_scan(u, delta, self._rates(FORWARD), b, c, self.D.float(), z, self._rates(BACKWARD))
            else:
                y = self._scan(u, delta, b, c, z, FORWARD)
        return self.out_proj(y.transpose(1, 2))

    def _two_ways(self, x: Tensor, z: Tensor) -> Tensor:
        u, delta, b, c = self.scan_inputs(x, FORWARD)
        u_back, delta_back, b_back, c_back = self.scan_inputs(x.flip(-1), BACKWARD)
        back = (u_back, delta_back, b_back, c_back, self.D_b.float())
        return scan.two_way_scan(u, delta, self._rates(FORWARD), b, c, self.D.float(), z, self._rates(BACKWARD), back)

    def scan_inputs(self, x: Tensor, suffix: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of x (B,D,L): u and delta (B,D,L), B and C (B,N,L)."""
        config = self.config
        slot = {name: getattr(self, f"scan_{name}{suffix}") for name in SCAN_SLOTS}
        u = slot["u"](self._convolve(x, getattr(self, f"conv1d{suffix}")).transpose(1, 2))
        projected = getattr(self, f"x_proj{suffix}")(u)
        dt, b, c = projected.split([config.dt_rank, config.d_state, config.d_state], dim=-1)
        delta = slot["delta"](getattr(self, f"dt_proj{suffix}")(dt)).transpose(1, 2)
        return u.transpose(1, 2), delta, slot["B"](b).transpose(1, 2), slot["C"](c).transpose(1, 2)

    def _convolve(self, x: Tensor, convolution: nn.Module) -> Tensor:
        # the hooks of calibration, outside training, and modules that round weights or inputs have to be reached
        if self.training and isinstance(convolution, nn.Conv1d) and cuda.convolves(x, self.config.d_conv):
            return cuda.causal_convolution(x, convolution.weight.squeeze(1), convolution.bias)
        if self.training and short_conv.convolves(x, convolution):
            tokens = short_conv.causal_convolution(x.transpose(1, 2), convolution.weight, convolution.bias)
            return F.silu(tokens).transpose(1, 2)
        return F.silu(convolution(F.pad(x, (self.config.d_conv - 1, 0))))

    def _rates(self, suffix: str) -> Tensor:
        """A (D,N), negative."""
        return -torch.exp(getattr(self, f"A{suffix}_log").float())

    def _scan(self, u: Tensor, delta: Tensor, b: Tensor, c: Tensor, z: Tensor, suffix: str) -> Tensor:
        skip = getattr(self, f"D{suffix}").float()
        return scan.selective_scan(u, delta, self._rates(suffix), b, c, skip, z, delta_softplus=True)
