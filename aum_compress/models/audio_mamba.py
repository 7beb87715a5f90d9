"""Audio Mamba (Erol et al. 2024) and its small students: one definition, told apart by configuration."""

import math

import torch
from torch import Tensor, nn

from aum_compress.models.config import AudioMambaConfig, PatchStem
from aum_compress.models.mamba import MambaBlock, RMSNorm
from aum_compress.models.stems import ConvEmbed, PatchEmbed, PositionEmbedding


class AudioMamba(nn.Module):
    """(B,1,F,T) normalised log-mel -> (B,C) logits.

    Source of the class-token placement and initialisation: `AudioMamba` in AuM's src/models/mamba_models.py. The class
    token sits at L//2 of the patches; its position row is stored first.
    """

    def __init__(self, config: AudioMambaConfig) -> None:
        super().__init__()
        self.config = config
        d_model = config.d_model
        self.patch_embed = (
            PatchEmbed(config.stem, d_model)
            if isinstance(config.stem, PatchStem)
            else ConvEmbed(config.stem, d_model, config.n_mels, config.n_frames)
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d_model)) if config.pool == "class_token" else None
        self.pos_embed = PositionEmbedding(config.n_tokens, d_model) if config.position == "absolute" else None
        self.layers = nn.ModuleList(MambaBlock(d_model, block) for block in config.blocks)
        self.norm_f = RMSNorm(d_model)
        self.head = nn.Linear(d_model, config.n_classes)
        self._initialise()

    def _initialise(self) -> None:
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():  # GPT-2's rule: the residual stream's variance must not grow with depth
            for block in self.layers:
                block.mixer.out_proj.weight /= math.sqrt(len(self.layers))

    def forward(self, spectrogram: Tensor) -> Tensor:
        """Args: spectrogram (B,1,F,T), normalised as the bundle's input says. Returns logits (B,C)."""
        tokens = self.embed(spectrogram)
        for block in self.layers:
            tokens = block(tokens)
        tokens = self.norm_f(tokens)
        if self.cls_token is None:
            # normalised first, so that no single loud frame decides the mean
            return self.head(tokens.mean(1))
        return self.head(tokens[:, (tokens.shape[1] - 1) // 2])

    def embed(self, spectrogram: Tensor) -> Tensor:
        """Tokens (B,L,M) with positions and class token in place."""
        tokens = self.patch_embed(spectrogram)
        rows = None if self.pos_embed is None else self.pos_embed.pos_embed
        if self.cls_token is None:
            return tokens if rows is None else tokens + rows
        class_token = self.cls_token
        if rows is not None:
            class_token, tokens = class_token + rows[:, :1], tokens + rows[:, 1:]
        middle = tokens.shape[1] // 2
        class_token = class_token.expand(tokens.shape[0], -1, -1)
        return torch.cat([tokens[:, :middle], class_token, tokens[:, middle:]], dim=1)
