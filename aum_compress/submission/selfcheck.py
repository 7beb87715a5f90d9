"""Runs a written package as the organisers do, in a process of its own where aum-compress cannot be imported."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from aum_compress.errors import VerificationFailed
from aum_compress.export.verification import TOLERANCES
from aum_compress.submission.checkpoint import Part

_CODE = """
import importlib, importlib.resources, json, sys
sys.modules["aum_compress"] = None
label, index, devices = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
import torch
torch.set_num_threads(1)
api = importlib.import_module(f"{label}.{label}_{index}")
model = api.load_model()
with importlib.resources.path(f"{label}.resources", "dummy.wav") as dummy:
    files = [str(dummy) for _ in devices]
    inputs = api.load_inputs(files, devices, model)
    logits, classes = api.predict(files, devices, model_file_path=None, use_cuda=False)
shape = list(inputs[0].shape)
made_up = torch.randn(4, *shape[1:], generator=torch.Generator().manual_seed(0))
with torch.inference_mode():
    answers = {device: api.get_model_for_device(model, device)(made_up).tolist() for device in devices}
found = {"classes": classes, "shape": shape, "predicted": [one.tolist() for one in logits], "answers": answers}
found["inputs"], found["names"] = inputs[0].flatten().tolist(), sorted(model.model.state_dict())[:3]
print(json.dumps(found))
"""


def check_package(folder: Path, label: str, index: int, parts: Mapping[str, Part], labels: tuple[str, ...]) -> None:
    """Holds what a package answers against the models that were packed.

    Args:
        folder: that holds the package `label`.
        parts: name of each model -> the model itself.

    Raises:
        VerificationFailed: it cannot be run, or it answers something else.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", _CODE, label, str(index), json.dumps(list(parts))],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )
    if done.returncode:
        raise VerificationFailed(f"{label}_{index}: the package cannot be run: {done.stderr.strip()[-1500:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if found["classes"] != list(labels):
        raise VerificationFailed(f"{label}_{index}: answers classes {found['classes']}, wanted {list(labels)}")
    shape = found["shape"]
    made_up = torch.randn(4, *shape[1:], generator=torch.Generator().manual_seed(0))
    dummy = torch.tensor(found["inputs"]).reshape(shape)
    for row, (device, part) in enumerate(parts.items()):
        with torch.inference_mode():
            wanted = torch.cat([part.network(made_up), part.network(dummy)]).numpy()
        answers = np.array([*found["answers"][device], found["predicted"][row]], dtype=np.float32)
        _require_equal(f"{label}_{index}, model for {device}", answers, wanted, int8=bool(part.quantized_layers))


def _require_equal(what: str, found: np.ndarray, wanted: np.ndarray, *, int8: bool) -> None:
    allowed = TOLERANCES["int8" if int8 else "fp16", False].max_error * float(np.abs(wanted).max())
    if found.shape != wanted.shape or not float(np.abs(found - wanted).max()) <= allowed:
        error = float(np.abs(found - wanted).max()) if found.shape == wanted.shape else float("nan")
        raise VerificationFailed(
            f"{what}: logits of the package differ by {error:.3g} from those of the bundle, at most {allowed:.3g} is "
            "wanted: not written"
        )
