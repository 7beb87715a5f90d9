"""Bundles to the checkpoint file of a submission."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from safetensors.torch import save
from torch import Tensor

from aum_compress.audio.config import InputSpec
from aum_compress.budget.check import check_model
from aum_compress.budget.records import BudgetReport, Limits
from aum_compress.bundle import Bundle
from aum_compress.device_names import GENERAL
from aum_compress.errors import BundleError
from aum_compress.export.onnx_writer import fold_if_needed, round_to_half
from aum_compress.models.config import ModelConfig
from aum_compress.models.factory import Model
from aum_compress.models.quantized import stored_tensors
from aum_compress.submission.inference import HEADER


@dataclass(frozen=True)
class Part:
    """One model of a submission, as it is stored."""

    network: Model
    """In evaluation mode, batch normalisation folded, at the values that are stored."""
    tensors: Mapping[str, Tensor]
    quantized_layers: Mapping[str, str]
    """Name of each layer and activation that is quantised -> how."""

    @property
    def config(self) -> ModelConfig:
        return self.network.config


def part_of(bundle: Bundle) -> Part:
    """The model of a bundle, as it ships: an int8 one as it is, another one folded and rounded to float16.

    Raises:
        BundleError: a bundle that holds no tensors, with the place where they may be.
    """
    card = bundle.card
    if card.kind != "model":
        from_where = f"; it was exported from {bundle.path / card.parent.path}" if card.parent else ""
        raise BundleError(
            f"{bundle.path}: holds ONNX files, and the challenge's script measures a torch model; wanted a bundle that "
            f"a stage has written, such as runs/NAME/06-quantize{from_where}"
        )
    model = bundle.load_model()
    if card.precision in ("fp32", "fp16"):
        model = round_to_half(fold_if_needed(model))
    return Part(model, stored_tensors(model, half=True), card.quantized_layers)


def checkpoint_bytes(parts: Mapping[str, Part], labels: tuple[str, ...], spec: InputSpec) -> bytes:
    """The file that `inference.load_model` reads. `parts` names the general model and those of devices."""
    tensors = {
        f"{number}/{name}": tensor
        for number, part in enumerate(parts.values())
        for name, tensor in part.tensors.items()
    }
    about = {
        "labels": list(labels),
        "input": spec.model_dump(mode="json"),
        "models": [
            {
                "device": device,
                "model": part.config.model_dump(mode="json"),
                "quantized_layers": dict(part.quantized_layers),
            }
            for device, part in parts.items()
        ],
    }
    return save(tensors, {HEADER: json.dumps(about)})


def part_budget(part: Part, spec: InputSpec, limits: Limits) -> BudgetReport:
    """What a part costs by the rules of docs/budgets.md."""
    return check_model(part.network, spec, part.tensors, limits)


def require_alike(bundles: Mapping[str, Bundle]) -> None:
    """Raises BundleError for a device's model with other labels or another input than the general one's."""
    general = bundles[GENERAL].card
    for device, bundle in bundles.items():
        for what, found, wanted in (
            ("labels", bundle.card.labels, general.labels),
            ("input", bundle.card.input, general.input),
        ):
            if found != wanted:
                raise BundleError(
                    f"{bundle.path}: the model for {device} has {what} {found}, the general one {wanted}: all models "
                    "of a submission hear and answer alike"
                )
