"""Bytes from configuration against the tensors of the real model, at each precision, over random configurations."""

import subprocess
import sys

import pytest
import torch
from exported import CONFIG, written
from hypothesis import given, settings
from hypothesis import strategies as st

from aum_compress.budget.analytic_bytes import analytic_storable, analytic_stored
from aum_compress.budget.check_onnx import check_onnx
from aum_compress.budget.records import Stored
from aum_compress.budget.stored import stored_by_module
from aum_compress.compress.prune_plan import Costing
from aum_compress.compress.quantize import layer_storages, storages_by
from aum_compress.models.config import (
    AudioMambaConfig,
    BlockConfig,
    ConvBlockConfig,
    ConvStage,
    ConvStem,
    Mamba2BlockConfig,
    PatchStem,
)
from aum_compress.models.factory import build_model, fold_batch_norm
from aum_compress.models.quantized import quantizable_layers, stored_tensors, swap_in_quantized
from aum_compress.recipe_schema import QuantizeSection

small = st.integers(1, 9)
mamba = st.builds(
    BlockConfig, d_inner=small, d_state=small, dt_rank=small, block_type=st.sampled_from(("none", "v1", "v2"))
)
mamba2 = st.builds(
    lambda heads, width, state, two_way: Mamba2BlockConfig(
        d_inner=heads * width, d_state=state, head_dim=width, two_way=two_way
    ),
    small,
    small,
    small,
    st.booleans(),
)
conv = st.builds(ConvBlockConfig, d_inner=small, d_conv=small)
stages = st.lists(
    st.builds(ConvStage, channels=small, expansion=st.sampled_from((0.0, 1.5, 2.0))), min_size=0, max_size=2
)
conv_stem = st.builds(
    lambda first, rest, token: ConvStem(stages=(ConvStage(channels=first, expansion=0), *rest), token=token),
    small,
    stages,
    st.sampled_from(("frame", "cell")),
)
patch_stem = st.builds(PatchStem, patch_mels=st.sampled_from((4, 8)), patch_frames=st.sampled_from((3, 8)))


@st.composite
def configurations(draw) -> AudioMambaConfig:
    pool = draw(st.sampled_from(("mean", "class_token")))
    positions = ("none", "absolute", "rope") + (("factorised",) if pool == "mean" else ())
    return AudioMambaConfig(
        n_mels=32,
        n_frames=17,
        n_classes=draw(st.integers(2, 5)),
        d_model=4 * draw(small),
        blocks=draw(st.lists(mamba | mamba2 | conv, min_size=1, max_size=3)),
        stem=draw(conv_stem | patch_stem),
        pool=pool,
        position=draw(st.sampled_from(positions)),
        head=draw(st.sampled_from(("linear", "mlp"))),
    )


def counted(config: AudioMambaConfig, precision: str) -> dict[str, Stored]:
    """Of the model itself, as a bundle of this precision stores it."""
    model = fold_batch_norm(build_model(config))
    if precision in ("int8", "int4"):
        weights = "int8" if precision == "int8" else "int4-weight"
        swap_in_quantized(model, layer_storages(model, QuantizeSection(weights=weights)))
    return stored_by_module(model, stored_tensors(model, half=precision != "fp32"))


@settings(max_examples=60, deadline=None)
@given(config=configurations(), precision=st.sampled_from(("fp32", "fp16", "int8", "int4")))
def test_bytes_from_configuration_are_those_of_the_model_layer_by_layer(config, precision):
    with torch.random.fork_rng(devices=[]):
        assert analytic_stored(config, precision) == counted(config, precision)


BEGINNINGS = ("patch_embed", "layers", "layers.0", "layers.0.mixer.in_proj", "layers.0.mixer.out_proj", "head")
STORAGES = st.sampled_from(("fp16", "int8", "int8-weight", "int4-weight"))
SECTIONS = st.builds(
    QuantizeSection,
    weights=st.sampled_from(("int8", "int8-weight", "int4-weight")),
    layers=st.dictionaries(st.sampled_from((*BEGINNINGS, "layers.0.mixer.x_proj", "layers.0.mixer.dt_proj")), STORAGES),
    keep_float=st.lists(st.sampled_from(BEGINNINGS), max_size=2),
    scan_inputs=st.sampled_from(((), ("u", "B", "C"), ("u", "delta"), ("delta",))),
    smoothing=st.sampled_from((0.0, 0.5)),
)


@settings(max_examples=60, deadline=None)
@given(config=configurations(), section=SECTIONS)
def test_pruning_counts_the_bytes_of_the_file_that_the_quantize_section_makes(config, section):
    with torch.random.fork_rng(devices=[]):
        model = fold_batch_norm(build_model(config))
    names = tuple(quantizable_layers(model))
    fitting = {start: storage for start, storage in section.layers.items() if any(n.startswith(start) for n in names)}
    section = section.model_copy(update={"layers": fitting})
    swap_in_quantized(model, layer_storages(model, section))
    stored = sum(tensor.nbytes for tensor in stored_tensors(model, half=True).values())
    assert Costing(section.precision, 1.0, section)(config).param_bytes == stored


@pytest.mark.parametrize(
    ("block", "wide"),
    [
        (BlockConfig(d_inner=16, d_state=4, dt_rank=4), {"layers.0.mixer": 2 * 16 * 4}),  # A_log, both ways
        (Mamba2BlockConfig(d_inner=16, d_state=4, head_dim=8), {}),
        (ConvBlockConfig(d_inner=16, d_conv=4), {}),
    ],
)
def test_with_every_layer_of_its_blocks_int8_a_mamba_1_block_alone_stores_a_matrix_wide(block, wide):
    config = CONFIG.model_copy(update={"blocks": (block,)})
    section = QuantizeSection(layers={"layers": "int8"})
    stored = analytic_stored(config, "mixed", storages_by(section, analytic_storable(config)))
    assert {name: layer.wide_params for name, layer in stored.items() if layer.wide_params} == wide


def test_an_exported_file_stores_as_many(tmp_path):
    for precision in ("fp32", "fp16", "int8", "int4"):
        report = check_onnx(written(tmp_path, precision))
        stored = analytic_stored(CONFIG, precision)
        assert report.param_bytes == sum(layer.param_bytes for layer in stored.values()), precision
        assert report.params == sum(layer.params for layer in stored.values())
        assert report.wide_params == sum(layer.wide_params for layer in stored.values())


def test_torch_free():
    code = "import sys; sys.modules['torch'] = None; import aum_compress.budget.analytic_bytes"
    subprocess.run([sys.executable, "-c", code], check=True)
