"""The Mamba-2 mixer: one decay a head, the sequence mixed by products of matrices."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aum_compress.models.config import Mamba2BlockConfig
from aum_compress.models.mamba import drawn_step_bias
from aum_compress.models.norm import RMSNorm
from aum_compress.models.ssd import ssd

A_MIN, A_MAX = 1.0, 16.0
"""Range of the initial decay rates, as in the authors' code."""


class Mamba2Mixer(nn.Module):
    """(B,L,M) -> (B,L,M).

    Source: `Mamba2` in state-spaces/mamba, modules/mamba2.py, with one group of B and C; parameters are named as there.
    Two ways, its convolution is centred and both directions share all weights.
    """

    def __init__(self, d_model: int, config: Mamba2BlockConfig, length: int) -> None:
        super().__init__()
        self.config = config
        d_inner, heads = config.d_inner, config.n_heads
        mixed = d_inner + 2 * config.d_state
        self.in_proj = nn.Linear(d_model, d_inner + mixed + heads, bias=False)
        self.conv1d = nn.Conv1d(mixed, mixed, config.d_conv, groups=mixed)
        self.dt_bias = nn.Parameter(drawn_step_bias(heads, length))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(A_MIN, A_MAX).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(d_inner)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        config = self.config
        d_inner, d_state = config.d_inner, config.d_state
        z, xbc, dt = self.in_proj(tokens).split([d_inner, d_inner + 2 * d_state, config.n_heads], dim=-1)
        before = (config.d_conv - 1) // 2 if config.two_way else config.d_conv - 1
        xbc = F.silu(self.conv1d(F.pad(xbc.transpose(1, 2), (before, config.d_conv - 1 - before)))).transpose(1, 2)
        x, b, c = xbc.split([d_inner, d_state, d_state], dim=-1)
        steps = F.softplus(dt + self.dt_bias)
        heads = x.unflatten(2, (config.n_heads, config.head_dim))
        y = ssd(heads, steps, -torch.exp(self.A_log.float()), b, c, self.D.float(), config.two_way).flatten(2)
        return self.out_proj(self.norm(y * F.silu(z)))
