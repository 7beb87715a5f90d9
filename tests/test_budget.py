"""The budget's verdict, its figures against published ones, and bytes at their stored width."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

from aum_compress.audio.config import InputSpec, LogMelConfig
from aum_compress.budget.analytic import analytic_macs, front_end_macs, scan_macs
from aum_compress.budget.check import check_bundle, check_model, check_preset
from aum_compress.budget.records import BudgetReport, LayerCost, Limits, agree, enforce
from aum_compress.bundle import BundleCard, model_files, write_bundle
from aum_compress.errors import AumError, BudgetExceeded
from aum_compress.models.config import AudioMambaConfig, ConvStage, ConvStem, uniform_blocks
from aum_compress.models.factory import Model, build_model, fold_batch_norm
from aum_compress.models.presets import PRESETS
from aum_compress.models.quantized import quantizable_layers, stored_tensors, swap_in_quantized
from aum_compress.report.budget_table import budget_lines, budget_table

FRONT_END = LogMelConfig(sample_rate_hz=8000, n_fft=512, window_samples=512, hop_samples=500, n_mels=32)
SPEC = InputSpec(front_end=FRONT_END, clip_seconds=1.0)
CONFIG = AudioMambaConfig(
    n_mels=32,
    n_frames=17,
    n_classes=4,
    d_model=16,
    blocks=uniform_blocks(2, 16, d_state=4),
    stem=ConvStem(stages=(ConvStage(channels=8, expansion=0), ConvStage(channels=8, stride_mels=4))),
)


def quantized(config: AudioMambaConfig = CONFIG) -> Model:
    model = fold_batch_norm(build_model(config))
    swap_in_quantized(model, list(quantizable_layers(model)))
    return model


def layer(name: str, param_bytes: int, macs: int = 0) -> LayerCost:
    return LayerCost(name, "linear", param_bytes, param_bytes, macs, {})


def report_of(*layers: LayerCost, clip_seconds: float = 1.0) -> BudgetReport:
    return BudgetReport(tuple(layers), Limits(), clip_seconds, ("configuration",))


def test_cp_mobile_has_the_figures_that_dcase_publishes():
    report = check_preset("cp-mobile")
    assert (report.params, report.dcase_macs) == (61_148, 29_419_156)
    assert report.dcase_bytes == 4 * 61_148
    # batch normalisation's running statistics are stored, and DCASE's script does not see them
    assert report.param_bytes == 4 * 61_148 + 4 * 2 * 1_354
    assert report.witnesses == ("traced graph", "configuration")


def test_aum_small_has_the_published_size_and_the_macs_of_its_formula():
    at_65_tokens = PRESETS["aum-small"](256, 65, 527)
    at_513_tokens = PRESETS["aum-small"](128, 1024, 527)
    assert (at_65_tokens.n_tokens, at_513_tokens.n_tokens) == (65, 513)
    with torch.device("meta"):
        published = build_model(at_513_tokens)
    assert sum(parameter.numel() for parameter in published.parameters()) == pytest.approx(25.54e6, rel=0.0005)
    assert sum(analytic_macs(at_65_tokens).values()) == pytest.approx(1.75e9, rel=0.002)
    assert sum(analytic_macs(at_513_tokens).values()) == pytest.approx(13.8e9, rel=0.001)


def test_dcase_figures_of_a_mamba_are_far_below_the_gated_ones():
    report = check_preset("aum-tiny")
    assert report.macs > 10 * report.dcase_macs
    assert report.dcase_bytes == report.param_bytes


def test_the_scan_formula():
    assert scan_macs(d_inner=10, d_state=4, n_tokens=7) == 7 * (4 * 10 * 4 + 3 * 10)


def test_front_end_macs_follow_the_number_of_frames():
    one, ten = (front_end_macs(SPEC.model_copy(update={"clip_seconds": seconds})) for seconds in (1.0, 10.0))
    per_frame = 512 + 512 * 9 + 2 * 257  # window, FFT, power; the mel filters come on top
    assert 17 * per_frame < one < 17 * (per_frame + 3 * 257)
    assert 0.9 * one < ten < one  # per second: the one frame more than S // hop is shared by ten seconds


def test_every_stored_tensor_counts_at_its_width():
    model = quantized()
    stored = stored_tensors(model, half=True)
    report = check_model(model, SPEC, stored)
    assert report.param_bytes == sum(tensor.nbytes for tensor in stored.values())
    projection = next(layer for layer in report.layers if layer.name == "layers.0.mixer.in_proj")
    # 64 x 16 int8 weights, a float32 scale an output, the input's float32 scale and uint8 zero point
    assert projection.param_bytes == 64 * 16 + 64 * 4 + 4 + 1
    assert projection.params == 64 * 16
    assert report.params == check_model(fold_batch_norm(build_model(CONFIG)), SPEC).params


def test_dcase_bytes_of_an_int8_model_are_its_nn_parameters_alone():
    model = quantized()
    report = check_model(model, SPEC, stored_tensors(model, half=True))
    assert report.dcase_bytes == 2 * sum(parameter.numel() for parameter in model.parameters()) < report.param_bytes
    assert report.dcase_macs == check_model(fold_batch_norm(build_model(CONFIG)), SPEC).dcase_macs
    assert any("float twin" in note for note in report.notes)


class Tied(nn.Module):
    """Two layers that share one weight, and a counter that inference never reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(17, 17, bias=False)
        self.second = nn.Linear(17, 17, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(self.norm(x)))


