"""Normalisations: of tokens in all Mamba blocks, and of what a model reads."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32. Unlike nn.RMSNorm it stores no shape to go stale."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class RelaxedFrequencyNorm(nn.Module):
    """(B,1,F,T): the mean of a spectrogram and the same with each mel bin normalised over its own time.

    A microphone adds a constant to each mel bin of a log-mel; normalising takes all of it away, and with it what tells
    steady sounds apart. Half of each keeps both. Source: relaxed instance frequency-wise normalisation (Kim et al.
    2022), lambda 0.5, with the globally normalised features in place of their layer norm.
    """

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(3, keepdim=True)
        scale = torch.rsqrt(centred.square().mean(3, keepdim=True) + 1e-5)
        return 0.5 * (x + centred * scale)
