"""From a spectrogram to tokens: AuM's patch embedding and the student's convolutional stem."""

from torch import Tensor, nn

from aum_compress.models.config import ConvStage, ConvStem, PatchStem, stem_grid


def conv_norm(
    inputs: int,
    outputs: int,
    kernel: int = 1,
    stride: tuple[int, int] = (1, 1),
    groups: int = 1,
    *,
    folded: bool,
    activation: bool = True,
) -> nn.Sequential:
    """Convolution, batch normalisation (none once folded: the convolution then has the bias), ReLU."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=folded)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
    layers: list[nn.Module] = [convolution]
    if not folded:
        layers.append(nn.BatchNorm2d(outputs))
    if activation:
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class PatchEmbed(nn.Module):
    """(B,1,F,T) -> (B,L,M): one strided convolution, tokens frequency-major (time runs fastest)."""

    def __init__(self, config: PatchStem, d_model: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(
            1, d_model, (config.patch_mels, config.patch_frames), (config.stride_mels, config.stride_frames)
        )

    def forward(self, spectrogram: Tensor) -> Tensor:
        return self.proj(spectrogram).flatten(2).transpose(1, 2)


class InvertedResidual(nn.Module):
    """1x1 expand, 3x3 depthwise, 1x1 project (linear); shortcut where shapes allow."""

    def __init__(self, inputs: int, stage: ConvStage, folded: bool) -> None:
        super().__init__()
        hidden = stage.hidden_channels(inputs)
        stride = (stage.stride_mels, stage.stride_frames)
        self.shortcut = stage.has_shortcut(inputs)
        self.layers = nn.Sequential(
            conv_norm(inputs, hidden, folded=folded),
            conv_norm(hidden, hidden, 3, stride, groups=hidden, folded=folded),
            conv_norm(hidden, stage.channels, folded=folded, activation=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


class ConvEmbed(nn.Module):
    """(B,1,F,T) -> (B,L,M): convolution stages, then one linear map from a frame (or a cell) to a token."""

    def __init__(self, config: ConvStem, d_model: int, n_mels: int, n_frames: int) -> None:
        super().__init__()
        first, *rest = config.stages
        layers: list[nn.Module] = [
            conv_norm(1, first.channels, 3, (first.stride_mels, first.stride_frames), folded=config.folded)
        ]
        channels = first.channels
        for stage in rest:
            if stage.expansion:
                layers.append(InvertedResidual(channels, stage, config.folded))
            else:
                stride = (stage.stride_mels, stage.stride_frames)
                layers.append(conv_norm(channels, stage.channels, 3, stride, folded=config.folded))
            channels = stage.channels
        self.stages = nn.Sequential(*layers)
        self.by_frame = config.token == "frame"
        rows, _ = stem_grid(config, n_mels, n_frames)
        self.proj = nn.Linear(channels * rows if self.by_frame else channels, d_model)

    def forward(self, spectrogram: Tensor) -> Tensor:
        cells = self.stages(spectrogram)  # (B,channels,rows,columns)
        tokens = cells.flatten(1, 2) if self.by_frame else cells.flatten(2)
        return self.proj(tokens.transpose(1, 2))
