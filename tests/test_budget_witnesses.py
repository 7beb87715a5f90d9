"""Three witnesses for MACs and three for bytes agree layer by layer: configuration, torch, the exported ONNX file."""

import tempfile
from itertools import cycle
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from model_configs import CP_MOBILES, MIXERS, audio_mambas

from aum_compress.audio.config import InputSpec, LogMelConfig
from aum_compress.budget.analytic import analytic_macs
from aum_compress.budget.analytic_bytes import analytic_stored
from aum_compress.budget.check import check_bundle, check_module, check_preset
from aum_compress.budget.check_onnx import check_onnx
from aum_compress.budget.records import BudgetReport, agree
from aum_compress.budget.traced import traced_operations
from aum_compress.bundle import BundleCard, model_files, write_bundle
from aum_compress.compress.quantize import layer_storages
from aum_compress.export.metadata import FEATURES, OnnxMetadata
from aum_compress.export.onnx_writer import export_onnx, round_to_half
from aum_compress.exporting import ExportOptions, export_bundle
from aum_compress.models.config import AudioMambaConfig, ConvStage, ConvStem, CPMobileConfig, uniform_blocks
from aum_compress.models.factory import Model, build_model, fold_batch_norm, folded_config
from aum_compress.models.presets import LANES, PRESETS, aum, front_end_of
from aum_compress.models.quantized import QuantizedLayer, quantizable_layers, stored_tensors, swap_in_quantized
from aum_compress.models.storage import Storage
from aum_compress.recipe_schema import QuantizeSection

SECTIONS = st.one_of(
    st.builds(
        QuantizeSection,
        weights=st.sampled_from(("int8", "int8-weight", "int4-weight")),
        smoothing=st.sampled_from((0.0, 0.5)),
        scan_inputs=st.sampled_from(((), ("u", "B", "C"), ("u", "delta"))),
    ),
    st.just(QuantizeSection()),
)
"""How a model is quantised where its precision says that it is."""
PRECISIONS = st.one_of(st.sampled_from(("fp32", "fp16")), SECTIONS, SECTIONS)
# an export takes seconds, so a failure is shown as found, not made smaller
FEW = settings(max_examples=3, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))


@settings(max_examples=40, deadline=None)
@given(config=audio_mambas() | CP_MOBILES, section=st.none() | SECTIONS)
def test_configuration_and_traced_graph_agree_in_every_layer(config, section):
    model = build_model(config) if section is None else deployed(config, "int8", section)[0]
    traced = traced_operations(model, torch.zeros(1, 1, config.n_mels, config.n_frames))
    agree({"configuration": analytic_macs(model.config), "traced graph": {n: own.macs for n, own in traced.items()}})


def deployed(
    config: AudioMambaConfig | CPMobileConfig, precision: str, section: QuantizeSection | None
) -> tuple[Model, dict[str, Storage]]:
    """A random model as a file of this precision holds it, and what of it is quantised: every fourth layer of another
    storage than the section's, or of none."""
    with torch.random.fork_rng(devices=[]):
        model = fold_batch_norm(build_model(config))
    if precision != "fp32":
        model = round_to_half(model)
    storages: dict[str, Storage] = {}
    if section is not None:
        others = dict(zip(list(quantizable_layers(model))[::4], cycle(("fp16", "int4-weight", "int8"))))
        storages = layer_storages(model, section.model_copy(update={"layers": others}))
        swap_in_quantized(model, storages)
        for layer in model.modules():
            if isinstance(layer, QuantizedLayer):
                layer.weight.random_(-7, 8)
    return model.eval(), storages


def input_spec(n_mels: int, n_frames: int) -> InputSpec:
    """A front-end that makes features of this size."""
    front_end = LogMelConfig(sample_rate_hz=8000, n_fft=512, window_samples=512, hop_samples=500, n_mels=n_mels)
    return InputSpec(front_end=front_end, clip_seconds=(n_frames - 1) * 500 / 8000)


def layer_macs(report: BudgetReport) -> dict[str, int]:
    return {layer.name: layer.macs for layer in report.layers}


def layer_bytes(report: BudgetReport) -> dict[str, tuple[int, int, int]]:
    # a file cannot tell a tensor of the model itself from a layer of that name
    return {
        layer.name.removeprefix("cls_token"): (layer.param_bytes, layer.params, layer.wide_params)
        for layer in report.layers
        if layer.param_bytes
    }


