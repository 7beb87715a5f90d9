"""Budget of any torch module, of a model that reads features, a bundle or a named preset."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from aum_compress.audio.config import InputSpec
from aum_compress.budget.analytic import analytic_macs, front_end_macs
from aum_compress.budget.check_onnx import check_onnx
from aum_compress.budget.dcase import dcase_bytes, dcase_macs, dcase_notes
from aum_compress.budget.onnx_bytes import bundle_sizes
from aum_compress.budget.onnx_file import exported_file
from aum_compress.budget.records import BudgetReport, LayerCost, Limits, Operations, Stored, agree
from aum_compress.budget.stored import model_state, stored_by_module
from aum_compress.budget.torch_trace import Example
from aum_compress.budget.traced import traced_costs
from aum_compress.bundle import CARD, TENSORS, Bundle, file_sha256
from aum_compress.errors import AumError
from aum_compress.models.factory import Model, build_model, folded_config
from aum_compress.models.integer_inputs import default_storages
from aum_compress.models.mamba import MambaMixer
from aum_compress.models.mamba2 import Mamba2Mixer
from aum_compress.models.presets import LANES, PRESETS, front_end_of
from aum_compress.models.quantized import QuantizedLayer, stored_tensors, swap_in_quantized
from aum_compress.models.storage import WEIGHT_BITS


def check_module(
    model: nn.Module,
    example: Example,
    *,
    clip_seconds: float = 1.0,
    stored: Mapping[str, Tensor] | None = None,
    limits: Limits | None = None,
) -> BudgetReport:
    """The budget of any torch module, run once on an example of its input.

    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv1d(1, 8, 9, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 1998, 10))
    >>> report = check_module(model, torch.zeros(1, 1, 8000), clip_seconds=1.0)  # 1 s at 8 kHz, a batch of one
    >>> report.macs  # 1998 * 8 * 9 and 15984 * 10
    303696
    >>> report.param_bytes, report.over
    (639720, True)

    `budget.records.enforce(report)` raises BudgetExceeded for a model that is over. For one of the project's own
    models the count from its configuration must agree with the traced graph's, layer by layer.

    Args:
        model: in any mode and precision and on any device, `meta` included; it is copied, not changed.
        example: one clip, as the model is called with it: a tensor, a tuple of positional arguments or a dict of
            keyword arguments, among them integers (tokens) or nested tuples (states). Values do not matter, but for
            indices, which must be valid.
        clip_seconds: how much audio the example stands for; MACs are gated for one second.
        stored: name -> tensor at the width that the deployed model stores, with scales and zero points, where that is
            another than in memory (`budget.stored`); the model's own state when left out.
        limits: DCASE's when left out.

    Raises:
        AumError: an operator whose cost is unknown, named with its layer; a model that does not run on the example or
            branches on its values; two counts that differ; `stored` that lacks a tensor of the model.
    """
    if not clip_seconds > 0:
        raise AumError(f"clip_seconds: found {clip_seconds}, wanted a positive number")
    tensors = stored_by_module(model, stored)
    costs = traced_costs(model, example)
    operations = costs.operations
    witnesses = {"traced graph": {name: own.macs for name, own in operations.items()}}
    if isinstance(model, Model):
        wanted = (1, 1, model.config.n_mels, model.config.n_frames)
        if not isinstance(example, Tensor) or tuple(example.shape) != wanted:
            raise AumError(f"example of a {type(model).__name__}: wanted a tensor {wanted}, as its configuration says")
        witnesses["configuration"] = analytic_macs(model.config)
        agree(witnesses)
    modules = dict(model.named_modules())
    layers = []
    for name in dict.fromkeys((*modules, *tensors, *operations)):
        own, done = tensors.get(name, Stored()), operations.get(name, Operations())
        if own.param_bytes or done.macs or done.elementwise:
            cost = (own.param_bytes, own.params, done.macs, done.elementwise, own.wide_params)
            layers.append(LayerCost(name, _kind(modules[name]) if name in modules else "function", *cost))
    printed_bytes = dcase_bytes(model, model_state(model) if stored is None else stored)
    printed_macs = dcase_macs(model, example)
    notes = dcase_notes(model, sum(own.param_bytes for own in tensors.values()), printed_bytes, printed_macs)
    if costs.constant_bytes:
        notes.append(
            f"{costs.constant_bytes:,} bytes of tensors that are neither parameters nor persistent buffers are not "
            "counted: if the deployed model stores them, make them buffers"
        )
    return BudgetReport(
        layers=tuple(layers),
        limits=limits or Limits(),
        clip_seconds=clip_seconds,
        witnesses=tuple(witnesses),
        dcase_bytes=printed_bytes,
        dcase_macs=printed_macs,
        peak_activation_bytes=costs.peak_activation_bytes,
        notes=tuple(notes),
    )


def check_model(
    model: nn.Module, spec: InputSpec, stored: Mapping[str, Tensor] | None = None, limits: Limits | None = None
) -> BudgetReport:
    """`check_module` for a model that reads one clip's features (1,1,F,T), with the front-end's cost beside.

    Args:
        stored: the state at its stored width (`models.quantized.stored_tensors`); the model's own when left out.
        limits: DCASE's when left out.

    Raises:
        AumError: as `check_module`, and features that the model is not built for.
    """
    if isinstance(model, Model) and (model.config.n_mels, model.config.n_frames) != spec.feature_shape[1:]:
        raise AumError(
            f"features of one clip are {spec.feature_shape[1:]} mel bins x frames, the model's configuration says "
            f"{(model.config.n_mels, model.config.n_frames)}; use the input specification that it was built for"
        )
    features = torch.zeros(1, *spec.feature_shape)
    report = check_module(model, features, clip_seconds=spec.clip_seconds, stored=stored, limits=limits)
    return replace(report, front_end_macs=front_end_macs(spec))


def check_bundle(bundle: Bundle, limits: Limits | None = None) -> BudgetReport:
    """The budget of what a bundle holds: its tensors, or for an exported one its ONNX file.

    Where the bundle that it was exported from is still at hand, the bytes of the file must follow from its tensors.

    Raises:
        BundleError: tensors that do not fit the card, or no ONNX file of its precision. Also all that `check_model` and
            `check_onnx` raise.
    """
    card = bundle.card
    if card.kind == "onnx":
        path = exported_file(bundle)
        tensors = _parent_tensors(bundle)
        stored = None if tensors is None else bundle_sizes(tensors)
        return check_onnx(path, limits, config=card.model, stored=stored, clip_seconds=card.input.clip_seconds)
    return check_model(bundle.load_model(), card.input, bundle.tensors(), limits)


def _parent_tensors(bundle: Bundle) -> Path | None:
    """The tensors that a bundle was made from, if they are still where its card says, and unchanged."""
    parent = bundle.card.parent
    if parent is None:
        return None
    folder = bundle.path / parent.path
    if not (folder / CARD).is_file() or file_sha256(folder / CARD) != parent.sha256:
        return None
    return folder / TENSORS if (folder / TENSORS).is_file() else None


def check_preset(
    name: str, spec: InputSpec | None = None, n_classes: int = 10, limits: Limits | None = None
) -> BudgetReport:
    """The budget of a named model, by default on one second of audio through the front-end it is made for.

    A preset of a lane is counted as it ships, at the lane's precision and with batch normalisation folded; all others
    as they are trained, in float32.

    Raises:
        AumError: no such preset, or one that does not fit the features.
    """
    if name not in PRESETS:
        raise AumError(f"no preset is named {name!r}; there are {', '.join(PRESETS)}")
    spec = spec or InputSpec(front_end=front_end_of(name), clip_seconds=1.0)
    _, n_mels, n_frames = spec.feature_shape
    try:
        config = PRESETS[name](n_mels, n_frames, n_classes)
    except ValidationError as error:
        details = "; ".join(problem["msg"] for problem in error.errors())
        raise AumError(f"preset {name} does not fit {n_mels} mel bins x {n_frames} frames: {details}") from None
    if name in LANES:
        model = build_model(folded_config(config))
        if LANES[name] == "int8":
            swap_in_quantized(model, default_storages(model))
        return check_model(model, spec, stored_tensors(model, half=True), limits)
    with torch.device("meta"):  # neither drawn nor, for the large ones, computed with
        model = build_model(config)
    return check_model(model, spec, limits=limits)


def _kind(module: nn.Module) -> str:
    """How a layer is called in tables."""
    if isinstance(module, QuantizedLayer):
        return f"int{WEIGHT_BITS[module.storage]} {'linear' if module.convolution is None else 'conv'}"
    if isinstance(module, MambaMixer | Mamba2Mixer):
        return "scan"
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return "conv"
    return type(module).__name__.lower()
