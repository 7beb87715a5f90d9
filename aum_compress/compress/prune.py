"""Structured pruning of d_inner over all Mamba blocks together: channels leave the tensors, no mask stays.

Torch-Pruning finds the coupled slices and ranks them. It traces the graph by module hooks and autograd, and a real scan
misleads it (it takes the outer products of D and N for element-wise operations). So while it traces, each mixer's
forward is replaced by a *structural surrogate* of the same modules and parameters with the same coupling along d_inner:
in_proj rows i and i+D; convolution, dt_proj row, A and D row i, x_proj and out_proj column i, for each direction that
has its own. The importance still comes from the gradients of the real forward.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from aum_compress.errors import AumError
from aum_compress.models.audio_mamba import AudioMamba
from aum_compress.models.mamba import MambaMixer

TRACED_TOKENS = 3


@dataclass(frozen=True)
class PruneResult:
    """Widths of each block before and after one step."""

    d_inner_before: tuple[int, ...]
    d_inner_after: tuple[int, ...]


def prune_d_inner(
    model: AudioMamba,
    ratio: float,
    *,
    importance: str = "taylor",
    round_to: int = 8,
    max_block_ratio: float = 0.75,
    backward: Callable[[nn.Module], None] | None = None,
) -> tuple[AudioMamba, PruneResult]:
    """A smaller model: `ratio` of all d_inner channels removed, ranked over all blocks together.

    Args:
        ratio: aimed at; widths are then rounded to the nearest multiple of `round_to`.
        importance: `taylor`, |sum of weight x gradient| over each coupled group, or `magnitude`, its L2 norm.
        backward: called once with the model to leave gradients of the real loss in it; `taylor` needs it.

    Returns:
        A new model rebuilt from its configuration, in evaluation mode, and the widths. `model` is used up.

    Raises:
        AumError: nothing could be removed: the ratio is too small for `round_to`; or blocks of another mixer.
    """
    if importance == "taylor":
        if backward is None:
            raise ValueError("importance 'taylor' needs `backward`")
        model.zero_grad()
        backward(model)
    if others := sorted({block.mixer for block in model.config.blocks} - {"mamba"}):
        raise AumError(f"prune: works on mamba blocks, and the model has {', '.join(others)}; leave the section out")
    before = tuple(block.mixer.config.d_inner for block in model.layers)
    mixers = [block.mixer for block in model.layers]
    ranking = (
        tp.importance.GroupTaylorImportance() if importance == "taylor" else tp.importance.GroupMagnitudeImportance(p=2)
    )
    with _surrogate_forward(mixers) as side_outputs, warnings.catch_warnings():
        # norms lie along d_model, which is not pruned: nothing to declare for them
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        pruner = _NearestPruner(
            model,
            torch.randn(1, TRACED_TOKENS, model.config.d_model),
            importance=ranking,
            global_pruning=True,
            isomorphic=True,
            pruning_ratio=ratio,
            max_pruning_ratio=max_block_ratio,
            round_to=round_to,
            forward_fn=lambda module, tokens: _trace_blocks(module, tokens, side_outputs),
            unwrapped_parameters=_unwrapped(mixers),
            ignored_layers=_outputs_kept(mixers),
            # in_proj's rows are x and z: i and i+D must be ranked and removed together. Fresh dicts: the constructor
            # writes into its own mutable defaults
            out_channel_groups={mixer.in_proj: 2 for mixer in mixers},
            num_heads={},
            in_channel_groups={},
            customized_pruners={},
            pruning_ratio_dict={},
        )
        pruner.step()
    after = tuple(mixer.out_proj.in_features for mixer in mixers)
    if before == after:
        raise AumError(
            f"prune: ratio {ratio:g} removed nothing from d_inner {list(before)} in multiples of {round_to}. "
            "Raise prune.ratio or lower prune.round_to"
        )
    return _rebuild(model, after), PruneResult(before, after)


def _rebuild(model: AudioMamba, widths: tuple[int, ...]) -> AudioMamba:
    """The pruned tensors in a model built from the new configuration: proof that the configuration says it all."""
    blocks = tuple(
        block.model_copy(update={"d_inner": width}) for block, width in zip(model.config.blocks, widths, strict=True)
    )
    rebuilt = AudioMamba(model.config.model_copy(update={"blocks": blocks}))
    rebuilt.load_state_dict(model.state_dict())
    return rebuilt.eval()


class _NearestPruner(tp.pruner.BasePruner):
    """Rounds widths to the nearest multiple; the original always rounds down, which removes far more than was asked."""

    def _round_to(self, n_pruned: int, current_channels: int, round_to: int) -> int:
        width = round((current_channels - n_pruned) / round_to) * round_to
        return min(max(current_channels - max(width, round_to), 0), current_channels)


def _unwrapped(mixers: list[MambaMixer]) -> list[tuple[nn.Parameter, int]]:
    """The mixers' bare parameters and the axis of theirs that is d_inner."""
    found = []
    for mixer in mixers:
        found += [(getattr(mixer, f"A{suffix}_log"), 0) for suffix in mixer.config.scans]
        found += [(getattr(mixer, f"D{suffix}"), 0) for suffix in mixer.config.projections]
    return found


def _outputs_kept(mixers: list[MambaMixer]) -> list[nn.Module]:
    """Layers whose outputs are not d_inner. Their inputs are still trimmed."""
    kept: list[nn.Module] = []
    for mixer in mixers:
        kept += [mixer.out_proj, *(getattr(mixer, f"x_proj{suffix}") for suffix in mixer.config.projections)]
    return kept


def _trace_blocks(model: AudioMamba, tokens: Tensor, side_outputs: list[Tensor]) -> list[Tensor]:
    """The blocks alone: stem, class token and head have no d_inner, and reshapes mislead the tracer."""
    side_outputs.clear()
    for block in model.layers:
        # what a block takes for a sequence has no bearing on its channels
        tokens = tokens + block.mixer(block.norm(tokens))
    return [tokens, *side_outputs]


@contextmanager
def _surrogate_forward(mixers: list[MambaMixer]) -> Iterator[list[Tensor]]:
    """Replaces the mixers' forward while Torch-Pruning traces; yields the side outputs that keep x_proj in reach."""
    side_outputs: list[Tensor] = []

    def forward(mixer: MambaMixer, tokens: Tensor) -> Tensor:
        x, z = mixer.in_proj(tokens).transpose(1, 2).chunk(2, dim=1)
        # one consumer for each half: offsets of a split are counted by consumers, not by outputs
        x, z = x * 1.0, z * 1.0
        total: Tensor | float = 0.0
        for suffix in mixer.config.projections:
            # whole window at once and the mean over time: slicing the time axis would be taken for channel slicing
            u = F.silu(getattr(mixer, f"conv1d{suffix}")(F.pad(x, (mixer.config.d_conv - 1, 0))))
            u = u.mean(2, keepdim=True).transpose(1, 2)
            projected = getattr(mixer, f"x_proj{suffix}")(u)
            side_outputs.append(projected)
            rank = projected[..., : mixer.config.dt_rank].detach().requires_grad_()
            dt = getattr(mixer, f"dt_proj{suffix}")(rank)
            total = total + u * dt * getattr(mixer, f"D{suffix}")
        for suffix in mixer.config.scans:
            total = total * getattr(mixer, f"A{suffix}_log").select(1, 0)
        return mixer.out_proj(total * z.transpose(1, 2))

    for mixer in mixers:
        mixer.forward = MethodType(forward, mixer)
    try:
        yield side_outputs
    finally:
        for mixer in mixers:
            del mixer.forward
