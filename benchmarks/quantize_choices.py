"""What each choice of a recipe's `quantize` section is worth on a trained float model: SQNR of the logits and accuracy.

    python benchmarks/quantize_choices.py BUNDLE [--clips 512] [--out benchmarks/quantize_choices.json]

BUNDLE is one of a run, in float32, such as runs/quickstart/05-prune; its recipe says where the clips are. Ranges come
from training clips, figures from validation clips (from training clips that calibrate nothing where there are none).
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from aum_compress.bundle import read_bundle, run_of_bundle
from aum_compress.compress.quantize import quantize, signal_to_noise_db
from aum_compress.models.quantized import stored_tensors
from aum_compress.quantising import calibration, judging_clips
from aum_compress.recipe import load_recipe
from aum_compress.recipe_schema import QuantizeSection
from aum_compress.workspace import Workspace

CHOICES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no smoothing": {"smoothing": 0.0},
    "smoothing 0.25": {"smoothing": 0.25},
    "smoothing 0.75": {"smoothing": 0.75},
    "scan inputs in float32": {"scan_inputs": ()},
    "delta in uint8 too, before softplus": {"scan_inputs": ("u", "B", "C", "delta")},
    "no clipping of u": {"scan_percentile": 100.0},
    "no clipping at all": {"percentile": 100.0, "scan_percentile": 100.0},
    "percentile 99.9": {"percentile": 99.9},
    "weights of 8 bits": {"weight_bits": 8},
    "int8 weights alone": {"weights": "int8-weight"},
    "int4 weights alone": {"weights": "int4-weight"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bundle = read_bundle(arguments.bundle)
    path, out = run_of_bundle(bundle.path)
    space = Workspace(load_recipe(path, []), out)
    model, base = bundle.load_model(), QuantizeSection()
    heard, judge = calibration(space, base), judging_clips(space, base, arguments.clips)
    reference = judge.logits(model)
    rows = {}
    for name, changes in CHOICES.items():
        made = quantize(model, heard, QuantizeSection(**changes))
        logits = judge.logits(made)
        rows[name] = {
            "sqnr_db": round(signal_to_noise_db(reference, logits), 2),
            "accuracy_drop": round(judge.accuracy(reference) - judge.accuracy(logits), 2),
            "param_bytes": sum(tensor.nbytes for tensor in stored_tensors(made, half=True).values()),
        }
        print(f"{name:38} {rows[name]['sqnr_db']:6.2f} dB  {rows[name]['accuracy_drop']:+6.2f}", flush=True)
    found = {
        "recipe": bundle.card.recipe,
        "stage": bundle.card.stage,
        "part": judge.part,
        "clips": len(judge.features),
        "float_accuracy": round(judge.accuracy(reference), 2),
        "choices": rows,
        "versions": {name: version(name) for name in ("torch", "numpy")},
    }
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
