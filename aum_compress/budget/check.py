"""Budget of a torch model, a bundle or a named preset."""

from collections.abc import Mapping

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from aum_compress.audio.config import InputSpec, LogMelConfig
from aum_compress.budget.analytic import analytic_macs, front_end_macs
from aum_compress.budget.check_onnx import check_onnx
from aum_compress.budget.dcase import INT8_NOTE, dcase_bytes, dcase_macs, holds_int8
from aum_compress.budget.records import BudgetReport, LayerCost, Limits, Operations, Stored, agree
from aum_compress.budget.stored import state_as_it_is, stored_by_module
from aum_compress.budget.traced import traced_operations
from aum_compress.bundle import Bundle
from aum_compress.errors import AumError
from aum_compress.models.factory import Model, build_model
from aum_compress.models.mamba import MambaMixer
from aum_compress.models.presets import PRESETS
from aum_compress.models.quantized import QuantizedLayer


def check_model(
    model: nn.Module, spec: InputSpec, stored: Mapping[str, Tensor] | None = None, limits: Limits | None = None
) -> BudgetReport:
    """The budget of a model that reads one clip's features (1,1,F,T).

    For the project's own models the count from configuration must agree with the traced graph's, layer by layer.

    Args:
        stored: the state at its stored width (`models.quantized.stored_tensors`); the model's own when left out.
        limits: DCASE's when left out.

    Raises:
        AumError: an operator whose cost is unknown, two counts that differ, or features that the model does not take.
    """
    ours = isinstance(model, Model)
    if ours and (model.config.n_mels, model.config.n_frames) != spec.feature_shape[1:]:
        raise AumError(
            f"features of one clip are {spec.feature_shape[1:]} mel bins x frames, the model's configuration says "
            f"{(model.config.n_mels, model.config.n_frames)}; use the input specification that it was built for"
        )
    state = state_as_it_is(model) if stored is None else stored
    tensors = stored_by_module(model, state)
    operations = traced_operations(model, spec.feature_shape)
    witnesses = {"traced graph": {name: own.macs for name, own in operations.items()}}
    if ours:
        witnesses["configuration"] = analytic_macs(model.config)
        agree(witnesses)
    layers = []
    for name, module in model.named_modules():
        own, done = tensors.get(name, Stored()), operations.get(name, Operations())
        if own.param_bytes or done.macs or done.elementwise:
            cost = (own.param_bytes, own.params, done.macs, done.elementwise, own.wide_params)
            layers.append(LayerCost(name, _kind(module), *cost))
    return BudgetReport(
        layers=tuple(layers),
        limits=limits or Limits(),
        clip_seconds=spec.clip_seconds,
        witnesses=tuple(witnesses),
        dcase_bytes=dcase_bytes(model, state),
        dcase_macs=dcase_macs(model, spec.feature_shape),
        front_end_macs=front_end_macs(spec),
        notes=(INT8_NOTE,) if holds_int8(model) else (),
    )


def check_bundle(bundle: Bundle, limits: Limits | None = None) -> BudgetReport:
    """The budget of what a bundle holds: its tensors, or for an exported one its ONNX file.

    Raises:
        BundleError: tensors that do not fit the card. Also all that `check_model` and `check_onnx` raise.
    """
    card = bundle.card
    if card.kind == "onnx":
        path = bundle.path / f"model-{card.precision}.onnx"
        return check_onnx(path, limits, config=card.model, clip_seconds=card.input.clip_seconds)
    return check_model(bundle.load_model(), card.input, bundle.tensors(), limits)


def check_preset(
    name: str, spec: InputSpec | None = None, n_classes: int = 10, limits: Limits | None = None
) -> BudgetReport:
    """The budget of a named model in float32, by default on one second of audio through the DCASE front-end.

    Raises:
        AumError: no such preset, or one that does not fit the features.
    """
    if name not in PRESETS:
        raise AumError(f"no preset is named {name!r}; there are {', '.join(PRESETS)}")
    spec = spec or InputSpec(front_end=LogMelConfig(), clip_seconds=1.0)
    _, n_mels, n_frames = spec.feature_shape
    try:
        config = PRESETS[name](n_mels, n_frames, n_classes)
    except ValidationError as error:
        details = "; ".join(problem["msg"] for problem in error.errors())
        raise AumError(f"preset {name} does not fit {n_mels} mel bins x {n_frames} frames: {details}") from None
    with torch.random.fork_rng(devices=[]):  # a check must not change what training draws
        return check_model(build_model(config), spec, limits=limits)


def _kind(module: nn.Module) -> str:
    """How a layer is called in tables."""
    if isinstance(module, QuantizedLayer):
        return "int8 linear" if module.convolution is None else "int8 conv"
    if isinstance(module, MambaMixer):
        return "scan"
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return "conv"
    return type(module).__name__.lower()
