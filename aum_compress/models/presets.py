"""Named models: the published AuM sizes, students of two lanes, the rival. Torch-free."""

from collections.abc import Callable
from typing import Literal

from aum_compress.audio.config import LogMelConfig
from aum_compress.models.config import (
    AudioMambaConfig,
    BlockConfig,
    BlockType,
    ConvStage,
    ConvStem,
    CPMobileConfig,
    PatchStem,
    uniform_blocks,
)


def aum(
    d_model: int, n_mels: int, n_frames: int, n_classes: int, block_type: BlockType = "v2", depth: int = 24
) -> AudioMambaConfig:
    """AuM as published: 16x16 patches, class token in the middle, absolute positions, N = 16."""
    return AudioMambaConfig(
        n_mels=n_mels,
        n_frames=n_frames,
        n_classes=n_classes,
        d_model=d_model,
        blocks=uniform_blocks(depth, d_model, block_type=block_type),
        stem=PatchStem(),
        pool="class_token",
        position="absolute",
    )


def student(n_mels: int, n_frames: int, n_classes: int) -> AudioMambaConfig:
    """A student somewhat over the int8 budget (138,258 bytes with 10 classes), meant to be pruned into it.

    One token a frame keeps the scan on the time axis and L small, so that bytes, not MACs, are what has to be saved;
    the stem spends its MACs where the map is large and its parameters are few.
    """
    stages = (
        ConvStage(channels=16, stride_mels=2, stride_frames=2, expansion=0),
        ConvStage(channels=24, stride_mels=2, stride_frames=1),
        ConvStage(channels=32, stride_mels=2, stride_frames=1),
        ConvStage(channels=40, stride_mels=2, stride_frames=1),
        ConvStage(channels=40, stride_mels=1, stride_frames=1),
        ConvStage(channels=48, stride_mels=2, stride_frames=1),
    )
    return AudioMambaConfig(
        n_mels=n_mels,
        n_frames=n_frames,
        n_classes=n_classes,
        d_model=64,
        blocks=uniform_blocks(2, 64, d_state=8),
        stem=ConvStem(stages=stages),
    )


def student_int8(n_mels: int, n_frames: int, n_classes: int) -> AudioMambaConfig:
    """The int8 lane: 91,183 bytes of 128,000 and 26.1 of 30 MMAC with 10 classes of one-second clips.

    - Stem: CP-Mobile's widths and strides, whose convolutions carry small data. 8 and 32 channels where the map is
      large cost MACs and few bytes. One of the blocks at 64 x 17 is left out, which pays for the Mamba blocks, and the
      last stage goes one step further down in mel, to 16 x 9 cells: a block costs 2.9 MMAC there, twice that before it.
    - Channels double less than the map shrinks (32, 56, 64), as the bytes are wanted by the blocks; multiples of 8.
    - One block along time and one along mel: two scans of 9 and of 16 steps, after which every cell has heard of all
      others, where one scan over all cells takes 144 steps.
    - d_inner = d_model: at twice the width the same bytes and MACs buy one block, not two.
    - N = 4, R = 4 = M/16: a state has at most 16 cells to remember; N = 8 was no better and takes more time. v1 shares
      all but A between its directions; v2 has a convolution and projections of its own for the way back, at twice the
      bytes and the time.
    - Half of each bin's mean over the clip is taken off first: what a microphone adds to a bin is in there. On folds 4
      and 5 of ESC10-mobile that gave 3.7 points (one run each), on folds 1 to 3 a lower log loss and no accuracy. All
      of it would leave nothing of steady sounds.
    - Widths of 80 in place of 64 fit as well; they were no better on ESC10-mobile (one run each).
    - Batch-normalised logits of each cell, then their mean, as in CP-Mobile; folded, it is a linear layer.
    """
    stem = _cells(8, (32, 2, 2, 0), (32, 1, 1, 2), (32, 1, 2, 2), (56, 2, 1, 2), (56, 1, 1, 2), (64, 2, 1, 2))
    return _time_and_mel(n_mels, n_frames, n_classes, stem, width=64, dt_rank=4)


