"""Audio Mamba (Erol et al. 2024) and its small students: one definition, told apart by configuration."""

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aum_compress.errors import AumError
from aum_compress.models.blocks import ResidualBlock
from aum_compress.models.config import AudioMambaConfig, Grid, PatchStem, reads_whole_frames, token_grid
from aum_compress.models.heads import build_head
from aum_compress.models.norm import RMSNorm
from aum_compress.models.positions import FactorisedPositions, PositionEmbedding, rotate, rotation
from aum_compress.models.stems import ConvEmbed, PatchEmbed


class AudioMamba(nn.Module):
    """(B,1,F,T) normalised log-mel -> (B,C) logits. T may be another than the configuration's: positions are resampled.

    Source of the class-token placement, of where rotary positions enter and of initialisation: `AudioMamba` in AuM's
    src/models/mamba_models.py. The class token sits at L//2 of the patches; its position row is stored first.
    """

    def __init__(self, config: AudioMambaConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        """In training, keep only what enters each block and compute the rest again in the backward pass."""
        d_model = config.d_model
        self.patch_embed = (
            PatchEmbed(config.stem, d_model)
            if isinstance(config.stem, PatchStem)
            else ConvEmbed(config.stem, d_model, config.n_mels, config.n_frames)
        )
        class_token = config.pool == "class_token"
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d_model)) if class_token else None
        self.pos_embed: PositionEmbedding | FactorisedPositions | None = None
        if config.position == "absolute":
            self.pos_embed = PositionEmbedding(config.token_grid, d_model, class_token=class_token)
        elif config.position == "factorised":
            self.pos_embed = FactorisedPositions(config.token_grid, d_model)
        self.layers = nn.ModuleList(ResidualBlock(d_model, block, config.sequence(block)[1]) for block in config.blocks)
        self.norm_f = RMSNorm(d_model)
        self.head = build_head(config)
        self.head_norm = nn.BatchNorm1d(config.n_classes) if config.head == "batch_norm" else None
        self._initialise()

    def _initialise(self) -> None:
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        with torch.no_grad():  # GPT-2's rule: the residual stream's variance must not grow with depth
            for block in self.layers:
                block.mixer.out_proj.weight /= math.sqrt(len(self.layers))

    def forward(self, spectrogram: Tensor) -> Tensor:
        """Args: spectrogram (B,1,F,T), normalised as the bundle's input says. Returns logits (B,C).

        Raises:
            AumError: a spectrogram that the stem cannot read or that leaves no token.
        """
        grid = self._grid(spectrogram)
        tokens = self.embed(spectrogram)
        turns = None
        if self.config.position == "rope":
            turns = rotation(
                grid,
                self.config.token_grid,
                self.config.d_model,
                class_token=self.cls_token is not None,
                device=tokens.device,
            )
            tokens = rotate(tokens, turns)
        for number, block in enumerate(self.layers, start=1):
            # what a block adds is turned on its way to the next one, as in AuM
            between = turns if number < len(self.layers) else None
            if self.activation_checkpointing and self.training:
                tokens = checkpoint(block, tokens, grid, between, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens, grid, between)
        tokens = self.norm_f(tokens)
        if self.head_norm is not None:
            return self.head_norm(self.head(tokens).transpose(1, 2)).mean(2)
        if self.cls_token is None:
            # normalised first, so that no single loud frame decides the mean
            return self.head(tokens.mean(1))
        return self.head(tokens[:, (tokens.shape[1] - 1) // 2])

    def embed(self, spectrogram: Tensor) -> Tensor:
        """Tokens (B,L,M) with learned positions and class token in place."""
        grid = self._grid(spectrogram)
        if share := self.config.mean_subtraction:
            spectrogram = spectrogram - share * spectrogram.mean(3, keepdim=True)
        tokens = self.patch_embed(spectrogram)
        rows = None if self.pos_embed is None else self.pos_embed(grid)
        if self.cls_token is None:
            return tokens if rows is None else tokens + rows
        class_token = self.cls_token
        if rows is not None:
            class_token, tokens = class_token + rows[:, :1], tokens + rows[:, 1:]
        middle = tokens.shape[1] // 2
        class_token = class_token.expand(tokens.shape[0], -1, -1)
        return torch.cat([tokens[:, :middle], class_token, tokens[:, middle:]], dim=1)

    def _grid(self, spectrogram: Tensor) -> Grid:
        """Rows and columns of tokens that a spectrogram makes."""
        config = self.config
        n_mels, n_frames = spectrogram.shape[-2:]
        if n_mels == config.n_mels and n_frames == config.n_frames:
            return config.token_grid
        grid = token_grid(config.stem, n_mels, n_frames)
        if min(grid) < 1 or (n_mels != config.n_mels and reads_whole_frames(config.stem)):
            raise AumError(
                f"features of {n_mels} mel bins x {n_frames} frames: a model for {config.n_mels} x {config.n_frames} "
                "cannot read them; another number of frames is fine as long as they make a token, another number of "
                "mel bins where tokens are patches or cells"
            )
        return grid
