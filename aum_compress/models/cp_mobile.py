"""CP-Mobile (Schmid et al. 2023), the DCASE 2024/2025 Task 1 baseline network: the rival to beat.

Re-written from the baseline's description (CPJKU/dcase2024_task1_baseline, models/baseline.py): 61,148 parameters and
29,419,156 MACs by torchinfo at (1,1,256,65).
"""

from torch import Tensor, nn

from aum_compress.models.config import CPMobileConfig
from aum_compress.models.stems import conv_norm

BLOCKS_PER_STAGE = (3, 2, 1)
STRIDES = {2: (1, 2), 3: (2, 1)}
"""Block number (from 0) -> (mel, frame) stride; all others are 1."""


def make_divisible(width: float, divisor: int = 8) -> int:
    """Nearest multiple of `divisor`, never more than 10 % below `width` (MobileNetV2's rule)."""
    rounded = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * width else rounded


class CPMobileBlock(nn.Module):
    """Inverted residual with ReLU behind the sum; a strided block of equal width averages its shortcut."""

    def __init__(self, inputs: int, outputs: int, expansion_rate: float, stride: tuple[int, int], folded: bool) -> None:
        super().__init__()
        hidden = make_divisible(inputs * expansion_rate)
        self.layers = nn.Sequential(
            conv_norm(inputs, hidden, folded=folded),
            conv_norm(hidden, hidden, 3, stride, groups=hidden, folded=folded),
            conv_norm(hidden, outputs, folded=folded, activation=False),
        )
        self.shortcut: nn.Module | None = None
        if inputs == outputs:
            self.shortcut = nn.Identity() if stride == (1, 1) else nn.AvgPool2d(3, stride, padding=1)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return self.activation(y if self.shortcut is None else y + self.shortcut(x))


class CPMobile(nn.Module):
    """(B,1,F,T) log-mel -> (B,C) logits."""

    def __init__(self, config: CPMobileConfig) -> None:
        super().__init__()
        self.config = config
        base, folded = make_divisible(config.base_channels), config.folded
        layers: list[nn.Module] = [
            conv_norm(1, base // 4, 3, (2, 2), folded=folded),
            conv_norm(base // 4, base, 3, (2, 2), folded=folded),
        ]
        channels, number = base, 0
        for stage, n_blocks in enumerate(BLOCKS_PER_STAGE):
            width = make_divisible(base * config.channels_multiplier**stage)
            for _ in range(n_blocks):
                stride = STRIDES.get(number, (1, 1))
                layers.append(CPMobileBlock(channels, width, config.expansion_rate, stride, folded))
                channels, number = width, number + 1
        self.features = nn.Sequential(*layers)
        self.head = conv_norm(channels, config.n_classes, folded=folded, activation=False)

    def forward(self, spectrogram: Tensor) -> Tensor:
        """Args: spectrogram (B,1,F,T). Returns logits (B,C)."""
        return self.head(self.features(spectrogram)).mean((2, 3))
