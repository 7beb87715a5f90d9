"""Small models and features that many tests share."""

import torch

from aum_compress.audio.config import InputSpec, LogMelConfig
from aum_compress.models.config import AudioMambaConfig, BlockConfig, ConvStage, ConvStem, CPMobileConfig, PatchStem
from aum_compress.models.factory import Model, build_model

N_MELS, N_FRAMES, LABELS = 32, 17, ("bus", "park", "tram")
SPEC = InputSpec(
    front_end=LogMelConfig(sample_rate_hz=16_000, n_fft=512, window_samples=400, hop_samples=1000, n_mels=N_MELS),
    clip_seconds=1.0,
    mean=-5.0,
    std=4.0,
)


def student_config(
    *, block_type: str = "v2", widths: tuple[int, ...] = (24, 32), token: str = "frame"
) -> AudioMambaConfig:
    stages = (ConvStage(channels=8, expansion=0), ConvStage(channels=8), ConvStage(channels=8, stride_mels=1))
    return AudioMambaConfig(
        n_mels=N_MELS,
        n_frames=N_FRAMES,
        n_classes=len(LABELS),
        d_model=16,
        blocks=tuple(BlockConfig(d_inner=width, d_state=4, dt_rank=2, block_type=block_type) for width in widths),
        stem=ConvStem(stages=stages, token=token),
    )


def aum_config() -> AudioMambaConfig:
    return student_config().model_copy(
        update={"stem": PatchStem(patch_mels=8, patch_frames=8, stride_mels=8, stride_frames=8)}
        | {"pool": "class_token", "position": "absolute"}
    )


def cp_config() -> CPMobileConfig:
    return CPMobileConfig(n_mels=N_MELS, n_frames=N_FRAMES, n_classes=len(LABELS), base_channels=8)


def features(count: int = 4, seed: int = 0) -> torch.Tensor:
    """(count,1,F,T), normalised."""
    return torch.randn(count, 1, N_MELS, N_FRAMES, generator=torch.Generator().manual_seed(seed))


def trained_like(config: AudioMambaConfig | CPMobileConfig, seed: int = 0) -> Model:
    """A model whose batch statistics and scales are not those of a fresh one, in evaluation mode."""
    torch.manual_seed(seed)
    model = build_model(config).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
    for step in range(3):
        model(2 * features(8, seed=100 + step) + 0.5)
    return model.eval()
