"""The causal depthwise convolution of Mamba blocks, for training on a CPU.

torch's own runs along (B,D,L) and has a slow backward for few taps. This one works on tokens as projections make them,
(B,L,D), one pass for each tap over runs of D values, so that nothing is transposed on the way to the scan.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_TAPS = 8
"""From here on torch's convolution is as fast."""


def convolves(x: Tensor, convolution: nn.Module) -> bool:
    """Whether `causal_convolution` is the one to take: for training, on a CPU, in single precision."""
    if not isinstance(convolution, nn.Conv1d) or not torch.is_grad_enabled() or x.device.type != "cpu":
        return False
    taps, weight = convolution.kernel_size[0], convolution.weight
    return x.dtype == weight.dtype == torch.float32 and taps <= MOST_TAPS and convolution.groups == weight.shape[0]


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Of tokens x (B,L,D) with weight (D,1,K) and bias (D): (B,L,D), contiguous; token l sees l-K+1 to l."""
    return _CausalConvolution.apply(x, weight.squeeze(1), bias)


class _CausalConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        length, taps = x.shape[1], weight.shape[1]
        padded = F.pad(x, (0, 0, taps - 1, 0))
        ctx.save_for_backward(padded, weight)
        y = torch.addcmul(bias, padded[:, :length], weight[:, 0])
        for k in range(1, taps):
            y.addcmul_(padded[:, k : k + length], weight[:, k])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        padded, weight = ctx.saved_tensors
        length, taps = grad.shape[1], weight.shape[1]
        into = torch.zeros_like(padded)
        at_weight = torch.empty_like(weight)
        for k in range(taps):
            into[:, k : k + length].addcmul_(grad, weight[:, k])
            at_weight[:, k] = (grad * padded[:, k : k + length]).flatten(0, 1).sum(0)
        return into[:, taps - 1 :], at_weight, grad.flatten(0, 1).sum(0)
