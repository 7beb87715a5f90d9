"""The mixer without a scan, to measure scans against."""

import torch.nn.functional as F
from torch import Tensor, nn

from aum_compress.models.config import ConvBlockConfig


class GatedConvMixer(nn.Module):
    """(B,L,M) -> (B,L,M): a Mamba mixer whose scan is left out and whose depthwise convolution is as long as wanted.

    `length` is there because every mixer is told; a convolution starts alike for all.
    """

    def __init__(self, d_model: int, config: ConvBlockConfig, length: int) -> None:
        super().__init__()
        self.config = config
        d_inner = config.d_inner
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, config.d_conv, groups=d_inner)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x, z = self.in_proj(tokens).chunk(2, dim=-1)  # (B,L,D) each
        before = (self.config.d_conv - 1) // 2
        u = F.silu(self.conv1d(F.pad(x.transpose(1, 2), (before, self.config.d_conv - 1 - before))))
        return self.out_proj(u.transpose(1, 2) * F.silu(z))