def hold_all_against_each_other(config: AudioMambaConfig | CPMobileConfig, stored_as: str | QuantizeSection) -> None:
    section = None if isinstance(stored_as, str) else stored_as
    precision = stored_as if section is None else section.precision
    model, storages = deployed(config, precision, section)
    features = torch.zeros(1, 1, config.n_mels, config.n_frames)
    by_torch = check_module(model, features, stored=stored_tensors(model, half=precision != "fp32"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        labels = tuple(map(str, range(config.n_classes)))
        spec = input_spec(config.n_mels, config.n_frames)
        export_onnx(model, path, OnnxMetadata(labels=labels, input=spec.model_dump(), precision=precision))
        by_onnx = check_onnx(path)
    agree(
        {
            "configuration": analytic_macs(model.config),
            "traced graph": layer_macs(by_torch),
            "ONNX graph": layer_macs(by_onnx),
        }
    )
    assert layer_bytes(by_torch) == layer_bytes(by_onnx)
    if isinstance(config, AudioMambaConfig):
        by_configuration = analytic_stored(model.config, precision, storages)
        assert layer_bytes(by_torch) == {
            name: (own.param_bytes, own.params, own.wide_params) for name, own in by_configuration.items()
        }


@pytest.mark.parametrize("mixer", list(MIXERS))
def test_all_three_agree_on_macs_and_bytes_of_each_mixer(mixer):
    @FEW
    @given(config=audio_mambas(MIXERS[mixer]), stored_as=PRECISIONS)
    def check(config: AudioMambaConfig, stored_as: str | QuantizeSection) -> None:
        hold_all_against_each_other(config, stored_as)

    check()


@FEW
@given(config=audio_mambas() | CP_MOBILES, stored_as=PRECISIONS)
def test_all_three_agree_on_macs_and_bytes_of_mixed_models(config, stored_as):
    hold_all_against_each_other(config, stored_as)


@pytest.mark.parametrize("name", list(PRESETS))
def test_configuration_and_traced_graph_agree_on_every_preset(name):
    report = check_preset(name)  # raises where they do not
    assert report.witnesses == ("traced graph", "configuration")
    front_end = front_end_of(name)
    config = PRESETS[name](front_end.n_mels, front_end.n_frames(1.0), 10)
    assert report.macs == sum(analytic_macs(folded_config(config) if name in LANES else config).values())


@pytest.mark.parametrize(
    ("d_model", "block_type", "n_frames", "macs"),
    [(384, "v2", 1024, 13.8e9), (384, "v2", 128, 1.75e9), (768, "v1", 1024, 48.7e9)],
)
def test_published_sizes_have_the_macs_of_their_formula(d_model, block_type, n_frames, macs):
    """AuM-Small and AuM-Base at 513 tokens (10 s), AuM-Small at 65 (1 s)."""
    config = aum(d_model, 128, n_frames, 527, block_type)
    assert config.n_tokens == 8 * n_frames // 16 + 1
    assert sum(analytic_macs(config).values()) == pytest.approx(macs, rel=0.003)
    # all blocks are alike, so that one of them, traced at full width and length, speaks for the others
    shallow = config.model_copy(update={"blocks": uniform_blocks(1, d_model, block_type=block_type)})
    with torch.device("meta"):
        model = build_model(shallow)
    traced = {
        name: own.macs for name, own in traced_operations(model, torch.zeros(1, 1, 128, n_frames)).items() if own.macs
    }
    whole = sum(macs * (24 if name.startswith("layers.0.") else 1) for name, macs in traced.items())
    assert whole == sum(analytic_macs(config).values())


def test_the_bytes_of_an_exported_bundle_follow_from_its_parent(tmp_path):
    stem = ConvStem(stages=(ConvStage(channels=8, expansion=0), ConvStage(channels=8)))
    config = aum(8, 32, 17, 4, depth=1).model_copy(update={"stem": stem})
    spec = input_spec(32, 17)
    model = build_model(config).eval()
    card = BundleCard(
        kind="model",
        stage="prune",
        recipe="test",
        model=config,
        input=spec,
        labels=("a", "b", "c", "d"),
        precision="fp32",
        seed=0,
        versions={},
        created="",
    )
    parent = write_bundle(tmp_path / "parent", card, model_files(model, torch.randn(2, 1, 32, 17).numpy()))
    exported = export_bundle(parent, tmp_path / "exported", ExportOptions(("fp16",), (FEATURES,)))
    report = check_bundle(exported)
    explained = next(note for note in report.notes if note.startswith("bytes follow from the bundle's tensors"))
    assert f"{sum(tensor.nbytes for tensor in parent.tensors().values()):,};" in explained
    assert "batch normalisation folded" in explained
    assert "stored as float16" in explained

    (parent.path / "bundle.json").write_text(card.model_copy(update={"seed": 1}).model_dump_json())
    assert not any("bytes follow" in note for note in check_bundle(exported).notes), "it is not the parent any more"
