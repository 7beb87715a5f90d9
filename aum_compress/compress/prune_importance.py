"""How much a model would miss each member of its dimensions: by gradient, by what flows through it, by its weights.

A member's effect leaves it through the weights that read it (`Slice.reads`), and through no others:

    taylor      mean over batches of |sum of weight x gradient| over those weights: what the training loss would change,
                to first order, if the member were gone (Molchanov et al. 2019, "Importance Estimation", eq. 8, a batch
                in place of a sample)
    activation  what the member adds to what comes behind: root mean square of its activation times the length of the
                weights that read it (a structured form of Wanda, Sun et al. 2023); for a state, of its own share of
                the scan's output, C_n h_n (as GHOST's controllability times observability), behind gate and out_proj
    magnitude   length of all that it has in matrices and kernels, of batch normalisation its factor

Scores of `taylor` are in units of the loss and compare anywhere; the other two compare within one dimension.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aum_compress.compress.prune_dimensions import Dimension, Slice
from aum_compress.models.audio_mamba import AudioMamba
from aum_compress.models.config import BlockConfig, Mamba2BlockConfig
from aum_compress.models.mamba import MambaMixer
from aum_compress.models.mamba2 import Mamba2Mixer
from aum_compress.models.scan import selective_scan
from aum_compress.models.ssd import ssd

Importance = Literal["taylor", "activation", "magnitude"]
Losses = Callable[[nn.Module], Iterator[Tensor]]
"""The training loss of a model on each of some batches."""


def member_scores(
    model: AudioMamba, wanted: Sequence[Dimension], importance: Importance, losses: Losses
) -> dict[str, np.ndarray]:
    """Place -> (lanes * size,) scores of its members, the least important lowest; the model is left in its mode.

    Args: wanted: any but `blocks` and `directions`, of which there are so few that leaving each out can be tried.
    """
    training = model.training
    model.eval()
    try:
        return {"taylor": _taylor, "activation": _activation, "magnitude": _magnitude}[importance](
            model, wanted, losses
        )
    finally:
        model.zero_grad()
        model.train(training)


def unit_scores(dimension: Dimension, scores: np.ndarray) -> np.ndarray:
    """(size,) of the least important member of every lane together, of the second least, ...: ascending."""
    return np.sort(scores.reshape(dimension.lanes, dimension.size), axis=1).sum(0)


def best_members(dimension: Dimension, scores: np.ndarray, size: int) -> list[int]:
    """Numbers of the `size` most important members of every lane, ascending."""
    by_lane = np.argsort(-scores.reshape(dimension.lanes, dimension.size), axis=1, kind="stable")[:, :size]
    first = np.arange(dimension.lanes)[:, None] * dimension.size
    return sorted((by_lane + first).ravel().tolist())


def _taylor(model: AudioMamba, wanted: Sequence[Dimension], losses: Losses) -> dict[str, np.ndarray]:
    parameters = dict(model.named_parameters())
    found = {dimension.place: np.zeros(dimension.lanes * dimension.size) for dimension in wanted}
    batches = 0
    for loss in losses(model):
        model.zero_grad()
        loss.backward()
        batches += 1
        effects = {n: (p * p.grad).detach().double() for n, p in parameters.items() if p.grad is not None}
        for dimension in wanted:
            change = np.zeros(dimension.lanes * dimension.size)
            for part in dimension.slices:
                if part.reads and part.tensor in effects:
                    change[part.members] += _by_member(part, effects[part.tensor])
            found[dimension.place] += np.abs(change)
    return {place: scores / max(batches, 1) for place, scores in found.items()}


def _magnitude(model: AudioMamba, wanted: Sequence[Dimension], losses: Losses) -> dict[str, np.ndarray]:
    state = model.state_dict()
    norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    found = {}
    for dimension in wanted:
        squares = np.zeros(dimension.lanes * dimension.size)
        for part in dimension.slices:
            tensor = state[part.tensor]
            if part.tensor in norms or (part.tensor.endswith("weight") and tensor.dim() > 1):
                squares[part.members] += _by_member(part, tensor.double().square())
        found[dimension.place] = np.sqrt(squares)
    return found


def _by_member(part: Slice, values: Tensor) -> np.ndarray:
    """(m,) sums of `values`, of the tensor's shape, over what each member has."""
    others = [axis for axis in range(values.dim()) if axis != part.axis]
    along = (values.sum(others) if others else values).cpu().numpy()
    return along[part.entries].sum(1)


