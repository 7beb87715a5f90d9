"""The torch simulation of an int8 model, its exported file as written, and the same file optimised: do they agree?

    python benchmarks/quantize_agreement.py --data DIR --export BUNDLE [--clips 2000]

DIR is the data set of the export's recipe (ESC10-mobile: what make_esc10_mobile.py writes). Clips are of its test part.
The simulation is built from the file's own tensors. Wanted: the same class for at least 99.5 % of the clips, and an
SQNR of the logits of at least 30 dB, for each two of the three.

The second half asks what a CPU without VNNI would make of weights of 7 and of 8 bits: it quantises the float model of
the same export anew and adds the products of every dense layer in pairs that saturate at 16 bits, as VPMADDUBSW does.
"""

import argparse
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

from aum_compress.bundle import read_bundle
from aum_compress.compress.quantize import quantize, signal_to_noise_db
from aum_compress.compress.saturation import saturating_pairs, saturating_product
from aum_compress.data.cache import cache_clips
from aum_compress.data.index import load_index
from aum_compress.export.runtime import open_session, run_session
from aum_compress.models.factory import Model, build_model
from aum_compress.models.quantized import ZERO_POINT_MAX, QuantizedLayer, swap_in_quantized
from aum_compress.models.storage import NamedStorages
from aum_compress.recipe import load_recipe
from aum_compress.recipe_schema import QuantizeSection
from aum_compress.workspace import Workspace

LEAST_AGREEMENT, LEAST_DB = 99.5, 30.0
BATCH = 64
CALIBRATION_CLIPS, SATURATED_CLIPS = 128, 32


def model_of(file: Path, config, layers: NamedStorages = ()) -> Model:
    """The torch model that holds the tensors of an exported file."""
    model = build_model(config)
    swap_in_quantized(model, layers)
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer}
    state = {}
    for name, wanted in model.state_dict().items():
        found = torch.from_numpy(tensors[name].copy())
        # before a MatMul as (inputs, outputs), before a Gemm as torch has it; a square one is read by a MatMul
        square = found.dim() == 2 and len(set(found.shape)) == 1
        transposed = found.shape != wanted.shape or (square and _is_linear(model, name))
        state[name] = (found.T if transposed else found).to(wanted.dtype).contiguous()
    model.load_state_dict(state)
    return model.eval()


def _is_linear(model: Model, name: str) -> bool:
    layer = model.get_submodule(name.rpartition(".")[0])
    return name.endswith(".weight") and (
        isinstance(layer, torch.nn.Linear) or (isinstance(layer, QuantizedLayer) and layer.convolution is None)
    )


