"""What follows from how a layer is stored: inputs of a scan that become integers with it, inputs that are smoothed."""

from collections.abc import Iterable, Mapping, Sequence

from aum_compress.models.factory import Model
from aum_compress.models.mamba import SCAN_SLOTS
from aum_compress.models.mamba2 import Mamba2Mixer
from aum_compress.models.quantized import activation_slots, quantizable_layers
from aum_compress.models.storage import QUANTISED_INPUTS, Storable, Storage, WeightStorage, saves_bytes

SCAN_INPUTS = ("u", "B", "C")
"""Those that are rounded by default."""
MAKES = {"x_proj": ("u", "B", "C"), "dt_proj": ("delta",)}
"""Projection of a scan -> inputs of the scan that are integers where its own are. (u it reads.)"""


def default_storages(model: Model) -> dict[str, Storage]:
    """How the defaults of a recipe's `quantize` section store a model: int8 wherever that is worth it."""
    found = storable(model)
    worth = [name for name, shape in found.weights.items() if worth_storing(name, shape, "int8", SCAN_INPUTS)]
    return with_inputs(found, dict.fromkeys(worth, "int8"))


def storable(model: Model) -> Storable:
    """What of `model` can be stored as integers; `analytic_storable` finds the same in its configuration."""
    shapes = {name: tuple(layer.weight.shape) for name, layer in quantizable_layers(model).items()}
    return Storable(shapes, smoothed_layers(model), activation_slots(model).keys())


def worth_storing(name: str, weight_shape: Sequence[int], storage: WeightStorage, scan_inputs: Iterable[str]) -> bool:
    """Whether a layer is stored so where nobody names it: it saves bytes, or an input of a scan is to be rounded, which
    only integer inputs of the layer that makes it bring about."""
    feeds_scan = storage in QUANTISED_INPUTS and bool(slots_made_by(name, scan_inputs))
    return feeds_scan or saves_bytes(weight_shape, storage)


def with_inputs(
    model: Storable,
    layers: Mapping[str, WeightStorage],
    *,
    smoothing: bool = True,
    scan_inputs: Iterable[str] = SCAN_INPUTS,
) -> dict[str, Storage]:
    """`layers`, those whose inputs are smoothed marked so, and the inputs of scans that are rounded because of them."""
    found: dict[str, Storage] = dict(layers)
    if smoothing:
        found |= {name: "int8-smooth" for name in model.smoothed if found.get(name) == "int8"}
    for name in [name for name, storage in found.items() if storage in QUANTISED_INPUTS]:
        found |= {slot: "uint8" for slot in slots_made_by(name, scan_inputs) if slot in model.scan_slots}
    return found


def smoothed_layers(model: Model) -> list[str]:
    """Names of the layers that smoothing gives a stored factor: every out_proj that no norm stands before."""
    mixers = [(path, path.rpartition(".")[0]) for path, _ in model.named_modules() if path.endswith(".out_proj")]
    return [path for path, mixer in mixers if not isinstance(model.get_submodule(mixer), Mamba2Mixer)]


def slots_made_by(layer: str, scan_inputs: Iterable[str] = SCAN_SLOTS) -> list[str]:
    """Names of those inputs of a scan that are integers where this projection has integer inputs."""
    mixer, _, name = layer.rpartition(".")
    for maker, slots in MAKES.items():
        if name in (maker, f"{maker}_b"):
            return [f"{mixer}.scan_{slot}{name.removeprefix(maker)}" for slot in slots if slot in scan_inputs]
    return []