def _activation(model: AudioMamba, wanted: Sequence[Dimension], losses: Losses) -> dict[str, np.ndarray]:
    # what x_proj makes of a channel (steps, B, C) is of another unit than what out_proj does: it takes no part
    reading = {
        dimension.place: [part for part in dimension.slices if part.reads and ".x_proj" not in part.tensor]
        for dimension in wanted
        if dimension.kind != "d_state"
    }
    names = {part.tensor for parts in reading.values() for part in parts}
    readers = {name: model.get_submodule(name.removesuffix(".weight")) for name in names}
    inputs = {name: _Squares() for name in names}
    states = {d.block: _Squares() for d in wanted if d.kind == "d_state"}
    hooks = [readers[name].register_forward_pre_hook(_watch_channels(inputs[name])) for name in names]
    hooks += [
        model.layers[block].mixer.register_forward_pre_hook(_watch_states(squares)) for block, squares in states.items()
    ]
    try:
        with torch.no_grad():
            for _ in losses(model):
                pass
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for dimension in wanted:
        if dimension.kind == "d_state":
            found[dimension.place] = states[dimension.block].rms()
            continue
        scores = np.zeros(dimension.lanes * dimension.size)
        for part in reading[dimension.place]:
            weight = readers[part.tensor].weight.detach().double()
            lengths = weight.square().sum([axis for axis in range(weight.dim()) if axis != 1]).sqrt().cpu().numpy()
            scores[part.members] += (lengths * inputs[part.tensor].rms())[part.entries].sum(1)
        found[dimension.place] = scores
    return found


class _Squares:
    """A mean of squares by channel over everything that is added."""

    def __init__(self) -> None:
        self.total: np.ndarray | float = 0.0
        self.count = 0

    def add(self, sums: Tensor, count: int) -> None:
        self.total = self.total + sums.double().cpu().numpy()
        self.count += count

    def rms(self) -> np.ndarray:
        return np.sqrt(self.total / max(self.count, 1))


def _watch_channels(squares: _Squares) -> Callable:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        channel = 1 if isinstance(module, nn.Conv2d) else args[0].dim() - 1
        x = args[0].detach().float().square()
        squares.add(x.sum([axis for axis in range(x.dim()) if axis != channel]), x.numel() // x.shape[channel])

    return hook


def _watch_states(squares: _Squares) -> Callable:
    """Of each state of each lane the power of what it alone adds to the mixer's output."""
    shares = {BlockConfig: _mamba_states, Mamba2BlockConfig: _mamba2_states}

    def hook(mixer: MambaMixer | Mamba2Mixer, args: tuple[Tensor, ...]) -> None:
        tokens = args[0].detach()
        power = [y.float().square().sum() for y in shares[type(mixer.config)](mixer, tokens)]
        squares.add(torch.stack(power), tokens.shape[0] * tokens.shape[1])

    return hook


def _mamba_states(mixer: MambaMixer, tokens: Tensor) -> Iterator[Tensor]:
    """(B,D,L) of every state: the scan with this state alone, gated, each channel times the length of its out_proj."""
    config = mixer.config
    x, z = mixer.in_proj(tokens).transpose(1, 2).chunk(2, dim=1)
    lengths = mixer.out_proj.weight.norm(dim=0)[:, None]
    for lane, suffix in enumerate(config.projections):
        backward = lane == 1  # of v2; v1 turns round what the convolution gave
        u, delta, b, c = mixer.scan_inputs(x.flip(-1) if backward else x, suffix)
        gate = z.flip(-1) if backward else z
        for n in range(config.d_state):
            total: Tensor | float = 0.0
            for scan in config.scans if config.block_type != "v2" else (suffix,):
                parts = [u, delta, b[:, n : n + 1], c[:, n : n + 1], gate]
                turned = config.block_type == "v1" and scan == "_b"
                u_, delta_, b_, c_, z_ = (t.flip(-1) if turned else t for t in parts)
                rates = -torch.exp(getattr(mixer, f"A{scan}_log").float()[:, n : n + 1])
                y = selective_scan(u_, delta_, rates, b_.contiguous(), c_.contiguous(), None, z_, delta_softplus=True)
                total = total + (y.flip(-1) if turned else y)
            yield total * lengths


def _mamba2_states(mixer: Mamba2Mixer, tokens: Tensor) -> Iterator[Tensor]:
    """(B,L,D) of every state, as `_mamba_states`; the norm behind is taken for its weights alone."""
    config = mixer.config
    d_inner, d_state = config.d_inner, config.d_state
    z, xbc, dt = mixer.in_proj(tokens).split([d_inner, d_inner + 2 * d_state, config.n_heads], dim=-1)
    before = (config.d_conv - 1) // 2 if config.two_way else config.d_conv - 1
    xbc = F.silu(mixer.conv1d(F.pad(xbc.transpose(1, 2), (before, config.d_conv - 1 - before)))).transpose(1, 2)
    x, b, c = xbc.split([d_inner, d_state, d_state], dim=-1)
    heads, steps = x.unflatten(2, (config.n_heads, config.head_dim)), F.softplus(dt + mixer.dt_bias)
    lengths = mixer.out_proj.weight.norm(dim=0) * mixer.norm.weight.abs()
    rates, none = -torch.exp(mixer.A_log.float()), torch.zeros_like(mixer.D)
    for n in range(d_state):
        y = ssd(heads, steps, rates, b[..., n : n + 1], c[..., n : n + 1], none, config.two_way).flatten(2)
        yield y * F.silu(z) * lengths