def by_torch(model: Model, features: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return np.concatenate([model(batch).numpy() for batch in torch.from_numpy(features).split(BATCH)])


def pair(one: np.ndarray, other: np.ndarray) -> dict[str, float | bool]:
    same = float(100 * (one.argmax(1) == other.argmax(1)).mean())
    sqnr = signal_to_noise_db(one, other)
    return {"same_class_percent": same, "sqnr_db": sqnr, "met": same >= LEAST_AGREEMENT and sqnr >= LEAST_DB}


def quantised_input(layer: QuantizedLayer, x: Tensor) -> Tensor:
    if layer.input_factor is not None:
        x = x * layer.input_factor
    return (torch.round(x / layer.input_scale) + layer.input_zero_point.float()).clamp(0, ZERO_POINT_MAX)


def saturated_forward(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """A dense layer with sums as VPMADDUBSW makes them."""
    zero = int(layer.input_zero_point)
    integers, weight = quantised_input(layer, x), layer.weight.flatten(1)
    if layer.convolution is None:
        rows, shape = integers.flatten(0, -2), (*x.shape[:-1], len(weight))
    else:
        stride, (high, wide), dilation, _ = layer.convolution
        kernel = layer.weight.shape[2:]
        padded = F.pad(integers, (wide, wide, high, high), value=zero)
        columns = F.unfold(padded, kernel, dilation, 0, stride)  # (B, K, positions)
        rows = columns.transpose(1, 2).flatten(0, 1)
        grid = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(padded.shape[2:], kernel, stride, dilation)]
    sums = saturating_product(rows, weight) - zero * weight.long().sum(1)
    values = sums.float() * (layer.input_scale * layer.weight_scale)
    if layer.bias is not None:
        values = values + layer.bias
    if layer.convolution is None:
        return values.view(shape)
    return values.view(len(x), -1, len(weight)).transpose(1, 2).unflatten(2, grid)


@contextmanager
def without_vnni(model: Model) -> Iterator[None]:
    """Dense layers saturate; depthwise convolutions have one product a channel and tap, and no pairs."""
    dense = [
        module
        for module in model.modules()
        if isinstance(module, QuantizedLayer) and (module.convolution is None or module.convolution[3] == 1)
    ]
    for layer in dense:
        layer.forward = lambda x, layer=layer: saturated_forward(layer, x)
    try:
        yield
    finally:
        for layer in dense:
            del layer.forward


def saturation(model: Model, calibration: list[Tensor], features: np.ndarray, weight_bits: int) -> dict[str, float]:
    reference = by_torch(model, features)
    quantized = quantize(model, calibration, QuantizeSection(weight_bits=weight_bits))
    right = by_torch(quantized, features)
    with without_vnni(quantized):
        saturated = by_torch(quantized, features)
    return {
        "pairs_that_could_saturate": saturating_pairs(quantized),
        "sqnr_db_exact": signal_to_noise_db(reference, right),
        "sqnr_db_without_vnni": signal_to_noise_db(reference, saturated),
        "same_class_percent_without_vnni": float(100 * (saturated.argmax(1) == reference.argmax(1)).mean()),
    }


def has_vnni() -> bool | None:
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--export", type=Path, required=True, help="an export with fp32 and int8 files")
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bundle = read_bundle(arguments.export)
    card, spec = bundle.card, bundle.card.input
    recipe = load_recipe(bundle.path / "recipe.yaml", [f"data.root={arguments.data.resolve()}"])
    index = load_index(recipe.data, recipe.seed)

    def features(clips, count: int) -> np.ndarray:
        chosen = [clips[row] for row in Workspace.spread(len(clips), count)]
        cached = cache_clips(chosen, spec.front_end, spec.clip_seconds)
        return ((cached[np.arange(len(cached))] - spec.mean) / spec.std).astype(np.float32)[:, None]

    heard = features(index.test, arguments.clips)
    file = bundle.path / "model-int8.onnx"
    logits = {"torch simulation": by_torch(model_of(file, card.model, card.quantized_layers), heard)}
    for name, optimise in (("file as written", False), ("file optimised", True)):
        session = open_session(file, optimise=optimise, intra_op_num_threads=1)
        logits[name] = np.concatenate([run_session(session, clip) for clip in np.split(heard, len(heard))])
    pairs = {f"{one} / {other}": pair(logits[one], logits[other]) for one, other in combinations(logits, 2)}

    plain = model_of(bundle.path / "model-fp32.onnx", card.model)
    calibration = list(torch.from_numpy(features(index.train, CALIBRATION_CLIPS)).split(32))
    some = heard[Workspace.spread(len(heard), SATURATED_CLIPS)]
    found = {
        "export": arguments.export.name,
        "clips": len(heard),
        "wanted": {"same_class_percent": LEAST_AGREEMENT, "sqnr_db": LEAST_DB},
        "pairs": pairs,
        "float_clips": len(some),
        "without_vnni": {f"{bits} bits": saturation(plain, calibration, some, bits) for bits in (7, 8)},
        "machine": {
            "cpus": os.cpu_count(),
            "architecture": platform.machine(),
            "vnni": has_vnni(),
            **{name: version(name) for name in ("torch", "onnxruntime", "onnx", "numpy")},
        },
    }
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    if not all(one["met"] for one in pairs.values()):
        raise SystemExit("the bar is not met")


if __name__ == "__main__":
    main()