def student_fp16(n_mels: int, n_frames: int, n_classes: int) -> AudioMambaConfig:
    """The fp16 lane: 58,186 of 64,000 parameters and 22.0 of 30 MMAC with 10 classes of one-second clips.

    As `student-int8`, for a limit of half as many parameters: the same stem where the map is large, since that costs
    MACs alone, and 48 channels from where the parameters lie. R = 3 = M/16.
    """
    stem = _cells(8, (32, 2, 2, 0), (32, 1, 1, 2), (32, 1, 2, 2), (48, 2, 1, 2), (48, 1, 1, 2), (48, 2, 1, 2))
    return _time_and_mel(n_mels, n_frames, n_classes, stem, width=48, dt_rank=3)


def student_edge(n_mels: int, n_frames: int, n_classes: int) -> AudioMambaConfig:
    """The int8 lane where time counts: 74,163 bytes and 7.1 MMAC with 10 classes, for 64 mel bins in place of 256.

    - A quarter of the map costs a quarter of the stem, most of which is convolutions on the large map; the front-end
      itself is a quarter as well (`front_end_of`). On ESC10-mobile that costs, on devices that training has not heard,
      5 points from labels alone and 2 with teachers that hear 256 bins (docs/students.md).
    - Stem: to 16 x 17 cells in two stages, where the channels are few, and to 8 x 9 by the third.
    - Blocks as `student-int8`'s over half as many cells, 9 steps along time and 8 along mel. N = 4 takes a fifth less
      time than N = 8.
    - Half of each bin's mean is taken off here too: 2.6 points on devices that training had not heard; 0.8 of it gave
      no more.
    """
    stem = _cells(16, (32, 2, 2, 2), (32, 1, 1, 2), (64, 2, 2, 2), (64, 1, 1, 2))
    return _time_and_mel(n_mels, n_frames, n_classes, stem, width=64, dt_rank=4)


def _cells(first: int, *others: tuple[int, int, int, float]) -> ConvStem:
    """A plain convolution of strides 2, then stages of (channels, mel stride, frame stride, expansion)."""
    keys = ("channels", "stride_mels", "stride_frames", "expansion")
    stages = [ConvStage(channels=first, stride_mels=2, stride_frames=2, expansion=0)]
    stages += [ConvStage(**dict(zip(keys, stage, strict=True))) for stage in others]
    return ConvStem(stages=tuple(stages), token="cell")


def _time_and_mel(
    n_mels: int, n_frames: int, n_classes: int, stem: ConvStem, *, width: int, dt_rank: int
) -> AudioMambaConfig:
    return AudioMambaConfig(
        n_mels=n_mels,
        n_frames=n_frames,
        n_classes=n_classes,
        d_model=width,
        blocks=tuple(
            BlockConfig(d_inner=width, d_state=4, dt_rank=dt_rank, block_type="v1", along=along)
            for along in ("time", "mel")
        ),
        stem=stem,
        head="batch_norm",
        mean_subtraction=0.5,
    )


EDGE = LogMelConfig(n_fft=1024, window_samples=1024, n_mels=64)
"""Front-end of a device: a quarter of DCASE's transform and of its mel bins, at the same frames."""
PRESET_MELS, PRESET_FRAMES = 256, 65
"""Features of one second through the DCASE front-end."""


def front_end_of(preset: str) -> LogMelConfig:
    """The front-end that a preset is made for; it runs on any other's features as well."""
    return EDGE if preset == "student-edge" else LogMelConfig()


PRESETS: dict[str, Callable[[int, int, int], AudioMambaConfig | CPMobileConfig]] = {
    "aum-tiny": lambda n_mels, n_frames, n_classes: aum(192, n_mels, n_frames, n_classes),
    "aum-small": lambda n_mels, n_frames, n_classes: aum(384, n_mels, n_frames, n_classes),
    "aum-base": lambda n_mels, n_frames, n_classes: aum(768, n_mels, n_frames, n_classes, "v1"),
    "student": student,
    "student-int8": student_int8,
    "student-fp16": student_fp16,
    "student-edge": student_edge,
    "cp-mobile": lambda n_mels, n_frames, n_classes: CPMobileConfig(
        n_mels=n_mels, n_frames=n_frames, n_classes=n_classes
    ),
}
"""Name -> function of (n_mels, n_frames, n_classes)."""
LANES: dict[str, Literal["fp16", "int8"]] = {
    "student-int8": "int8",
    "student-fp16": "fp16",
    "student-edge": "int8",
}
"""Presets that are made for a limit -> the precision at which they keep it."""
