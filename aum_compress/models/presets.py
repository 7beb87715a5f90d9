"""Named models: the published AuM sizes, a default student, the rival. Torch-free."""

from collections.abc import Callable

from aum_compress.models.config import (
    AudioMambaConfig,
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
    """A student somewhat over the int8 budget (137,686 bytes with 10 classes), meant to be pruned into it.

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


PRESET_MELS, PRESET_FRAMES = 256, 65
"""Features of one second through the DCASE front-end, which every preset takes."""

PRESETS: dict[str, Callable[[int, int, int], AudioMambaConfig | CPMobileConfig]] = {
    "aum-tiny": lambda n_mels, n_frames, n_classes: aum(192, n_mels, n_frames, n_classes),
    "aum-small": lambda n_mels, n_frames, n_classes: aum(384, n_mels, n_frames, n_classes),
    "aum-base": lambda n_mels, n_frames, n_classes: aum(768, n_mels, n_frames, n_classes, "v1"),
    "student": student,
    "cp-mobile": lambda n_mels, n_frames, n_classes: CPMobileConfig(
        n_mels=n_mels, n_frames=n_frames, n_classes=n_classes
    ),
}
"""Name -> function of (n_mels, n_frames, n_classes)."""
