"""Quantisation played in float32: what calibration, quantisation-aware training, sensitivity and the search work on.

In evaluation mode these modules give, to the bit, what the layers of `models.quantized` give that `converted` makes of
them, but for biases, which are rounded to float16 only then. In training, gradients pass the rounding as if it were not
there ("straight through", Bengio et al. 2013), and stop where a value was clipped.
"""

import math

import torch
from torch import Tensor, nn

from aum_compress.models.factory import Model, build_model
from aum_compress.models.quantized import (
    ZERO_POINT_MAX,
    Quantizable,
    QuantizedActivation,
    QuantizedLayer,
    apply_layer,
    by_output,
    dequantize_weight,
    geometry,
    quantize_dequantize,
    round_bias,
    round_to_half_,
    swap_in_quantized,
)
from aum_compress.models.storage import QUANTISED_INPUTS, WEIGHT_BITS, Storage

SAMPLED_VALUES = 50_000
"""Of a tensor, that an estimate of its percentiles reads."""
SAMPLED_IN_TRAINING = 8_000
MOMENTUM = 0.01
"""Weight of a training batch in the moving average of a range; Quamba's observers have the same."""
SMALLEST_STEP = 1e-12
MOST_BIAS_STEPS = 2.0**24
"""Of a bias: whole numbers that float32 holds, and far from int32's end, where kernels make nonsense of it."""
CLIPPED_SHARES = tuple(step / 20 for step in range(8, 21))
"""Of the largest weight, that the scale of 4 bits may end at."""


def value_range(x: Tensor, percentile: float, most: int = SAMPLED_VALUES) -> tuple[Tensor, Tensor]:
    """The range () to () of the middle values of `x`, `percentile` of them below its end and as many above its start.

    Above `most` values, an even sample of them; but 100 means the very extremes. NaN stays NaN.
    """
    values = x.detach().float().flatten()
    if percentile >= 100:
        low, high = values.aminmax()
        return low, high
    step = max(1, len(values) // most)
    while math.gcd(step, len(values)) > 1:  # or some channels would never be in the sample
        step += 1
    ends = values.new_tensor([1 - percentile / 100, percentile / 100])
    low, high = torch.quantile(values[::step], ends)
    return low, high


def uint8_grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale () float32 and zero point () uint8 of the grid over [low, high] and 0, which must be exact for padding."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = ((high - low) / ZERO_POINT_MAX).clamp(min=SMALLEST_STEP)
    return scale, torch.round(-low / scale).clamp(0, ZERO_POINT_MAX).to(torch.uint8)


def weight_scale(weight: Tensor, top: int) -> Tensor:
    """(outputs,) float32 steps for integers in [-top, top], symmetric, one an output of `weight` (outputs, ...).

    The largest weight becomes `top`. With 4 bits that wastes most of the few steps on one outlier, so each output gets
    the clipping with the least squared error.
    """
    rows = weight.detach().float().flatten(1)
    largest = rows.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny * top)
    if top > 7:
        return largest / top
    shares = largest.new_tensor(CLIPPED_SHARES)[:, None]
    scales = largest * shares / top  # (shares, outputs)
    rounded = torch.round(rows / scales[..., None]).clamp(-top, top) * scales[..., None]
    best = (rounded - rows).square().sum(2).argmin(0)
    return scales.gather(0, best[None])[0]


def round_weight(weight: Tensor, scale: Tensor, top: int) -> Tensor:
    """int8 integers in [-top, top]."""
    return torch.round(weight / by_output(scale, weight)).clamp(-top, top).to(torch.int8)


class FakeQuantize(nn.Module):
    """Rounds what passes to uint8 over a range that calibration has set and training keeps up to date."""

    low: Tensor
    high: Tensor

    def __init__(self, percentile: float) -> None:
        super().__init__()
        self.percentile = percentile
        self.active = True
        self.observing = False
        """In training, move the range towards that of each batch."""
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return x
        x = x.float()
        if self.training and self.observing:
            found = value_range(x, self.percentile, SAMPLED_IN_TRAINING)
            for known, new in zip((self.low, self.high), found):
                known.lerp_(new, MOMENTUM)
        scale, zero_point = uint8_grid(self.low, self.high)
        rounded = quantize_dequantize(x.detach(), scale, zero_point)
        if not torch.is_grad_enabled():
            return rounded
        ends = [(end - zero_point.float()) * scale for end in (0, ZERO_POINT_MAX)]
        clipped = x.clamp(*ends)
        return clipped + (rounded - clipped).detach()

    def scale(self) -> Tensor:
        """() float32, of the grid over the present range."""
        return uint8_grid(self.low, self.high)[0]

    def set_range(self, low: Tensor | float, high: Tensor | float) -> None:
        self.low.fill_(low)
        self.high.fill_(high)


