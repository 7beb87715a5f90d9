"""Post-training quantisation: which tensor is stored how, and ranges calibrated on training clips.

What is not a matrix or a convolution (A, D, biases, norms: 3 % of a large Mamba but over 10 % of a tiny one) is rounded
to float16; step sizes, the scan and its state stay in float32.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from aum_compress.compress.smoothing import smooth
from aum_compress.errors import AumError
from aum_compress.models.factory import Model, fold_batch_norm
from aum_compress.models.fake_quantized import FakeQuantize, FakeQuantizedLayer, converted, value_range
from aum_compress.models.integer_inputs import storable, with_inputs, worth_storing
from aum_compress.models.quantized import replace_module
from aum_compress.models.storage import Storable, Storage, WeightStorage
from aum_compress.recipe_schema import QuantizeSection


def quantize(model: Model, calibration: Iterable[Tensor], section: QuantizeSection | None = None) -> Model:
    """A copy with batch normalisation folded and integer layers as `section` says, the rest in float16.

    Args:
        calibration: batches (B,1,F,T) of normalised features of *training* clips.
        section: the recipe's; its defaults when left out.

    Raises:
        AumError: as `prepare`.
        ModelFileError: a value that float16 cannot hold.
    """
    return converted(prepare(model, calibration, section))


def prepare(model: Model, calibration: Iterable[Tensor], section: QuantizeSection | None = None) -> Model:
    """A copy with batch normalisation folded and fake-quantised layers, its ranges calibrated, in evaluation mode.

    Args:
        calibration, section: as `quantize`.

    Raises:
        AumError: a name in `keep_float` or `layers` fits no layer; weights that are not finite; no calibration clip,
            only silent ones, or one that makes some layer's input infinite or NaN.
    """
    section = section or QuantizeSection()
    _require_finite(model)
    batches = list(calibration)
    _require_sound(batches)
    folded = fold_batch_norm(model)
    storages = layer_storages(folded, section)
    factors = smooth(folded, batches, storages, section.smoothing)
    for name, storage in storages.items():
        if storage == "uint8":
            percentile = section.scan_percentile if "scan_u" in name else section.percentile
            replace_module(folded, name, FakeQuantize(percentile))
            continue
        layer = folded.get_submodule(name)
        fake = FakeQuantizedLayer(layer, storage, section.weight_bits, section.percentile)
        if storage == "int8-smooth":
            fake.input_factor = nn.Parameter(factors[name], requires_grad=False)
        slot = name.replace(".x_proj", ".scan_u")
        if slot != name and storages.get(slot) == "uint8":  # rounded once for both that read it
            fake.input, fake.input_slot = None, slot
        replace_module(folded, name, fake)
    _calibrate(folded, batches)
    return folded.eval()


def layer_storages(model: Model, section: QuantizeSection) -> dict[str, Storage]:
    """Name -> storage of each layer and each input of a scan that `section` quantises.

    Raises:
        AumError: a name in `keep_float` or `layers` fits no layer.
    """
    known = storable(model)
    for key, unknown in _unknown(model, section).items():
        names = ", ".join(known.weights)
        raise AumError(f"quantize.{key}: {', '.join(unknown)}: no such layer; the model has {names}")
    return storages_by(section, known)


def without_absent(model: Model, section: QuantizeSection) -> tuple[QuantizeSection, list[str]]:
    """`section` without the names in `keep_float` and `layers` that fit no layer of `model`, and these names."""
    absent = _unknown(model, section)
    gone = [name for names in absent.values() for name in names]
    kept = {
        "keep_float": tuple(name for name in section.keep_float if name not in gone),
        "layers": {name: storage for name, storage in section.layers.items() if name not in gone},
    }
    return section.model_copy(update=kept), gone


def _unknown(model: Model, section: QuantizeSection) -> dict[str, list[str]]:
    """Key -> beginnings of names there that fit no layer; keys without any are left out."""
    names = storable(model).weights
    given = {"keep_float": section.keep_float, "layers": section.layers}
    unfit = {key: [own for own in given[key] if not any(name.startswith(own) for name in names)] for key in given}
    return {key: beginnings for key, beginnings in unfit.items() if beginnings}


def storages_by(section: QuantizeSection, model: Storable) -> dict[str, Storage]:
    """`layer_storages` from names and shapes alone; a name in `section` that fits no layer stores nothing."""
    own = section.layers | dict.fromkeys(section.keep_float, "fp16")
    found: dict[str, WeightStorage] = {}
    for name, shape in model.weights.items():
        fitting = max((beginning for beginning in own if name.startswith(beginning)), key=len, default=None)
        if fitting is not None and own[fitting] != "fp16":
            found[name] = own[fitting]
        elif fitting is None and worth_storing(name, shape, section.weights, section.scan_inputs):
            found[name] = section.weights
    return with_inputs(model, found, smoothing=section.smoothing > 0, scan_inputs=section.scan_inputs)


def with_layers(section: QuantizeSection, chosen: Mapping[str, WeightStorage | Literal["fp16"]]) -> QuantizeSection:
    """`section` for which each layer, by its full name, is stored as `chosen` says."""
    return section.model_copy(update={"layers": dict(chosen), "keep_float": (), "search": None})


def signal_to_noise_db(reference: np.ndarray, approximation: np.ndarray) -> float:
    """SQNR: 20 log10(|reference| / |reference - approximation|); infinite where they are equal."""
    noise = float(np.linalg.norm(reference.astype(np.float64) - approximation))
    return float("inf") if noise == 0 else 20 * float(np.log10(np.linalg.norm(reference) / noise))


def _require_finite(model: Model) -> None:
    bad = [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
    if bad:
        raise AumError(
            f"quantize: values that are not finite in {', '.join(bad[:3])}{', ...' if bad[3:] else ''}; wanted the "
            "weights of a training that did not diverge. Train with a lower learning_rate"
        )


def _require_sound(batches: list[Tensor]) -> None:
    """Clips that hold sound: features of digital silence are one value throughout."""
    clips = sum(len(batch) for batch in batches)
    if not clips:
        raise AumError(
            "quantize: no calibration clip: ranges would be made up. Are there training clips? Raise calibration_clips"
        )
    if all(torch.equal(batch.amin((1, 2, 3)), batch.amax((1, 2, 3))) for batch in batches):
        raise AumError(
            f"quantize: all {clips} calibration clips are silent, and ranges of silence fit no other sound; wanted "
            "training clips with sound in them. aum-compress data check names silent files"
        )


def _calibrate(model: Model, batches: list[Tensor]) -> None:
    """Sets each range to what the float model reads there: the extremes over batches of each batch's percentiles."""
    quantizers = {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantize)}
    ranges: dict[str, tuple[Tensor, Tensor]] = {}

    def observe(name: str):
        def hook(module: FakeQuantize, inputs: tuple[Tensor, ...]) -> None:
            found = value_range(inputs[0], module.percentile)
            low, high = ranges.get(name, found)
            ranges[name] = (torch.minimum(low, found[0]), torch.maximum(high, found[1]))  # NaN stays NaN

        return hook

    handles = [module.register_forward_pre_hook(observe(name)) for name, module in quantizers.items()]
    try:
        with in_float(model), torch.inference_mode():
            for batch in batches:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    if bad := [name for name, pair in ranges.items() if not all(end.isfinite() for end in pair)]:
        raise AumError(
            f"quantize: the input of {', '.join(name.removesuffix('.input') for name in bad[:3])} is not finite on the "
            "calibration clips; wanted a model and clips that give finite values. aum-compress data check reads clips"
        )
    for name, pair in ranges.items():
        quantizers[name].set_range(*pair)


@contextmanager
def in_float(model: nn.Module) -> Iterator[None]:
    """Switches all rounding of a fake-quantised model off."""
    quantizers = [module for module in model.modules() if isinstance(module, FakeQuantize)]
    layers = [module for module in model.modules() if isinstance(module, FakeQuantizedLayer)]
    switches, tops = [q.active for q in quantizers], [layer.top for layer in layers]
    try:
        for quantizer in quantizers:
            quantizer.active = False
        for layer in layers:
            layer.top = None
        yield
    finally:
        for quantizer, active in zip(quantizers, switches):
            quantizer.active = active
        for layer, top in zip(layers, tops):
            layer.top = top
