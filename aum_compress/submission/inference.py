"""The four functions that the organisers of DCASE 2025 Task 1 call, on one checkpoint file.

A checkpoint is a safetensors file: tensors `<number of the model>/<name>`, and in its header, as JSON under
`aum_compress`, labels, input and for each model its device, configuration and quantised layers. The first model is the
general one, for devices that have none of their own.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from aum_compress.audio.config import InputSpec
from aum_compress.audio.front_ends import features as front_end
from aum_compress.audio.reading import read_audio
from aum_compress.device_names import GENERAL
from aum_compress.errors import DataError, ModelFileError
from aum_compress.models.config import ModelConfig
from aum_compress.models.factory import build_model
from aum_compress.models.quantized import load_stored, swap_in_quantized
from aum_compress.models.storage import Storage
from aum_compress.submission.stored import StoredModel

HEADER = "aum_compress"
FILES_AT_ONCE = 1024
READERS = 8


class DeviceModels(nn.Module):
    """One model for each device that has its own, and the general one; a device's name is never part of a tensor's."""

    def __init__(self, models: Mapping[str, StoredModel]) -> None:
        super().__init__()
        self.names = tuple(models)
        self.models = nn.ModuleList(models.values())

    def for_device(self, device_id: str) -> StoredModel:
        """The device's own model, else the general one: for devices that training has not heard, and unknown names."""
        return self.models[self.names.index(device_id) if device_id in self.names else self.names.index(GENERAL)]


class Submission(nn.Module):
    """What `load_model` gives. `model` holds the models, whose sizes and multiplications count; the rest is input."""

    def __init__(self, models: Mapping[str, StoredModel], labels: Sequence[str], spec: InputSpec) -> None:
        super().__init__()
        self.model = DeviceModels(models)
        self.labels = tuple(labels)
        self.spec = spec


def load_model(checkpoint: Path | str) -> Submission:
    """The submission in a checkpoint file, in evaluation mode on the CPU.

    Raises:
        ModelFileError: no such file, or one that is not a whole checkpoint of a submission.
    """
    checkpoint = Path(checkpoint)
    try:
        with safe_open(checkpoint, framework="pt") as file:
            about = json.loads((file.metadata() or {})[HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not iterable by itself
        entries = about["models"]
        labels, spec = list(map(str, about["labels"])), InputSpec.model_validate(about["input"])
        configs = [TypeAdapter(ModelConfig).validate_python(entry["model"]) for entry in entries]
        names = [str(entry["device"]) for entry in entries]
        quantized = [TypeAdapter(dict[str, Storage]).validate_python(entry["quantized_layers"]) for entry in entries]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, ValidationError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelFileError(
            f"{checkpoint}: not a whole checkpoint of a submission ({type(error).__name__}: {reason}): write the "
            "package again"
        ) from None
    if GENERAL not in names or len(set(names)) < len(names):
        raise ModelFileError(f"{checkpoint}: holds models for {', '.join(names)}; wanted {GENERAL}, and each one once")
    models = {}
    for number, (name, config, layers) in enumerate(zip(names, configs, quantized, strict=True)):
        stored = {key.partition("/")[2]: t for key, t in tensors.items() if key.partition("/")[0] == str(number)}
        models[name] = _stored_model(checkpoint, name, config, layers, stored)
    return Submission(models, labels, spec).eval()


def load_inputs(file_paths: Sequence[str], device_ids: Sequence[str], model: Submission) -> list[Tensor]:
    """Normalised log-mel features (1,1,F,T) float32 of each file, in order; the same for every device.

    A file of another length than the model's input is cut, or padded with silence, at its end.

    Raises:
        DataError: a file that cannot be read, named; as many devices as files were wanted.
    """
    if len(file_paths) != len(device_ids):
        raise DataError(f"{len(file_paths)} files and {len(device_ids)} devices: wanted a device for each file")
    spec = model.spec
    record, rate = spec.front_end.model_dump(), spec.front_end.sample_rate_hz
    length = spec.front_end.clip_samples(spec.clip_seconds)

    def features(path: str) -> Tensor:
        clip = read_audio(path, rate, duration_seconds=spec.clip_seconds)[:length]
        image = front_end(np.pad(clip, (0, length - len(clip))), record)
        return torch.from_numpy(((image - spec.mean) / spec.std).astype(np.float32))[None, None]

    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(features, file_paths))


def get_model_for_device(model: Submission, device_id: str) -> StoredModel:
    """The model that answers for a device: its own, or the general one where it has none or is unknown."""
    return model.model.for_device(device_id)


def predict(
    file_paths: Sequence[str],
    device_ids: Sequence[str],
    model: Submission,
    use_cuda: bool = True,
    batch_size: int = 64,
) -> tuple[list[Tensor], list[str]]:
    """Logits (C,) float32 of each file, in order, and the class names in the order of the logits.

    Raises:
        DataError: as `load_inputs`.
    """
    if len(file_paths) != len(device_ids):
        raise DataError(f"{len(file_paths)} files and {len(device_ids)} devices: wanted a device for each file")
    place = torch.device("cuda" if use_cuda and torch.cuda.is_available() else "cpu")
    model.to(place)
    logits: list[Tensor] = []
    for start in range(0, len(file_paths), FILES_AT_ONCE):  # the features of all files may not fit into memory
        files, devices = file_paths[start : start + FILES_AT_ONCE], device_ids[start : start + FILES_AT_ONCE]
        logits += device_logits(model, load_inputs(files, devices, model), devices, batch_size)
    model.to("cpu")
    return logits, list(model.labels)


def device_logits(
    model: Submission, inputs: Sequence[Tensor], device_ids: Sequence[str], batch_size: int
) -> list[Tensor]:
    """Logits (C,) on the CPU of features (1,1,F,T) each, by the model of its device, in order."""
    place = next(model.parameters()).device
    rows: dict[StoredModel, list[int]] = defaultdict(list)
    for row, device in enumerate(device_ids):
        rows[get_model_for_device(model, device)].append(row)
    logits: list[Any] = [None] * len(inputs)
    with torch.inference_mode():
        for network, own in rows.items():
            for start in range(0, len(own), batch_size):
                batch = own[start : start + batch_size]
                answers = network(torch.cat([inputs[row] for row in batch]).to(place)).cpu()
                for row, answer in zip(batch, answers, strict=True):
                    logits[row] = answer.clone()  # an inference tensor of the batch would keep the whole batch
    return logits


def _stored_model(
    checkpoint: Path, name: str, config: ModelConfig, quantized_layers: dict[str, Storage], stored: dict[str, Tensor]
) -> StoredModel:
    try:
        network = build_model(config)
        swap_in_quantized(network, quantized_layers)
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelFileError(f"{checkpoint}: quantised layers that the {name} model does not have: {error}") from None
    if problems := load_stored(network, stored):
        raise ModelFileError(f"{checkpoint}: tensors do not fit the {name} model: {'; '.join(problems[:5])}")
    # weights that were packed two a byte stand one a byte here: the challenge's script knows nothing narrower
    wide = {key: stored[key] if stored[key].shape == t.shape else t for key, t in network.state_dict().items()}
    return StoredModel(network, wide)
