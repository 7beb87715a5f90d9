"""Where a token stands: learned positions, resampled for other lengths, and rotary ones, which store nothing."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aum_compress.models.config import Grid

ROTARY_BASE = 10_000
Rotation = tuple[Tensor, Tensor]
"""Cosines and sines (L,M/2) of the angles by which pairs of channels are turned."""


class PositionEmbedding(nn.Module):
    """A learned vector a token, (1,L,M), added. The class token's row comes first, as in published AuM checkpoints."""

    def __init__(self, grid: Grid, d_model: int, *, class_token: bool) -> None:
        super().__init__()
        self.grid = grid
        self.prefix = int(class_token)
        self.pos_embed = nn.Parameter(torch.empty(1, self.prefix + math.prod(grid), d_model))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, grid: Grid) -> Tensor:
        """(1,L,M) for a grid of any size, the class token's row first."""
        return resample_positions(self.pos_embed, self.grid, grid, self.prefix)


class FactorisedPositions(nn.Module):
    """A learned vector a row and one a column, their sum (1,L,M) added: (rows + columns)*M values instead of L*M."""

    def __init__(self, grid: Grid, d_model: int) -> None:
        super().__init__()
        rows, columns = grid
        self.rows = nn.Parameter(torch.empty(rows, d_model))
        self.columns = nn.Parameter(torch.empty(columns, d_model))
        for table in (self.rows, self.columns):
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, grid: Grid) -> Tensor:
        """(1,L,M) for a grid of any size, tokens mel-major."""
        rows, columns = (_stretched(table, size) for table, size in zip((self.rows, self.columns), grid, strict=True))
        return (rows[:, None] + columns).flatten(0, 1)[None]


def _stretched(table: Tensor, size: int) -> Tensor:
    """(n,M) to (size,M), linear with antialiasing, as `resample_positions` does along one axis."""
    if len(table) == size:
        return table
    return resample_positions(table[None], (1, len(table)), (1, size), 0)[0]


def resample_positions(positions: Tensor, old: Grid, new: Grid, prefix: int) -> Tensor:
    """(1,prefix+rows*columns,M) learned for the grid `old`, stretched or squeezed to `new`; `prefix` rows stay.

    Bilinear with antialiasing. Source: `resample_abs_pos_embed` in AuM's src/utilities/tokenization.py.
    """
    if old == new:
        return positions
    kept, cells = positions[:, :prefix], positions[:, prefix:]
    cells = cells.transpose(1, 2).unflatten(2, old)
    cells = F.interpolate(cells, size=new, mode="bilinear", antialias=True)
    return torch.cat([kept, cells.flatten(2).transpose(1, 2)], dim=1)


def rotation(grid: Grid, trained: Grid, d_model: int, *, class_token: bool, device: torch.device) -> Rotation:
    """Rotary positions of a grid of tokens: half of the pairs of channels turn with the row, half with the column.

    A grid of another size than `trained` is laid over the trained one's positions. The class token in the middle is not
    turned. Source: `VisionRotaryEmbedding` in AuM's src/utilities/rope.py, which takes the first token for the class
    token wherever that stands.
    """
    # integers made into floats: so the size of the exported table follows from integers, as all sizes in the graph do
    steps = torch.arange(d_model // 4, device=device).float()
    frequencies = torch.exp(steps * (-4 * math.log(ROTARY_BASE) / d_model))
    by_axis = []
    for size, wanted in zip(grid, trained, strict=True):
        places = torch.arange(size, device=device).float()
        if size != wanted:
            places = places * (wanted / size)
        by_axis.append(places[:, None] * frequencies)
    tables = []
    for function in (torch.cos, torch.sin):
        rows, columns = (function(angles) for angles in by_axis)
        table = torch.cat([rows[:, None].expand(*grid, -1), columns[None].expand(*grid, -1)], dim=2).flatten(0, 1)
        if class_token:  # the first patch stands at angle 0, which turns nothing
            table = torch.cat([table[: len(table) // 2], table[:1], table[len(table) // 2 :]])
        tables.append(table)
    return tables[0], tables[1]


def rotate(tokens: Tensor, turns: Rotation) -> Tensor:
    """(B,L,M), each neighbouring pair of channels turned by its angle."""
    cos, sin = turns
    pairs = tokens.unflatten(2, (-1, 2))
    x, y = pairs[..., 0], pairs[..., 1]
    return torch.stack([x * cos - y * sin, y * cos + x * sin], dim=3).flatten(2)
