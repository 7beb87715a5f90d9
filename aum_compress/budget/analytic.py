"""First witness: MACs from configuration alone, by layer. Torch-free; it sees neither a model nor a graph.

Formulas: DESIGN section 2. Letters: `M` d_model, `D` d_inner, `N` d_state, `R` dt_rank, `K` conv taps, `L` tokens,
`F` mel bins, `T` frames. Layers are named as the model's modules are.
"""

import math

from aum_compress.audio.config import InputSpec
from aum_compress.audio.front_ends import frame_macs
from aum_compress.models.config import (
    MLP_HEAD_WIDTH,
    AudioMambaConfig,
    Block,
    ConvBlockConfig,
    ConvStem,
    CPMobileConfig,
    Grid,
    Mamba2BlockConfig,
    stem_grid,
)


def analytic_macs(config: AudioMambaConfig | CPMobileConfig) -> dict[str, int]:
    """Layer -> MACs for one clip, (1,1,F,T) to (1,C).

    Every linear, convolution and scan is listed, the scan under the name of its mixer; other layers multiply nothing
    that counts as a MAC.
    """
    return _audio_mamba(config) if isinstance(config, AudioMambaConfig) else _cp_mobile(config)


def scan_macs(d_inner: int, d_state: int, n_tokens: int) -> int:
    """One direction of a gated selective scan with skip: discretise 2DN, recur DN, read out DN, dt*u, D*u, gate."""
    return n_tokens * (4 * d_inner * d_state + 3 * d_inner)


def ssd_macs(d_inner: int, d_state: int, n_tokens: int) -> int:
    """A scan in matmul form over one sequence: C B^T, and the weights that it gives times x of all heads."""
    return n_tokens * n_tokens * (d_state + d_inner)


def front_end_macs(spec: InputSpec) -> int:
    """Multiplications of the front-end for one second of audio, outside every budget; an estimate (`frame_macs`)."""
    frame = frame_macs(spec.front_end.model_dump())
    return math.ceil(spec.front_end.n_frames(spec.clip_seconds) * frame / spec.clip_seconds)


def _audio_mamba(config: AudioMambaConfig) -> dict[str, int]:
    d_model = config.d_model
    found = _stem(config)
    for number, block in enumerate(config.blocks):
        found |= _mixer(f"layers.{number}.mixer", block, d_model, config.sequence(block))
    if config.head == "mlp":
        width = MLP_HEAD_WIDTH
        return found | {"head.hidden": d_model * width, "head.classes": width * config.n_classes}
    # with batch normalisation, until it is folded, each token has logits
    readings = config.n_tokens if config.head == "batch_norm" else 1
    return found | {"head": readings * d_model * config.n_classes}


def _mixer(name: str, block: Block, d_model: int, sequences: tuple[int, int]) -> dict[str, int]:
    """Args: sequences: how many there are in one clip, and their length."""
    number, length = sequences
    n_tokens, d_inner = number * length, block.d_inner
    found = {f"{name}.out_proj": n_tokens * d_inner * d_model}
    if isinstance(block, Mamba2BlockConfig):
        mixed = d_inner + 2 * block.d_state
        return found | {
            name: number * ssd_macs(d_inner, block.d_state, length),
            f"{name}.in_proj": n_tokens * d_model * (d_inner + mixed + block.n_heads),
            f"{name}.conv1d": n_tokens * mixed * block.d_conv,
        }
    found[f"{name}.in_proj"] = n_tokens * d_model * 2 * d_inner
    if isinstance(block, ConvBlockConfig):
        return found | {f"{name}.conv1d": n_tokens * d_inner * block.d_conv}
    d_state, dt_rank = block.d_state, block.dt_rank
    found[name] = len(block.scans) * scan_macs(d_inner, d_state, n_tokens)
    for suffix in block.projections:
        found[f"{name}.conv1d{suffix}"] = n_tokens * d_inner * block.d_conv
        found[f"{name}.x_proj{suffix}"] = n_tokens * d_inner * (dt_rank + 2 * d_state)
        found[f"{name}.dt_proj{suffix}"] = n_tokens * dt_rank * d_inner
    return found


def _stem(config: AudioMambaConfig) -> dict[str, int]:
    stem, name = config.stem, "patch_embed"
    rows, columns = stem_grid(stem, config.n_mels, config.n_frames)
    if not isinstance(stem, ConvStem):
        return {f"{name}.proj": rows * columns * config.d_model * stem.patch_mels * stem.patch_frames}
    found: dict[str, int] = {}
    inputs, grid = 1, (config.n_mels, config.n_frames)
    for number, stage in enumerate(stem.stages):
        stride = (stage.stride_mels, stage.stride_frames)
        place = f"{name}.stages.{number}"
        if stage.expansion:
            hidden = stage.hidden_channels(inputs)
            found |= _inverted_residual(place, inputs, hidden, stage.channels, grid, stride)
            grid = _strided(grid, stride)
        else:
            grid = _strided(grid, stride)
            found[f"{place}.0"] = math.prod(grid) * 9 * inputs * stage.channels
        inputs = stage.channels
    # by frame, one token reads a column of every channel; by cell, one cell: the products are the same
    return found | {f"{name}.proj": rows * columns * inputs * config.d_model}


def _inverted_residual(
    name: str, inputs: int, hidden: int, outputs: int, grid: Grid, stride: tuple[int, int]
) -> dict[str, int]:
    """1x1 expansion on the map that comes in, 3x3 depthwise and 1x1 projection on the one that goes out."""
    cells = math.prod(_strided(grid, stride))
    return {
        f"{name}.layers.0.0": math.prod(grid) * inputs * hidden,
        f"{name}.layers.1.0": cells * 9 * hidden,
        f"{name}.layers.2.0": cells * hidden * outputs,
    }


def _strided(grid: Grid, stride: tuple[int, int]) -> Grid:
    """The map behind a 3x3 convolution padded by 1."""
    return -(-grid[0] // stride[0]), -(-grid[1] // stride[1])


def _cp_mobile(config: CPMobileConfig) -> dict[str, int]:
    """Widths and strides of Schmid et al. 2023: three stages of 3, 2 and 1 blocks behind two strided convolutions."""
    base = _multiple_of_8(config.base_channels)
    widths = [_multiple_of_8(base * config.channels_multiplier**stage) for stage in range(3)]
    outputs = [widths[0]] * 3 + [widths[1]] * 2 + [widths[2]]
    strides = [(1, 1), (1, 1), (1, 2), (2, 1), (1, 1), (1, 1)]

    half = _strided((config.n_mels, config.n_frames), (2, 2))
    grid = _strided(half, (2, 2))
    found = {
        "features.0.0": math.prod(half) * 9 * (base // 4),
        "features.1.0": math.prod(grid) * 9 * (base // 4) * base,
    }
    inputs = base
    for number, (width, stride) in enumerate(zip(outputs, strides)):
        hidden = _multiple_of_8(inputs * config.expansion_rate)
        found |= _inverted_residual(f"features.{number + 2}", inputs, hidden, width, grid, stride)
        inputs, grid = width, _strided(grid, stride)
    return found | {"head.0": math.prod(grid) * inputs * config.n_classes}


def _multiple_of_8(width: float) -> int:
    """Nearest multiple of 8, at least 8 and never more than 10 % below `width` (MobileNetV2's rule)."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded
