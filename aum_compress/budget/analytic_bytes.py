"""Bytes from configuration alone, by layer: what a file of ours stores of a model. Torch-free.

The counterpart of `analytic.py`. Batch normalisation is folded, as in every exported file. Quantised matrices and
kernels take one byte a value, or half a byte, with a float32 scale for each output; where inputs are quantised too, one
float32 scale and one uint8 zero point for them, and where they are smoothed a float16 factor a channel; all else is
float16 (`models.quantized`). Letters as in `analytic.py`.
"""

import math
from dataclasses import dataclass
from typing import Literal

from aum_compress.budget.records import Stored, wide_values
from aum_compress.models.config import (
    MLP_HEAD_WIDTH,
    AudioMambaConfig,
    Block,
    BlockConfig,
    ConvStage,
    ConvStem,
    Mamba2BlockConfig,
    stem_grid,
)
from aum_compress.models.storage import NamedStorages, Storable, Storage, WeightStorage, as_storages, saves_bytes

Precision = Literal["fp32", "fp16", "int8", "int4"]
Shape = tuple[int, ...]
FLOAT_BYTES = {"fp32": 4, "fp16": 2, "int8": 2, "int4": 2, "mixed": 2}
SCALE_BYTES, ZERO_POINT_BYTES, FACTOR_BYTES = 4, 1, 2
SCAN_SLOTS, SCAN_INPUTS = ("u", "B", "C", "delta"), ("u", "B", "C")
"""What may be quantised on its way into a scan, and what is by default."""


@dataclass(frozen=True)
class _Layer:
    """The tensors of one layer."""

    weight: Shape | None = None
    """The matrix or kernel (outputs, ...), int8 where that is asked for."""
    others: tuple[Shape, ...] = ()
    """Bias, norm, state matrix, positions: float at every precision."""
    at_int8: Storage | None = None
    """How an int8 file stores it by default, where that is not plain `int8` for a weight and float for the rest."""
    feeds_scan: bool = False
    """It makes inputs of a scan that an int8 file rounds, and is int8 there for that alone."""

    def by_default(self, precision: str, every_weight: bool) -> Storage | None:
        if self.weight is None:
            return self.at_int8 if precision == "int8" else None
        storage: WeightStorage | None = {"int8": "int8", "int4": "int4-weight"}.get(precision)
        wanted = every_weight or (self.feeds_scan and storage == "int8")
        if storage is None or not (wanted or saves_bytes(self.weight, storage)):
            return None
        return self.at_int8 or storage if storage == "int8" else storage

    def stored(self, precision: str, storage: Storage | None) -> Stored:
        """Args: storage: of the weight; None for a float one."""
        found = Stored()
        for shape in self.others:
            found += _floats(shape, precision)
        if storage in ("int8", "int8-smooth", "uint8"):
            found += Stored(SCALE_BYTES + ZERO_POINT_BYTES)
        if self.weight is None:
            return found
        if storage is None:
            return found + _floats(self.weight, precision)
        values, outputs = math.prod(self.weight), self.weight[0]
        if storage == "int8-smooth":
            found += Stored(FACTOR_BYTES * self.weight[1], self.weight[1])
        weight_bytes = math.ceil(values / 2) if storage == "int4-weight" else values
        return found + Stored(weight_bytes + SCALE_BYTES * outputs, values)


def analytic_stored(
    config: AudioMambaConfig,
    precision: Precision | Literal["mixed"],
    layers: NamedStorages | None = None,
    *,
    every_weight: bool = False,
) -> dict[str, Stored]:
    """Layer -> what a file of this precision stores of it.

    Args:
        layers: those that are quantised, and how, which `mixed` needs; by default the matrices and kernels of an int8
            or int4 file that are smaller so, as the defaults of a recipe's `quantize` section store them.
        every_weight: by default all of them.
    """
    named = None if layers is None else as_storages(layers)
    found = {
        name: layer.stored(precision, layer.by_default(precision, every_weight) if named is None else named.get(name))
        for name, layer in _layers(config).items()
    }
    return {name: own for name, own in found.items() if own.param_bytes}


def analytic_storable(config: AudioMambaConfig) -> Storable:
    """What of the model can be stored as integers: what `models.integer_inputs.storable` finds in it."""
    layers = _layers(config)
    return Storable(
        weights={name: layer.weight for name, layer in layers.items() if layer.weight is not None},
        smoothed=[name for name, layer in layers.items() if layer.at_int8 == "int8-smooth"],
        scan_slots={name for name in layers if name.rpartition(".")[2].startswith("scan_")},
    )


def _floats(shape: Shape, precision: str) -> Stored:
    values, width = math.prod(shape), FLOAT_BYTES[precision]
    return Stored(width * values, values, wide_values(shape, 8 * width))


