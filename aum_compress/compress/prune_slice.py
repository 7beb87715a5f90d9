"""A smaller model from a larger one: members leave the tensors, no mask stays."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from aum_compress.compress.prune_dimensions import Dimension, dimensions, resized
from aum_compress.models.audio_mamba import AudioMamba
from aum_compress.models.config import AudioMambaConfig, BlockConfig

Kept = Mapping[str, Sequence[int]]
"""Place of a dimension -> numbers of the members that stay, as many of each lane. A block that goes has none."""


def slice_model(model: AudioMamba, kept: Kept) -> AudioMamba:
    """A new model of the members named in `kept`, and of all of the dimensions that it does not name.

    It is built from its own configuration, in the mode (training or evaluation) of `model`, which stays as it is. Its
    parameters are new ones: an optimiser has to be made for them.

    Raises:
        ValueError: a place or a member that the model does not have, or lanes of different sizes.
    """
    known = {dimension.place: dimension for dimension in dimensions(model.config)}
    if unknown := kept.keys() - known.keys():
        raise ValueError(f"no such dimension: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    sizes = {place: _size(known[place], members) for place, members in kept.items()}
    config = AudioMambaConfig.model_validate(resized(model.config, sizes).model_dump())
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for (name, axis), entries in _removed(known, kept).items():
        stay = np.setdiff1d(np.arange(state[name].shape[axis]), entries)
        state[name] = state[name].index_select(axis, torch.from_numpy(stay).to(state[name].device))
    for number, block in enumerate(model.config.blocks):
        if sizes.get(f"layers.{number}.directions") == 1:
            _drop_backward(state, f"layers.{number}.mixer.", block)
    with torch.device("meta"):  # drawing weights would only move the generator on
        smaller = AudioMamba(config)
    smaller.load_state_dict(_renumbered(state, sizes), assign=True)
    smaller.activation_checkpointing = model.activation_checkpointing
    return smaller.train(model.training)


def merge_ranks_(model: AudioMamba) -> None:
    """Writes each step-size projection in the basis of its singular vectors, in place; the model computes the same.

    dt_proj x_proj[:R] = U S V^T has rank R at most: dt_proj becomes U sqrt(S), and x_proj's first R rows sqrt(S) V^T.
    Then a rank is a member like any other, and leaving out the last ones is the best approximation of fewer ranks.
    """
    for layer in model.layers:
        config = layer.mixer.config
        for suffix in config.projections if isinstance(config, BlockConfig) else ():
            x_proj = getattr(layer.mixer, f"x_proj{suffix}").weight
            dt_proj = getattr(layer.mixer, f"dt_proj{suffix}").weight
            with torch.no_grad():
                down, up = x_proj[: config.dt_rank].double(), dt_proj.double()
                # of the small triangular factors, not of the (D,D) product
                q_up, r_up = torch.linalg.qr(up)
                q_down, r_down = torch.linalg.qr(down.T)
                left, values, right = torch.linalg.svd(r_up @ r_down.T)
                scale = values.sqrt()
                found = (q_up @ left[:, : len(scale)]) * scale, scale[:, None] * (right[: len(scale)] @ q_down.T)
                for target, new in zip((dt_proj, x_proj[: config.dt_rank]), found):
                    target.zero_()  # of fewer channels than ranks, the ranks behind have nothing
                    part = target[:, : len(scale)] if target is dt_proj else target[: len(scale)]
                    part.copy_(new)


def _size(dimension: Dimension, members: Sequence[int]) -> int:
    lanes = [0] * dimension.lanes
    for member in members:
        if not 0 <= member < dimension.lanes * dimension.size:
            raise ValueError(f"{dimension.place}: has no member {member}")
        lanes[member // dimension.size] += 1
    if len(set(lanes)) > 1 or len(set(members)) < len(members) or lanes[0] < dimension.smallest:
        raise ValueError(
            f"{dimension.place}: {lanes} of {dimension.size} members stay; wanted as many of each lane, "
            f"each named once, and at least {dimension.smallest}"
        )
    return lanes[0]


def _removed(known: Mapping[str, Dimension], kept: Kept) -> dict[tuple[str, int], np.ndarray]:
    """(tensor, axis) -> entries that go."""
    found = defaultdict(list)
    for place, members in kept.items():
        for part in known[place].slices:
            found[part.tensor, part.axis].append(part.entries[~np.isin(part.members, members)].ravel())
    return {key: np.concatenate(entries) for key, entries in found.items()}


def _drop_backward(state: dict[str, Tensor], mixer: str, block: BlockConfig) -> None:
    if block.block_type == "v2":  # its directions' sum is halved, one alone is not
        state[f"{mixer}out_proj.weight"] *= 0.5
    backward = re.compile(rf"{re.escape(mixer)}(\w+_b\.(weight|bias)|D_b|A_b_log)")
    for name in [name for name in state if backward.fullmatch(name)]:
        del state[name]


def _renumbered(state: dict[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Without the blocks that go, the others counted through."""
    found, numbers = {}, {}
    for name, tensor in state.items():
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            if sizes.get(f"layers.{number}") == 0:
                continue
            name = f"layers.{numbers.setdefault(number, len(numbers))}.{rest}"
        found[name] = tensor
    return found
