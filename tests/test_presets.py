"""Named students: each within the limits of its lane, by the counters that gate exports."""

import pytest

from aum_compress.budget.analytic import analytic_macs
from aum_compress.budget.analytic_bytes import analytic_stored
from aum_compress.budget.check import check_preset
from aum_compress.models.factory import folded_config
from aum_compress.models.presets import PRESETS, front_end_of
from aum_compress.recipe_schema import StudentSection

LANES = {
    "student-int8": ("int8", 128_000, 91_183),
    "student-fp16": ("fp16", 2 * 64_000, 116_372),
    "student-edge": ("int8", 128_000, 74_163),
}
FEWEST_MACS = {"student-int8": 21e6, "student-fp16": 21e6, "student-edge": 0}
"""Accuracy uses what the limits leave; the edge is fast."""


@pytest.mark.parametrize("name", LANES)
def test_each_lane_keeps_its_limits_with_ten_classes(name):
    precision, limit, param_bytes = LANES[name]
    front_end = front_end_of(name)
    config = folded_config(PRESETS[name](front_end.n_mels, front_end.n_frames(1.0), 10))
    stored = analytic_stored(config, precision).values()
    assert sum(layer.param_bytes for layer in stored) == param_bytes <= limit
    assert sum(layer.params for layer in stored) <= limit // (2 if precision == "fp16" else 1)
    assert FEWEST_MACS[name] < sum(analytic_macs(config).values()) <= 30e6


@pytest.mark.parametrize("name", LANES)
def test_the_budget_of_a_lane_is_that_of_what_ships(name):
    report = check_preset(name)
    assert not report.over
    assert report.param_bytes == LANES[name][2]


@pytest.mark.parametrize("name", LANES)
def test_lanes_read_small_features_and_many_classes_too(name):
    """A folder of recordings at 16 kHz through 64 mel bins, 35 key words."""
    config = folded_config(StudentSection(preset=name).resolve(64, 51, 35))
    assert config.token_grid == ((8, 7) if name == "student-edge" else (4, 7))
    precision, limit, _ = LANES[name]
    assert sum(layer.param_bytes for layer in analytic_stored(config, precision).values()) <= limit
