"""What docs/budgets.md says can be run, and its figures are the measured ones."""

import json
import re
import statistics
from pathlib import Path

import pytest
from tiny import SPEC, student_config

from aum_compress.budget.analytic import analytic_macs
from aum_compress.budget.check import check_model
from aum_compress.budget.latency import MICROSECONDS
from aum_compress.budget.limits import RULES, named_limits
from aum_compress.budget.records import BudgetExceeded
from aum_compress.compress.quantize import layer_storages
from aum_compress.models.config import Mamba2BlockConfig
from aum_compress.models.factory import build_model, folded_config
from aum_compress.models.presets import PRESETS
from aum_compress.models.quantized import stored_tensors, swap_in_quantized
from aum_compress.recipe_schema import QuantizeSection

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "budgets.md").read_text(encoding="utf-8")
MEASURED = json.loads((ROOT / "benchmarks" / "mac_counters.json").read_text())["cases"]
CODE = re.search(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)[1]


def test_the_python_example_prints_what_it_says(capsys):
    exec(compile(CODE, "docs/budgets.md", "exec"), {})  # the page's own code, a file of this repository
    assert capsys.readouterr().out.strip() == re.search(r"print\(.*?\)  # (.*)", CODE)[1]


def test_the_python_example_fails_where_the_model_is_over():
    with pytest.raises(BudgetExceeded, match="143,856 MACs"):
        exec(compile(CODE.replace('named_limits("dcase2025")', "named_limits(max_macs=10)"), "docs", "exec"), {})


def test_the_table_of_counters_is_the_measured_one():
    rows = re.findall(
        r"^\| \**(aum-compress|torchinfo|thop|ptflops|fvcore|torch)[^|]*\|(.*)\|$", PAGE, flags=re.MULTILINE
    )
    found = [[int(re.search(r"[\d,]+", cell)[0].replace(",", "")) for cell in row.split("|")] for _, row in rows]
    cases = [case["macs"] for case in MEASURED.values()]
    assert found == [[case[name] for case in cases] for name in cases[0]]
    for _, row in rows[1:]:
        for cell, case in zip(row.split("|"), cases, strict=True):
            figure, share = re.search(r"([\d,]+) \(([\d.]+) %\)", cell).groups()
            assert float(share) == round(100 * int(figure.replace(",", "")) / case["aum-compress"], 1)


@pytest.mark.parametrize("title", MEASURED)
def test_our_own_figure_is_still_what_is_counted(title):
    _, _, n_mels, n_frames = MEASURED[title]["input"]
    name, classes = ("cp-mobile", 10) if title == "CP-Mobile" else ("aum-small", 527 if n_frames == 1024 else 10)
    config = PRESETS[name](n_mels, n_frames, classes)
    assert sum(analytic_macs(config).values()) == MEASURED[title]["macs"]["aum-compress"]


def test_estimated_times_are_as_near_to_measured_ones_as_the_page_says():
    found = json.loads((ROOT / "benchmarks" / "latency_model.json").read_text())
    assert {term: float(f"{value:.3g}") for term, value in found["microseconds"].items()} == MICROSECONDS
    held_out = [file for file in found["files"] if file["held_out"]]
    estimates = [sum(MICROSECONDS[term] * count for term, count in file["terms"].items()) / 1000 for file in held_out]
    errors = [abs(ms / file["ms"] - 1) for ms, file in zip(estimates, held_out, strict=True)]
    stated = re.search(r"median error (\d+) %, nine of ten within (\d+) %, worst (\d+) %", PAGE).groups()
    figures = (statistics.median(errors), sorted(errors)[26], max(errors))
    assert tuple(f"{100 * figure:.0f}" for figure in figures) == stated


@pytest.mark.parametrize(("layers", "over"), [({}, ["layers.0.mixer.conv1d"]), ({"layers": "int8"}, [])])
def test_mamba2_passes_dcase2022_with_every_weight_in_int8_alone(layers, over):
    config = student_config().model_copy(update={"blocks": (Mamba2BlockConfig(d_inner=24, d_state=4, head_dim=8),)})
    model = build_model(folded_config(config))
    swap_in_quantized(model, layer_storages(model, QuantizeSection(layers=layers)))
    report = check_model(model, SPEC, stored_tensors(model, half=True), named_limits("dcase2022"))
    assert [layer.name for layer in report.layers if layer.wide_params] == over
    assert report.over == bool(over)


def test_every_named_limit_has_its_row():
    assert re.findall(r"^\| `(dcase\d+)`", PAGE, flags=re.MULTILINE) == list(RULES)