def test_shared_tensors_count_once_but_compute_twice():
    report = check_model(Tied(), SPEC)
    assert report.param_bytes == 4 * (17 * 17 + 4)
    assert report.macs == 2 * 32 * 17 * 17
    assert report.witnesses == ("traced graph",)


def test_a_module_used_twice_counts_twice():
    inner = nn.Linear(17, 17, bias=False)
    assert check_model(nn.Sequential(inner, nn.ReLU(), inner), SPEC).macs == 2 * 32 * 17 * 17


def test_stored_tensors_that_do_not_cover_the_model_are_refused():
    model = build_model(CONFIG)
    stored = stored_tensors(model, half=False)
    del stored["head.bias"]
    with pytest.raises(AumError, match=r"head\.bias: absent"):
        check_model(model, SPEC, stored)


def test_features_of_another_size_than_the_model_is_built_for_are_refused():
    with pytest.raises(AumError, match=r"\(32, 33\) mel bins x frames.*\(32, 17\)"):
        check_model(build_model(CONFIG), SPEC.model_copy(update={"clip_seconds": 2.0}))


def test_macs_are_for_one_second_of_audio_and_rounded_up():
    front_end = FRONT_END.model_copy(update={"hop_samples": 5000})
    ten_seconds = InputSpec(front_end=front_end, clip_seconds=10.0)
    report = check_model(build_model(CONFIG), ten_seconds)
    assert report.macs_per_clip == check_model(build_model(CONFIG), SPEC).macs
    assert report.macs == -(-report.macs_per_clip // 10)


def test_a_check_leaves_random_numbers_and_the_model_as_they_were():
    model = build_model(CONFIG).train()
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    before = torch.get_rng_state()
    check_model(model, SPEC)
    check_preset("student", SPEC)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())


def test_limits_are_met_by_equality_and_broken_by_one():
    enforce(report_of(layer("a", 128_000, 30_000_000)))
    over = report_of(layer("blocks.3.in_proj", 90_000, 5), layer("head", 38_001), layer("norm", 1), layer("small", 0))
    with pytest.raises(BudgetExceeded) as caught:
        enforce(replace(over, layers=over.layers[:2]))
    assert "128,001 bytes of parameters, budget is 128,000 (over by 1); largest: blocks.3.in_proj 90,000" in str(
        caught.value
    )
    assert caught.value.exit_code == 3
    with pytest.raises(BudgetExceeded, match=r"largest: blocks\.3\.in_proj 90,000, head 38,001, norm 1$"):
        enforce(over)


def test_macs_over_the_limit_name_the_largest_layers_of_a_clip():
    with pytest.raises(
        BudgetExceeded, match=r"30,000,001 MACs .*over by 1\); largest in a clip of 2 s: stem 60,000,001"
    ):
        enforce(report_of(layer("stem", 1, 60_000_001), clip_seconds=2.0))


def test_limits_that_nothing_can_meet_are_refused():
    with pytest.raises(AumError, match="max_macs: found 0, wanted a positive number"):
        Limits(max_macs=0)


