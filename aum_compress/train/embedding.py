"""What a model makes of a clip before its head decides: the embedding that distillation's feature term compares."""

import torch
from torch import Tensor, nn


class HeadInput:
    """Notes, at each forward pass of `model`, what enters its `head`, pooled over mel and time: `value` (B,E)."""

    def __init__(self, model: nn.Module) -> None:
        self.value: Tensor | None = None
        self._handle = model.head.register_forward_pre_hook(self._note)

    def _note(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        # CP-Mobile's head is a convolution, one with batch normalisation reads each token: both are pooled behind it
        self.value = x.mean((2, 3)) if x.dim() == 4 else x.mean(1) if x.dim() == 3 else x

    def remove(self) -> None:
        self._handle.remove()


def embedding_width(model: nn.Module) -> int:
    """E of `model`, which keeps its mode and its batch statistics."""
    seen, training = HeadInput(model), model.training
    place = next(model.parameters())
    try:
        with torch.no_grad():
            model.eval()(place.new_zeros(1, 1, model.config.n_mels, model.config.n_frames))
    finally:
        seen.remove()
        model.train(training)
    return seen.value.shape[1]
