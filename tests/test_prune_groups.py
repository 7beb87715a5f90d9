"""The tables of what goes together, held against the groups that Torch-Pruning finds by tracing the model."""

import warnings
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from tiny import N_FRAMES, N_MELS, student_config, trained_like
from torch import nn

from aum_compress.compress.prune_dimensions import dimensions
from aum_compress.models.config import ConvBlockConfig, ConvStage, ConvStem
from aum_compress.models.mamba import MambaMixer

NORM = ("weight", "bias", "running_mean", "running_var")


def traced_group(model, graph, layer, member):
    """(tensor, axis) -> entries that Torch-Pruning removes with output `member` of a layer."""
    names = {module: name for name, module in model.named_modules()}
    prune = tp.prune_linear_out_channels if isinstance(layer, nn.Linear) else tp.prune_conv_out_channels
    found = {}
    for dependency, entries in graph.get_pruning_group(layer, prune, idxs=[member]):
        module = dependency.target.module
        if isinstance(module, nn.Parameter):
            name = next(name for name, parameter in model.named_parameters() if parameter is module)
            found.setdefault((name, graph.unwrapped_parameters_axis[name]), set()).update(entries)
            continue
        if module not in names:  # an operation without weights
            continue
        outputs = "out" in dependency.handler.__name__
        tensors = NORM if isinstance(module, nn.BatchNorm2d) else ("weight", "bias") if outputs else ("weight",)
        for tensor in tensors:
            if getattr(module, tensor) is not None:
                key = (f"{names[module]}.{tensor}", 0 if outputs else 1)
                found.setdefault(key, set()).update(entries)
    return found


def our_group(dimension, member):
    found = {}
    for part in dimension.slices:
        entries = part.entries[part.members == member].ravel().tolist()
        if entries:
            found.setdefault((part.tensor, part.axis), set()).update(entries)
    return found


def test_stem():
    """Plain stages, strides, one shortcut behind another. Tokens are cells: Torch-Pruning finds only the first of the
    rows of a channel that a whole frame's token reads (equality with the masked model covers those)."""
    stages = (
        ConvStage(channels=8, stride_frames=2, expansion=0),
        ConvStage(channels=12),
        ConvStage(channels=12, stride_mels=1),
        ConvStage(channels=12, stride_mels=1),
        ConvStage(channels=10, expansion=0),
        ConvStage(channels=10, stride_mels=1, expansion=3),
    )
    config = student_config().model_copy(update={"stem": ConvStem(stages=stages, token="cell")})
    model = trained_like(config)
    graph = tp.DependencyGraph().build_dependency(model.patch_embed, torch.randn(1, 1, N_MELS, N_FRAMES))
    checked = set()
    for dimension in dimensions(config):
        if dimension.kind not in ("channels", "hidden"):
            continue
        number = int(dimension.place.split(".")[1])
        stage = model.patch_embed.stages[number]
        layer = (
            stage[0] if isinstance(stage, nn.Sequential) else stage.layers[0 if dimension.kind == "hidden" else 2][0]
        )
        for member in (0, dimension.size - 1):
            traced = traced_group(model.patch_embed, graph, layer, member)
            found = {
                (name.removeprefix("patch_embed."), axis): e for (name, axis), e in our_group(dimension, member).items()
            }
            assert found == traced
        checked.add(dimension.place)
    assert checked == {
        *("stem.0.channels", "stem.1.hidden", "stem.1.channels", "stem.2.hidden", "stem.3.hidden"),
        *("stem.4.channels", "stem.5.hidden"),
    }


def surrogate(mixer: MambaMixer, tokens):
    """The modules and parameters of a mixer with the same coupling, but without the scan, which misleads the tracer."""
    x, z = mixer.in_proj(tokens).transpose(1, 2).chunk(2, dim=1)
    # one consumer for each half: offsets of a split are counted by consumers, not by outputs
    x, z = x * 1.0, z * 1.0
    total = 0.0
    for suffix in mixer.config.projections:
        # the mean over time: slicing the time axis would be taken for channel slicing
        u = F.silu(getattr(mixer, f"conv1d{suffix}")(F.pad(x, (mixer.config.d_conv - 1, 0))))
        u = u.mean(2, keepdim=True).transpose(1, 2)
        projected = getattr(mixer, f"x_proj{suffix}")(u)
        mixer.side.append(projected)
        rank = projected[..., : mixer.config.dt_rank].detach().requires_grad_()
        total = total + u * getattr(mixer, f"dt_proj{suffix}")(rank) * getattr(mixer, f"D{suffix}")
    for suffix in mixer.config.scans:
        total = total * getattr(mixer, f"A{suffix}_log").select(1, 0)
    return mixer.out_proj(total * z.transpose(1, 2))


@pytest.mark.parametrize("block_type", ["none", "v1", "v2"])
def test_inner_width_of_mamba(block_type):
    config = student_config(block_type=block_type)
    model = trained_like(config)
    side = []
    for block in model.layers:
        block.mixer.forward, block.mixer.side = MethodType(surrogate, block.mixer), side

    def trace(module, tokens):
        side.clear()
        for block in module.layers:
            tokens = tokens + block.mixer(block.norm(tokens))
        return [tokens, *side]

    bare = [(parameter, 0) for name, parameter in model.named_parameters() if name.endswith(("_log", ".D", ".D_b"))]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        graph = tp.DependencyGraph().build_dependency(
            model, torch.randn(1, 3, config.d_model), forward_fn=trace, unwrapped_parameters=bare
        )
    graph.unwrapped_parameters_axis = dict.fromkeys((name for name, _ in model.named_parameters()), 0)
    for dimension in (d for d in dimensions(config) if d.kind == "d_inner"):
        layer = model.layers[dimension.block].mixer.in_proj
        for member in (0, 5, dimension.size - 1):
            assert our_group(dimension, member) == traced_group(model, graph, layer, member)


def test_inner_width_of_the_gated_convolution():
    blocks = (ConvBlockConfig(d_inner=12, d_conv=3),)
    config = student_config().model_copy(update={"blocks": blocks})
    model = trained_like(config)
    mixer = model.layers[0].mixer

    def forward(mixer, tokens):
        x, z = mixer.in_proj(tokens).transpose(1, 2).chunk(2, dim=1)
        return mixer.out_proj((mixer.conv1d(F.pad(x, (1, 1))) * z).transpose(1, 2))

    mixer.forward = MethodType(forward, mixer)
    graph = tp.DependencyGraph().build_dependency(mixer, torch.randn(1, 3, config.d_model))
    (dimension,) = (d for d in dimensions(config) if d.kind == "d_inner")
    for member in (0, 11):
        found = {
            (name.removeprefix("layers.0.mixer."), axis): e for (name, axis), e in our_group(dimension, member).items()
        }
        assert found == traced_group(mixer, graph, mixer.in_proj, member)