def test_witnesses_that_differ_are_an_error_that_names_the_layer():
    agree({"configuration": {"a": 5, "b": 0}, "traced graph": {"a": 5}})
    with pytest.raises(AumError, match=r"configuration and by the traced graph differ(.|\n)*head: 5 and 6"):
        agree({"configuration": {"a": 1, "head": 5}, "traced graph": {"a": 1, "head": 6}})


def test_a_model_that_computes_something_else_than_its_configuration_says_is_refused():
    model = build_model(CONFIG)
    model.head = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    with pytest.raises(AumError, match=r"traced graph and by the configuration differ(.|\n)*head\.0: 128 and 0"):
        check_model(model, SPEC)


def test_unknown_preset_and_preset_that_does_not_fit():
    with pytest.raises(AumError, match="no preset is named 'aum-huge'; there are aum-tiny"):
        check_preset("aum-huge")
    with pytest.raises(AumError, match=r"aum-tiny does not fit 8 mel bins x 17 frames: .*stem: leaves a 0 x 1 grid"):
        check_preset("aum-tiny", SPEC.model_copy(update={"front_end": FRONT_END.model_copy(update={"n_mels": 8})}))


def test_a_bundle_is_counted_from_its_tensors(tmp_path):
    model = quantized().eval()
    files = model_files(model, torch.randn(2, 1, 32, 17).numpy(), half=True)
    card = BundleCard(
        kind="model",
        stage="quantize",
        recipe="test",
        model=model.config,
        input=SPEC,
        labels=("a", "b", "c", "d"),
        precision="int8",
        quantized_layers=tuple(quantizable_layers(fold_batch_norm(build_model(CONFIG)))),
        seed=0,
        versions={},
        created="",
    )
    bundle = write_bundle(tmp_path / "bundle", card, files)
    report = check_bundle(bundle)
    assert report.param_bytes == sum(tensor.nbytes for tensor in bundle.tensors().values())
    assert report.macs == sum(analytic_macs(CONFIG).values())


def test_the_report_as_json_has_the_keys_of_the_design():
    report = check_model(build_model(CONFIG), SPEC)
    found = json.loads(json.dumps(report.to_dict()))
    assert {"param_bytes", "macs", "dcase_bytes", "dcase_macs", "elementwise", "layers", "limits", "verdict"} <= set(
        found
    )
    assert found["verdict"] == "within"
    assert found["limits"] == {"max_param_bytes": 128_000, "max_macs": 30_000_000}
    assert sum(layer["param_bytes"] for layer in found["layers"]) == found["param_bytes"]
    assert sum(layer["macs"] for layer in found["layers"]) == found["macs"]
    assert sum(layer["elementwise"].get("exp", 0) for layer in found["layers"]) == found["elementwise"]["exp"]


def printed(table) -> str:
    console = Console(width=140)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_table_sums_up_what_it_leaves_out():
    report = report_of(layer("stem", 100, 7), layer("big", 800, 1), layer("rest", 100, 2))
    whole, short = printed(budget_table(report)), printed(budget_table(report, top=1))
    assert all(name in whole for name in ("stem", "big", "rest", "80.0% ████████"))
    assert "big" in short
    assert "stem" not in short
    assert "2 others" in short
    assert "1,000" in short


def test_the_lines_state_verdict_and_what_is_listed_apart():
    lines = "\n".join(budget_lines(replace(check_preset("cp-mobile"), notes=("one thing more",))))
    assert "param bytes: 255,424 of 128,000 (199.6%): OVER by 127,424" in lines
    assert "MACs per second: 29,416,448 of 30,000,000 (98.1%): within, 583,552 left" in lines
    assert "what DCASE's script prints: 244,592 bytes, 29,419,156 MACs a clip (not gated)" in lines
    assert "log-mel front-end: about 3,925,285 MACs per second (outside the budget)" in lines
    assert lines.endswith("note: one thing more")


@pytest.mark.parametrize(
    "module", ["records", "pack", "analytic", "contraction", "operators", "onnx_graph", "check_onnx"]
)
def test_torch_free_modules(module):
    code = f"import sys; sys.modules['torch'] = None; import aum_compress.budget.{module}"
    subprocess.run([sys.executable, "-c", code], check=True)
