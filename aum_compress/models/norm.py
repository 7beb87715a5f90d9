"""The normalisation of all Mamba blocks."""

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
        if torch.is_grad_enabled():
            return _Normalise.apply(wide, self.weight, self.eps)
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class _Normalise(torch.autograd.Function):
    """The same for training: half as many passes over memory as autograd's own backward takes."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        normal = x * inverse
        ctx.save_for_backward(normal, inverse, weight)
        return normal * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normal, inverse, weight = ctx.saved_tensors
        product = grad * normal
        along = (product @ weight).unsqueeze(-1) / weight.numel()  # mean of weight * grad * normal
        dx = torch.addcmul(grad * weight, normal, along, value=-1).mul_(inverse)
        return dx, product.flatten(0, -2).sum(0), None
