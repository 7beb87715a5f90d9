"""Model configurations: all that is needed to rebuild a model around its tensors. Torch-free.

Widths are **per block**, so that a pruned model is an ordinary configuration and never a mask. Letters of DESIGN
section 2: `M` d_model, `D` d_inner, `N` d_state, `R` dt_rank, `K` conv taps, `L` tokens, `F` mel bins, `T` frames.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

Positive = Annotated[int, Field(gt=0)]
Grid = tuple[int, int]
"""Rows (frequency) and columns (time)."""
MLP_HEAD_WIDTH = 512
BlockType = Literal["none", "v1", "v2"]
"""`none`: forward scan only. `v1` (AuM's Fo-Bi, AuM-Base): one convolution and one set of projections, scanned both
ways with a state matrix for each; both results added. `v2` (Bi-Bi, AuM-Small): two directions with weights of their
own, their sum halved."""

Along = Literal["tokens", "time", "mel"]
"""What a block takes for a sequence. `tokens`: all tokens in their order. `time`: each mel row of tokens by itself,
from its first frame to its last. `mel`: each frame's column by itself, from the lowest bin up. The rows (or columns)
share the block's weights and lie in the batch, so that a scan has few and wide steps."""


def block_type_for_directions(values: Any) -> Any:
    """`directions`, as cards and recipes of before AuM's v1 say it, as the `block_type` that it meant."""
    if isinstance(values, dict) and values.get("directions") in (1, 2) and "block_type" not in values:
        others = {key: value for key, value in values.items() if key != "directions"}
        return others | {"block_type": "none" if values["directions"] == 1 else "v2"}
    return values


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BlockConfig(Frozen):
    """One pre-norm residual block around a Mamba-1 mixer."""

    mixer: Literal["mamba"] = "mamba"
    d_inner: Positive
    d_state: Positive
    dt_rank: Positive
    d_conv: Positive = 4
    block_type: BlockType = "v2"
    along: Along = "tokens"

    @property
    def projections(self) -> tuple[str, ...]:
        """Name suffix of each convolution with its x_proj, dt_proj and D."""
        return ("", "_b") if self.block_type == "v2" else ("",)

    @property
    def scans(self) -> tuple[str, ...]:
        """Name suffix of each scan's state matrix."""
        return ("",) if self.block_type == "none" else ("", "_b")

    _reads_directions = model_validator(mode="before")(block_type_for_directions)


class Mamba2BlockConfig(Frozen):
    """The same around a Mamba-2 mixer: one decay a head, the sequence mixed by products of matrices (SSD)."""

    mixer: Literal["mamba2"] = "mamba2"
    d_inner: Positive
    d_state: Positive
    head_dim: Positive = 16
    d_conv: Positive = 3
    two_way: bool = True
    """Both directions with the same weights, and so the convolution centred; else causal."""
    along: Along = "tokens"

    @property
    def n_heads(self) -> int:
        return self.d_inner // self.head_dim

    @model_validator(mode="after")
    def _heads_are_whole(self) -> "Mamba2BlockConfig":
        if self.d_inner % self.head_dim:
            raise ValueError(f"d_inner {self.d_inner} must be a multiple of head_dim {self.head_dim}")
        return self


class ConvBlockConfig(Frozen):
    """The same without a scan: a gated depthwise convolution over the sequence, what a scan has to be better than."""

    mixer: Literal["conv"] = "conv"
    d_inner: Positive
    d_conv: Positive
    """Taps, centred on the token."""
    along: Along = "tokens"


def _mixer_of(block: Any) -> Any:
    # cards and recipes of before Mamba-2 name no mixer
    return block.get("mixer", "mamba") if isinstance(block, dict) else getattr(block, "mixer", None)


Block = Annotated[
    Annotated[BlockConfig, Tag("mamba")]
    | Annotated[Mamba2BlockConfig, Tag("mamba2")]
    | Annotated[ConvBlockConfig, Tag("conv")],
    Discriminator(
        _mixer_of, custom_error_type="mixer", custom_error_message="wanted mixer: mamba, mamba2 or conv, and its keys"
    ),
]


class PatchStem(Frozen):
    """AuM's tokeniser: one strided convolution, tokens in frequency-major order."""

    kind: Literal["patch"] = "patch"
    patch_mels: Positive = 16
    patch_frames: Positive = 16
    stride_mels: Positive = 16
    stride_frames: Positive = 16


class ConvStage(Frozen):
    """An inverted residual (1x1 expand, 3x3 depthwise, 1x1 project); `expansion` 0: one plain 3x3 convolution."""

    channels: Positive
    stride_mels: Annotated[int, Field(ge=1, le=4)] = 2
    stride_frames: Annotated[int, Field(ge=1, le=4)] = 1
    expansion: Annotated[float, Field(ge=0)] = 2.0
    hidden: Positive | None = None
    """Channels between expansion and projection, in place of what `expansion` makes of the stage's inputs."""
    shortcut: bool | None = None
    """Whether an inverted residual adds its inputs to its outputs; where left out, it does so where shapes allow."""

    def hidden_channels(self, inputs: int) -> int:
        """Of an inverted residual that reads `inputs` channels."""
        return self.hidden or max(8, round(inputs * self.expansion))

    def has_shortcut(self, inputs: int) -> bool:
        """Of a stage that reads `inputs` channels."""
        fits = inputs == self.channels and (self.stride_mels, self.stride_frames) == (1, 1)
        return self.expansion > 0 and (fits if self.shortcut is None else self.shortcut)

    @model_validator(mode="after")
    def _plain_stages_have_no_inside(self) -> "ConvStage":
        if not self.expansion and (self.hidden is not None or self.shortcut):
            raise ValueError("hidden, shortcut: belong to an inverted residual, and expansion 0 is a plain convolution")
        if self.shortcut and (self.stride_mels, self.stride_frames) != (1, 1):
            raise ValueError("shortcut: needs strides of 1, so that outputs lie where inputs do")
        return self

    @model_serializer(mode="wrap")
    def _leaves_out_what_pruning_alone_sets(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # a stage that was never pruned is written as before these keys: its cards and hashes stay what they were
        written = write(self)
        return {key: value for key, value in written.items() if value is not None}


class ConvStem(Frozen):
    """Small convolutional tokeniser. A 16x16 patch embedding alone would take 256*M parameters."""

    kind: Literal["conv"] = "conv"
    stages: Annotated[tuple[ConvStage, ...], Field(min_length=1)]
    token: Literal["frame", "cell"] = "frame"
    """`frame`: all mel rows of a frame make one token, in time order. `cell`: each time-frequency cell, mel-major."""
    folded: bool = False
    """True once batch normalisation has been folded into the convolutions (`models.factory.fold_batch_norm`)."""

    @model_validator(mode="after")
    def _first_stage_is_plain(self) -> "ConvStem":
        if self.stages[0].expansion:
            raise ValueError("stages.0.expansion must be 0: the first stage reads one channel")
        return self

    @model_validator(mode="after")
    def _shortcuts_fit(self) -> "ConvStem":
        for number, (before, stage) in enumerate(zip(self.stages, self.stages[1:]), start=1):
            if stage.shortcut and before.channels != stage.channels:
                raise ValueError(
                    f"stages.{number}.shortcut: adds {before.channels} channels to {stage.channels}; wanted as many"
                )
        return self


class AudioMambaConfig(Frozen):
    """AuM and its students: stem -> tokens (B,L,M) -> Mamba blocks -> RMSNorm -> pool -> head."""

    family: Literal["audio_mamba"] = "audio_mamba"
    n_mels: Positive
    n_frames: Positive
    n_classes: Annotated[int, Field(ge=2)]
    d_model: Positive
    blocks: Annotated[tuple[Block, ...], Field(min_length=1)]
    stem: Annotated[PatchStem | ConvStem, Field(discriminator="kind")]
    mean_subtraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of each mel bin's mean over the clip that is taken off before the stem. A microphone's response adds a
    constant to each bin of a log-mel; but so does steady sound, of which 1 leaves nothing."""
    pool: Literal["class_token", "mean"] = "mean"
    """`class_token`: a learned token in the middle of the sequence is read out, as in AuM. `mean`: mean over tokens."""
    position: Literal["absolute", "factorised", "rope", "none"] = "none"
    """`absolute`: a learned vector a token. `factorised`: one a row and one a column, added. `rope`: what enters a
    block is turned by its place; nothing is stored."""
    head: Literal["linear", "mlp", "batch_norm"] = "linear"
    """`mlp`: LayerNorm, dropout, 512 units, ReLU, dropout, classes. `batch_norm`: logits of each token are normalised
    over the batch and then averaged, as CP-Mobile's; once folded it is `linear`."""

    @property
    def grid(self) -> Grid:
        """Of the stem's output."""
        return stem_grid(self.stem, self.n_mels, self.n_frames)

    @property
    def token_grid(self) -> Grid:
        """Of the tokens, the class token apart."""
        return token_grid(self.stem, self.n_mels, self.n_frames)

    @property
    def n_tokens(self) -> int:
        """L, the class token included."""
        return math.prod(self.token_grid) + (self.pool == "class_token")

    @model_validator(mode="after")
    def _stem_fits(self) -> "AudioMambaConfig":
        rows, columns = self.grid
        if rows < 1 or columns < 1:
            raise ValueError(
                f"stem: leaves a {rows} x {columns} grid of {self.n_mels} mel bins x {self.n_frames} frames; "
                "use smaller patches or strides"
            )
        return self

    @model_validator(mode="after")
    def _head_has_tokens(self) -> "AudioMambaConfig":
        if self.head == "batch_norm" and self.pool == "class_token":
            raise ValueError("head batch_norm: reads every token, and a class token is but one; use pool mean")
        return self

    @model_validator(mode="after")
    def _sequences_are_whole(self) -> "AudioMambaConfig":
        if self.pool == "class_token" and any(block.along != "tokens" for block in self.blocks):
            raise ValueError("blocks along time or mel: a class token stands in no row and no column; use pool mean")
        if self.position == "factorised" and self.pool == "class_token":
            raise ValueError("position factorised: a class token stands in no row and no column; use pool mean")
        return self

    def sequence(self, block: Block) -> tuple[int, int]:
        """How many sequences a block makes of one clip's tokens, and the length of each."""
        rows, columns = self.token_grid
        return {"tokens": (1, self.n_tokens), "time": (rows, columns), "mel": (columns, rows)}[block.along]

    @model_validator(mode="after")
    def _rope_turns_pairs(self) -> "AudioMambaConfig":
        if self.position == "rope" and self.d_model % 4:
            raise ValueError(
                f"position rope turns pairs of channels by row and by column: d_model {self.d_model} must be "
                "a multiple of 4"
            )
        return self


class CPMobileConfig(Frozen):
    """CP-Mobile, the DCASE 2025 Task 1 baseline network; the defaults are the baseline's."""

    family: Literal["cp_mobile"] = "cp_mobile"
    n_mels: Positive
    n_frames: Positive
    n_classes: Annotated[int, Field(ge=2)]
    base_channels: Positive = 32
    channels_multiplier: Annotated[float, Field(gt=0)] = 1.8
    expansion_rate: Annotated[float, Field(gt=0)] = 2.1
    folded: bool = False


ModelConfig = Annotated[AudioMambaConfig | CPMobileConfig, Field(discriminator="family")]


def stem_grid(stem: PatchStem | ConvStem, n_mels: int, n_frames: int) -> Grid:
    """Rows and columns that a stem leaves of an (F,T) spectrogram."""
    if isinstance(stem, PatchStem):
        return (
            max(0, (n_mels - stem.patch_mels) // stem.stride_mels + 1),
            max(0, (n_frames - stem.patch_frames) // stem.stride_frames + 1),
        )
    rows, columns = n_mels, n_frames
    for stage in stem.stages:  # 3x3 kernels padded by 1: ceil division by the stride
        rows, columns = -(-rows // stage.stride_mels), -(-columns // stage.stride_frames)
    return rows, columns


def reads_whole_frames(stem: PatchStem | ConvStem) -> bool:
    """Whether all mel rows of a frame make one token, so that their number is fixed."""
    return isinstance(stem, ConvStem) and stem.token == "frame"


def token_grid(stem: PatchStem | ConvStem, n_mels: int, n_frames: int) -> Grid:
    """Rows and columns of the tokens made of an (F,T) spectrogram; whole frames make one row."""
    rows, columns = stem_grid(stem, n_mels, n_frames)
    return (min(rows, 1), columns) if reads_whole_frames(stem) else (rows, columns)


def uniform_blocks(
    depth: int,
    d_model: int,
    *,
    expand: float = 2.0,
    d_state: int = 16,
    dt_rank: int | None = None,
    block_type: BlockType = "v2",
) -> tuple[BlockConfig, ...]:
    """`depth` equal blocks by Mamba's rule: D = expand*M, R = ceil(M/16)."""
    block = BlockConfig(
        d_inner=round(expand * d_model),
        d_state=d_state,
        dt_rank=dt_rank or math.ceil(d_model / 16),
        block_type=block_type,
    )
    return (block,) * depth
