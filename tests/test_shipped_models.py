"""The trained models of exports/: they are what their cards say, and answer as they did when they were measured."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from aum_compress.budget.check_onnx import check_onnx
from aum_compress.cli import app
from aum_compress.export.runtime import Classifier

EXPORTS = Path(__file__).parents[1] / "exports"
LOGITS = {
    "esc10-mobile-int8/model-int8.onnx": (1.853, -0.585, -1.399, -0.828, -1.012, -1.752, 0.190, 1.650, 1.429, 0.454),
    "esc10-edge/model-int8.onnx": (2.118, 2.037, -0.885, -0.970, -0.344, -0.676, -0.717, -0.156, -0.187, -0.220),
    "esc10-edge/model-int8-waveform.onnx": (
        2.118,
        2.037,
        -0.885,
        -0.970,
        -0.344,
        -0.676,
        -0.717,
        -0.156,
        -0.187,
        -0.220,
    ),
}
"""File -> logits for `sweep`."""


def sweep() -> np.ndarray:
    """A second of a rising tone in some noise, at 32 kHz."""
    seconds = np.arange(32_000) / 32_000
    noise = np.random.default_rng(0).standard_normal(32_000)
    return (0.3 * np.sin(2 * np.pi * (200 + 900 * seconds) * seconds) + 0.02 * noise).astype(np.float32)


@pytest.mark.parametrize("name", LOGITS)
def test_answers_are_those_of_the_file_that_was_measured(name):
    prediction = Classifier(EXPORTS / name, intra_op_num_threads=1).classify_samples(sweep(), 32_000)
    wanted = np.array(LOGITS[name])
    found = np.log(prediction.probabilities[0])
    # kernels of another processor may round a value between two steps to the other side
    np.testing.assert_allclose(found - found.mean(), wanted - wanted.mean(), atol=0.05 * np.abs(wanted).max())


@pytest.mark.parametrize("folder", sorted({name.partition("/")[0] for name in LOGITS}))
def test_cards_say_what_the_files_are(folder):
    card = (EXPORTS / folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    for path in (EXPORTS / folder).glob("*.onnx"):
        report = check_onnx(path)
        assert report.param_bytes <= 128_000
        assert f"{report.param_bytes:,}" in card
        assert f"{report.macs:,}" in card
    for part in ("CC BY 3.0", "unseen", "## Limits of use", "aum-compress predict"):
        assert part in card
    assert re.search(r"\| baby_cry \|.*\n\|.*\n\| [\d.]+ \|", card), "accuracy by class"
    assert sum(path.stat().st_size for path in (EXPORTS / folder).iterdir()) < 350_000


def test_the_model_for_small_devices_is_proved_by_what_lies_beside_it():
    answer = CliRunner().invoke(app, ["verify", str(EXPORTS / "esc10-edge"), "--json"])
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert len(found) == 2