class FakeQuantizedLayer(nn.Module):
    """A Linear, Conv1d or Conv2d with weights in float32 that are used rounded; parameters keep their names.

    `top` and `input.active` switch the rounding of weights and of inputs one by one, for sensitivity.
    """

    def __init__(self, layer: Quantizable, storage: Storage, weight_bits: int, percentile: float) -> None:
        """Args: weight_bits: of int8 weights with int8 inputs, 7 or 8."""
        super().__init__()
        self.storage = storage
        self.convolution = geometry(layer)
        self.weight, self.bias = layer.weight, layer.bias
        self.top: int | None = top_of(storage, weight_bits)
        """Largest integer; None leaves weights in float32."""
        self.input = FakeQuantize(percentile) if storage in QUANTISED_INPUTS else None
        self.input_slot: str | None = None
        """Name of the slot that has already rounded what this layer reads, where there is one; `input` is None then."""
        self.input_factor: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.input_factor is not None:
            x = x * self.input_factor
        if self.input is not None:
            x = self.input(x)
        return apply_layer(x, self._rounded_weight(), self._rounded_bias(), self.convolution)

    def integers(self) -> tuple[Tensor, Tensor]:
        """int8 weights and their scale (outputs,); coarse where a channel is next to nothing beside its bias."""
        scale = weight_scale(self.weight, self.top)
        if self._has_bias_steps():
            scale = torch.maximum(scale, self.bias.detach().abs() / (self.input.scale() * MOST_BIAS_STEPS))
        return round_weight(self.weight.detach(), scale, self.top), scale

    def _rounded_weight(self) -> Tensor:
        if self.top is None:
            return self.weight
        integers, scale = self.integers()
        rounded = dequantize_weight(integers, scale)
        if not torch.is_grad_enabled():
            return rounded
        end = by_output(scale * self.top, self.weight)
        clipped = self.weight.clamp(-end, end)
        return clipped + (rounded - clipped).detach()

    def _has_bias_steps(self) -> bool:
        return self.convolution is not None and self.bias is not None and self.input is not None

    def _rounded_bias(self) -> Tensor | None:
        if self.top is None or not self._has_bias_steps() or not self.input.active:
            return self.bias
        rounded = round_bias(self.bias.detach(), self.input.scale(), self.integers()[1])
        return self.bias + (rounded - self.bias).detach() if torch.is_grad_enabled() else rounded


def top_of(storage: Storage, weight_bits: int) -> int:
    """Largest integer of weights stored so."""
    bits = weight_bits if storage in QUANTISED_INPUTS else WEIGHT_BITS[storage]
    return 2 ** (bits - 1) - 1


def set_observing(model: nn.Module, observing: bool) -> None:
    """Whether training batches move the ranges of `model`."""
    for module in model.modules():
        if isinstance(module, FakeQuantize):
            module.observing = observing


def round_rest_to_half_(model: nn.Module) -> None:
    """Rounds what `converted` rounds to float16 (biases, norms, A, D, weights of float layers), in place."""
    own = {
        f"{name}.{tensor}"
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantize | FakeQuantizedLayer)
        for tensor in ("weight", "low", "high")
    }
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items() if name in own}
    round_to_half_(model)
    model.load_state_dict(kept, strict=False)


def converted(model: Model) -> Model:
    """The model that ships, in evaluation mode on the CPU: integer layers in place of fake-quantised ones, the rest
    rounded to float16. `model` stays as it is.

    Raises:
        ModelFileError: a value beyond float16's 65,504, with the tensor named.
    """
    with torch.random.fork_rng(devices=[]):
        made = build_model(model.config)
    state = model.state_dict()
    made.load_state_dict({name: state[name].float() for name in made.state_dict()})
    layers = {n: m for n, m in model.named_modules() if isinstance(m, FakeQuantizedLayer)}
    slots = {
        n: m for n, m in model.named_modules() if isinstance(m, FakeQuantize) and n.rpartition(".")[0] not in layers
    }
    swap_in_quantized(made, {name: layer.storage for name, layer in layers.items()} | dict.fromkeys(slots, "uint8"))
    for name, slot in slots.items():
        _set_grid(made.get_submodule(name), slot)
    for name, layer in layers.items():
        integer: QuantizedLayer = made.get_submodule(name)
        for target, value in zip((integer.weight, integer.weight_scale), layer.integers()):
            target.copy_(value)
        if layer.storage in QUANTISED_INPUTS:
            _set_grid(integer, layer.input or slots[layer.input_slot])
        if layer.input_factor is not None:
            integer.input_factor.data.copy_(layer.input_factor)
    round_to_half_(made)
    return made.eval()


def _set_grid(target: QuantizedLayer | QuantizedActivation, source: FakeQuantize) -> None:
    scale, zero_point = uint8_grid(source.low, source.high)
    target.input_scale.copy_(scale)
    target.input_zero_point.copy_(zero_point)
