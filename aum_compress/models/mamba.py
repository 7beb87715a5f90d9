"""The bidirectional Mamba block of Vim ("v2", AuM's "Bi-Bi"); parameters are named as in published checkpoints."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aum_compress.models.config import BlockConfig
from aum_compress.models.scan import selective_scan

# the range that Mamba draws its initial step sizes from (Gu and Dao 2023, section 3.6)
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4
FORWARD, BACKWARD = "", "_b"


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32. Unlike nn.RMSNorm it stores no shape to go stale."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class MambaMixer(nn.Module):
    """(B,L,M) -> (B,L,M). One input and output projection; convolution, x_proj, dt_proj, A and D for each direction.

    Source: `Mamba.forward` with `bimamba_type="v2"`, `if_devide_out=True` in AuM's vim-mamba_ssm. All projections are
    called as modules, so that quantisation and hooks reach them.
    """

    def __init__(self, d_model: int, config: BlockConfig) -> None:
        super().__init__()
        self.config = config
        d_inner = config.d_inner
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        for suffix in self.suffixes:
            self._add_direction(suffix, config)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Name suffix of each direction's parameters."""
        return (FORWARD, BACKWARD)[: self.config.directions]

    def _add_direction(self, suffix: str, config: BlockConfig) -> None:
        d_inner, d_state, dt_rank = config.d_inner, config.d_state, config.dt_rank
        convolution = nn.Conv1d(d_inner, d_inner, config.d_conv, groups=d_inner)
        dt_proj = nn.Linear(dt_rank, d_inner)
        nn.init.uniform_(dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
        dt = torch.exp(torch.rand(d_inner) * (math.log(DT_MAX) - math.log(DT_MIN)) + math.log(DT_MIN)).clamp(DT_FLOOR)
        with torch.no_grad():  # inverse softplus: the bias alone gives the drawn step size
            dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        setattr(self, f"conv1d{suffix}", convolution)
        setattr(self, f"x_proj{suffix}", nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False))
        setattr(self, f"dt_proj{suffix}", dt_proj)
        rates = torch.arange(1, d_state + 1, dtype=torch.float32).repeat(d_inner, 1)
        setattr(self, f"A{suffix}_log", nn.Parameter(rates.log()))
        setattr(self, f"D{suffix}", nn.Parameter(torch.ones(d_inner)))

    def forward(self, tokens: Tensor) -> Tensor:
        x, z = self.in_proj(tokens).transpose(1, 2).chunk(2, dim=1)  # (B,D,L) each
        y = self.scan_direction(x, z, FORWARD)
        if self.config.directions == 2:
            backward = self.scan_direction(x.flip(-1), z.flip(-1), BACKWARD)
            y = (y + backward.flip(-1)) * 0.5
        return self.out_proj(y.transpose(1, 2))

    def scan_direction(self, x: Tensor, z: Tensor, suffix: str) -> Tensor:
        """Causal convolution, input-dependent parameters and gated scan of one direction; all (B,D,L)."""
        config = self.config
        x = F.silu(getattr(self, f"conv1d{suffix}")(F.pad(x, (config.d_conv - 1, 0))))
        projected = getattr(self, f"x_proj{suffix}")(x.transpose(1, 2))
        dt, b, c = projected.split([config.dt_rank, config.d_state, config.d_state], dim=-1)
        delta = getattr(self, f"dt_proj{suffix}")(dt).transpose(1, 2)
        A = -torch.exp(getattr(self, f"A{suffix}_log").float())
        D = getattr(self, f"D{suffix}").float()
        return selective_scan(x, delta, A, b.transpose(1, 2), c.transpose(1, 2), D, z, delta_softplus=True)


class MambaBlock(nn.Module):
    """Pre-norm residual block: tokens + mixer(norm(tokens)), the residual stream kept in float32."""

    def __init__(self, d_model: int, config: BlockConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.mixer = MambaMixer(d_model, config)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.mixer(self.norm(tokens))