def _layers(config: AudioMambaConfig) -> dict[str, _Layer]:
    d_model = config.d_model
    rows, columns = config.token_grid
    class_token = config.pool == "class_token"
    found = _stem(config)
    if class_token:
        found[""] = _Layer(others=((1, 1, d_model),))
    if config.position == "absolute":
        found["pos_embed"] = _Layer(others=((1, rows * columns + class_token, d_model),))
    elif config.position == "factorised":
        found["pos_embed"] = _Layer(others=((rows, d_model), (columns, d_model)))
    for number, block in enumerate(config.blocks):
        name = f"layers.{number}"
        found[f"{name}.norm"] = _Layer(others=((d_model,),))
        found |= _mixer(f"{name}.mixer", block, d_model)
    found["norm_f"] = _Layer(others=((d_model,),))
    if config.head == "mlp":
        found["head.norm"] = _Layer(others=((d_model,), (d_model,)))
        found["head.hidden"] = _with_bias(MLP_HEAD_WIDTH, d_model)
        return found | {"head.classes": _with_bias(config.n_classes, MLP_HEAD_WIDTH)}
    return found | {"head": _with_bias(config.n_classes, d_model)}


def _with_bias(*weight: int) -> _Layer:
    return _Layer(weight, ((weight[0],),))


def _mixer(name: str, block: Block, d_model: int) -> dict[str, _Layer]:
    if isinstance(block, BlockConfig):
        return _mamba(name, block, d_model)
    if isinstance(block, Mamba2BlockConfig):
        return _mamba2(name, block, d_model)
    d_inner = block.d_inner
    return {
        f"{name}.in_proj": _Layer((2 * d_inner, d_model)),
        f"{name}.conv1d": _with_bias(d_inner, 1, block.d_conv),
        f"{name}.out_proj": _Layer((d_model, d_inner), at_int8="int8-smooth"),
    }


def _mamba(name: str, block: BlockConfig, d_model: int) -> dict[str, _Layer]:
    d_inner, d_state, dt_rank = block.d_inner, block.d_state, block.dt_rank
    rates = ((d_inner, d_state),) * len(block.scans)
    found = {
        name: _Layer(others=(*rates, *((d_inner,),) * len(block.projections))),
        f"{name}.in_proj": _Layer((2 * d_inner, d_model)),
        f"{name}.out_proj": _Layer((d_model, d_inner), at_int8="int8-smooth"),
    }
    for suffix in block.projections:
        for slot in SCAN_SLOTS:
            found[f"{name}.scan_{slot}{suffix}"] = _Layer(at_int8="uint8" if slot in SCAN_INPUTS else None)
        found[f"{name}.conv1d{suffix}"] = _with_bias(d_inner, 1, block.d_conv)
        found[f"{name}.x_proj{suffix}"] = _Layer((dt_rank + 2 * d_state, d_inner), feeds_scan=True)
        found[f"{name}.dt_proj{suffix}"] = _with_bias(d_inner, dt_rank)
    return found


def _mamba2(name: str, block: Mamba2BlockConfig, d_model: int) -> dict[str, _Layer]:
    d_inner, heads = block.d_inner, block.n_heads
    mixed = d_inner + 2 * block.d_state
    return {
        name: _Layer(others=((heads,),) * 3),  # dt_bias, A_log, D
        f"{name}.in_proj": _Layer((d_inner + mixed + heads, d_model)),
        f"{name}.conv1d": _with_bias(mixed, 1, block.d_conv),
        f"{name}.norm": _Layer(others=((d_inner,),)),
        f"{name}.out_proj": _Layer((d_model, d_inner)),
    }


def _stem(config: AudioMambaConfig) -> dict[str, _Layer]:
    stem, d_model = config.stem, config.d_model
    if not isinstance(stem, ConvStem):
        return {"patch_embed.proj": _with_bias(d_model, 1, stem.patch_mels, stem.patch_frames)}
    found: dict[str, _Layer] = {}
    inputs = 1
    for number, stage in enumerate(stem.stages):
        found |= _stage(f"patch_embed.stages.{number}", inputs, stage)
        inputs = stage.channels
    rows, _ = stem_grid(stem, config.n_mels, config.n_frames)
    width = inputs * rows if stem.token == "frame" else inputs
    return found | {"patch_embed.proj": _with_bias(d_model, width)}


def _stage(name: str, inputs: int, stage: ConvStage) -> dict[str, _Layer]:
    if not stage.expansion:
        return {f"{name}.0": _with_bias(stage.channels, inputs, 3, 3)}
    hidden = stage.hidden_channels(inputs)
    return {
        f"{name}.layers.0.0": _with_bias(hidden, inputs, 1, 1),
        f"{name}.layers.1.0": _with_bias(hidden, 1, 3, 3),
        f"{name}.layers.2.0": _with_bias(stage.channels, hidden, 1, 1),
    }
