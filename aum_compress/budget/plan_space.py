"""The student configurations that a plan looks through. Torch-free.

A student is a stem and a number of equal blocks; mean over tokens, no positions and a linear head, as in the preset
`student`. Letters as in `models.config`.
"""

import math
from collections.abc import Iterator

from aum_compress.models.config import (
    AudioMambaConfig,
    Block,
    BlockConfig,
    ConvBlockConfig,
    ConvStage,
    ConvStem,
    Mamba2BlockConfig,
    PatchStem,
    reads_whole_frames,
    stem_grid,
    token_grid,
)

Stem = PatchStem | ConvStem
MIXERS = ("mamba", "mamba2", "conv")

WIDTHS = (*range(16, 129, 8), 144, 160, 192)
"""d_model."""
DEPTHS = range(1, 9)
EXPANSIONS = (1.0, 1.5, 2.0)
"""d_inner / d_model."""
STATES = {"mamba": (4, 8, 16), "mamba2": (16, 32, 64)}
HEAD_DIM = 16
CONV_TAPS = (7, 15, 31)
STEM_CHANNELS = (8, 16, 24)
"""Of the first stage; each stage adds half as many, as the preset's stem does."""
MEL_HALVINGS, FRAME_HALVINGS = range(2, 8), range(5)
PATCH_MELS, PATCH_FRAMES = (4, 8, 16, 32, 64, 128, 256), (1, 2, 4, 8, 16)
MOST_PATCH_VALUES = 256
"""As in AuM's 16x16. A larger patch takes its bytes from the blocks: that many values times M."""
MOST_ROWS = 8
"""Of a stem whose tokens are whole frames; more of them, times channels times M, would take most of the bytes."""


def stems(n_mels: int, n_frames: int, fewest: int, most: int) -> list[Stem]:
    """Stems that make `fewest` to `most` tokens of (F,T) features."""
    found: list[Stem] = [*_patch_stems(), *_conv_stems()]
    return [
        stem
        for stem in found
        if fewest <= math.prod(token_grid(stem, n_mels, n_frames)) <= most
        and not (reads_whole_frames(stem) and stem_grid(stem, n_mels, n_frames)[0] > MOST_ROWS)
    ]


def _patch_stems() -> Iterator[PatchStem]:
    sizes = ((mels, frames) for mels in PATCH_MELS for frames in PATCH_FRAMES if mels * frames <= MOST_PATCH_VALUES)
    for mels, frames in sorted(
        sizes, key=lambda size: max(size) / min(size)
    ):  # of equal cost, the squarest stands first
        yield PatchStem(patch_mels=mels, patch_frames=frames, stride_mels=mels, stride_frames=frames)


def _conv_stems() -> Iterator[ConvStem]:
    for mels in MEL_HALVINGS:
        for frames in FRAME_HALVINGS:
            for channels in STEM_CHANNELS:
                # time is halved first: the large maps are then smaller, and that is where the MACs are
                stages = tuple(
                    ConvStage(
                        channels=channels * (2 + number) // 2,
                        stride_mels=1 + (number < mels),
                        stride_frames=1 + (number < frames),
                        expansion=2.0 if number else 0.0,
                    )
                    for number in range(max(mels, frames))
                )
                yield ConvStem(stages=stages, token="frame")
                yield ConvStem(stages=stages, token="cell")


def blocks(mixer: str, d_model: int) -> Iterator[Block]:
    """Blocks of one mixer for tokens of width M."""
    for d_inner in sorted({round(expansion * d_model) for expansion in EXPANSIONS}):
        if mixer == "conv":
            yield from (ConvBlockConfig(d_inner=d_inner, d_conv=taps) for taps in CONV_TAPS)
            continue
        for d_state in STATES[mixer]:
            if mixer == "mamba":
                for block_type in ("none", "v1", "v2"):
                    rank = math.ceil(d_model / 16)
                    yield BlockConfig(d_inner=d_inner, d_state=d_state, dt_rank=rank, block_type=block_type)
            elif d_inner % HEAD_DIM == 0:
                for two_way in (False, True):
                    yield Mamba2BlockConfig(d_inner=d_inner, d_state=d_state, head_dim=HEAD_DIM, two_way=two_way)


def student_config(
    stem: Stem, d_model: int, block: Block, depth: int, *, n_mels: int, n_frames: int, n_classes: int
) -> AudioMambaConfig:
    """The configuration, not validated again: stem and block are, and the stem makes tokens."""
    return AudioMambaConfig.model_construct(
        n_mels=n_mels,
        n_frames=n_frames,
        n_classes=n_classes,
        d_model=d_model,
        blocks=(block,) * depth,
        stem=stem,
    )
