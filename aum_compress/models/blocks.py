"""The residual block around each mixer, and what it takes for a sequence."""

from torch import Tensor, nn

from aum_compress.models.config import Along, Block, Grid
from aum_compress.models.gated_conv import GatedConvMixer
from aum_compress.models.mamba import MambaMixer
from aum_compress.models.mamba2 import Mamba2Mixer
from aum_compress.models.norm import RMSNorm
from aum_compress.models.positions import Rotation, rotate

MIXERS = {"mamba": MambaMixer, "mamba2": Mamba2Mixer, "conv": GatedConvMixer}


class ResidualBlock(nn.Module):
    """Pre-norm residual block: tokens + mixer(norm(tokens)), the residual stream kept in float32.

    Rotary positions, where given, turn what is added. `length` is that of the sequences that it will run over.
    """

    def __init__(self, d_model: int, config: Block, length: int) -> None:
        super().__init__()
        self.along: Along = config.along
        self.norm = RMSNorm(d_model)
        self.mixer = MIXERS[config.mixer](d_model, config, length)

    def forward(self, tokens: Tensor, grid: Grid, turns: Rotation | None = None) -> Tensor:
        """Args: tokens (B,L,M), of which `grid` says the rows and columns where the block runs along one of them."""
        added = self._mixed(self.norm(tokens), grid)
        return tokens + (added if turns is None else rotate(added, turns))

    def _mixed(self, tokens: Tensor, grid: Grid) -> Tensor:
        rows, columns = grid
        if self.along == "tokens":
            return self.mixer(tokens)
        if self.along == "time":  # rows lie one behind the other
            return self.mixer(tokens.reshape(-1, columns, tokens.shape[2])).reshape(tokens.shape)
        by_column = tokens.unflatten(1, (rows, columns)).transpose(1, 2)
        mixed = self.mixer(by_column.flatten(0, 1)).unflatten(0, (-1, columns))
        return mixed.transpose(1, 2).flatten(1, 2)
