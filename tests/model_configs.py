"""Random configurations of every kind of model, for tests that hold several accounts of one model against each other.

A new mixer joins `MIXERS`, a new stem `STEMS`; what excludes what is in `audio_mambas`.
"""

from hypothesis import strategies as st

from aum_compress.models.config import (
    AudioMambaConfig,
    Block,
    BlockConfig,
    ConvBlockConfig,
    ConvStage,
    ConvStem,
    CPMobileConfig,
    Mamba2BlockConfig,
    PatchStem,
)

WIDTHS = st.integers(2, 12)
"""Not 1: in an ONNX file a tensor of one value is a constant of the graph, and belongs to no layer."""
ALONG = st.sampled_from(["tokens", "time", "mel"])

MIXERS: dict[str, st.SearchStrategy[Block]] = {
    "mamba": st.builds(
        BlockConfig,
        d_inner=WIDTHS,
        d_state=WIDTHS,
        dt_rank=st.integers(1, 4),
        d_conv=st.integers(1, 5),
        block_type=st.sampled_from(["none", "v1", "v2"]),
        along=ALONG,
    ),
    "mamba2": st.builds(
        lambda n_heads, head_dim, **others: Mamba2BlockConfig(d_inner=n_heads * head_dim, head_dim=head_dim, **others),
        n_heads=st.integers(2, 4),
        head_dim=st.integers(1, 4),
        d_state=WIDTHS,
        d_conv=st.integers(1, 5),
        two_way=st.booleans(),
        along=ALONG,
    ),
    "conv": st.builds(ConvBlockConfig, d_inner=WIDTHS, d_conv=st.integers(1, 5), along=ALONG),
}
"""Name of the mixer -> blocks around it; each block of a model has widths of its own, as after pruning."""
BLOCKS = st.one_of(*MIXERS.values())

STRIDES = st.integers(1, 3)
PLAIN_STAGES = st.builds(ConvStage, channels=WIDTHS, stride_mels=STRIDES, stride_frames=STRIDES, expansion=st.just(0.0))
INVERTED_STAGES = st.builds(
    ConvStage,
    channels=WIDTHS,
    stride_mels=STRIDES,
    stride_frames=STRIDES,
    expansion=st.sampled_from([1.0, 1.7, 3.0]),
    hidden=st.one_of(st.none(), WIDTHS),  # as pruning leaves it
    shortcut=st.sampled_from([None, False]),
)
STAGES = st.one_of(PLAIN_STAGES, INVERTED_STAGES)
STEMS: dict[str, st.SearchStrategy[ConvStem | PatchStem]] = {
    "conv": st.builds(
        lambda first, rest, token, folded: ConvStem(stages=(first, *rest), token=token, folded=folded),
        PLAIN_STAGES,
        st.lists(STAGES, max_size=3),
        st.sampled_from(["frame", "cell"]),
        st.booleans(),
    ),
    "patch": st.builds(
        PatchStem,
        patch_mels=st.integers(2, 8),
        patch_frames=st.integers(2, 8),
        stride_mels=st.integers(2, 8),
        stride_frames=st.integers(2, 8),
    ),
}


@st.composite
def audio_mambas(draw, blocks: st.SearchStrategy[Block] = BLOCKS) -> AudioMambaConfig:
    """A small AuM or student: up to three different blocks on up to 20 x 20 features."""
    pool = draw(st.sampled_from(["class_token", "mean"]))
    chosen = draw(st.lists(blocks, min_size=1, max_size=3))
    positions, heads = ["absolute", "rope", "none"], ["linear", "mlp"]
    if pool == "class_token":  # stands in no row and no column
        chosen = [block.model_copy(update={"along": "tokens"}) for block in chosen]
    else:
        positions.append("factorised")
        heads.append("batch_norm")
    return AudioMambaConfig(
        n_mels=draw(st.integers(8, 20)),
        n_frames=draw(st.integers(8, 20)),
        n_classes=draw(st.integers(2, 6)),
        d_model=4 * draw(st.integers(1, 3)),
        blocks=tuple(chosen),
        stem=draw(st.one_of(*STEMS.values())),
        pool=pool,
        position=draw(st.sampled_from(positions)),
        head=draw(st.sampled_from(heads)),
        mean_subtraction=draw(st.sampled_from([0, 0.5])),
    )


CP_MOBILES = st.builds(
    CPMobileConfig,
    n_mels=st.integers(8, 70),
    n_frames=st.integers(8, 70),
    n_classes=st.integers(2, 12),
    base_channels=st.sampled_from([8, 16, 32, 37]),
    channels_multiplier=st.sampled_from([1.0, 1.5, 1.8]),
    expansion_rate=st.sampled_from([1.0, 2.1, 3.0]),
    folded=st.booleans(),
)
