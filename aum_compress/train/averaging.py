"""Exponential moving average of a model's weights and batch statistics along a training run."""

import torch
from torch import nn


def decay_at(step: int, decay: float) -> float:
    """Of the average after optimiser step `step` (from 0): at most `decay`, less while there is little to average.

    (1 + k) / (10 + k) is the warm-up of TensorFlow's `ExponentialMovingAverage`: without it, the first weights, which
    are random, would weigh for 1 / (1 - decay) steps.
    """
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def average_into(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    """averaged = decay * averaged + (1 - decay) * model, for parameters and buffers; counters are copied."""
    # by state: training may have replaced modules in both, and moved their tensors to a GPU
    kept, latest = averaged.state_dict(), model.state_dict()
    floats = [name for name, tensor in kept.items() if tensor.is_floating_point()]
    torch._foreach_lerp_([kept[name] for name in floats], [latest[name] for name in floats], 1 - decay)
    for name in kept.keys() - set(floats):
        kept[name].copy_(latest[name])
