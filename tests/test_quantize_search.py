"""What each tensor costs, and the mixture that a search makes of it."""

import json
import shutil

import numpy as np
import pytest
import torch
from audio_trees import SECONDS
from tiny import features, student_config, trained_like
from tiny_recipe import TRAIN, command, finished_run, recipe, write_recipe

from aum_compress.budget.check_onnx import check_onnx
from aum_compress.bundle import read_bundle
from aum_compress.compress import search as search_module
from aum_compress.compress.quantize import prepare, quantize, signal_to_noise_db, with_layers
from aum_compress.compress.search import search
from aum_compress.compress.sensitivity import REST, Judge, sensitivity
from aum_compress.errors import AumError, BudgetExceeded, RecipeError
from aum_compress.models.fake_quantized import FakeQuantize
from aum_compress.models.quantized import quantizable_layers, stored_tensors
from aum_compress.pipeline import run
from aum_compress.recipe_schema import QuantizeSection, SearchConfig

CALIBRATION = [features(8, seed=7)]


@pytest.fixture(scope="module")
def trained():
    model = trained_like(student_config())
    with torch.no_grad():
        model.head.weight *= 20  # logits far enough apart to be right or wrong
    return model


@pytest.fixture(scope="module")
def judge(trained):
    heard = features(48, seed=3)
    with torch.no_grad():
        targets = trained(heard).argmax(1).numpy()
    return Judge("validation", heard, lambda logits: float(100 * (logits.argmax(1) == targets).mean()))


@pytest.fixture(scope="module")
def costs(trained, judge):
    return sensitivity(trained, CALIBRATION, judge)


def searched(trained, judge, **aims):
    section = QuantizeSection(search=SearchConfig(**aims))
    found = search(trained, CALIBRATION, judge, section)
    return found, quantize(trained, CALIBRATION, with_layers(section, found.layers))


def total_bytes(model):
    return sum(tensor.nbytes for tensor in stored_tensors(model, half=True).values())


def test_every_tensor_is_measured_alone(trained, costs):
    layers = quantizable_layers(trained)
    measured = {(cost.tensor, cost.what, cost.storage) for cost in costs.costs}
    assert len(measured) == len(costs.costs)
    assert {(name, "weights", kind) for name in layers for kind in ("int8", "int4-weight")} <= measured
    assert {tensor for tensor, what, _ in measured if what == "inputs"} >= {
        f"layers.{block}.mixer.scan_{name}{suffix}"
        for block in (0, 1)
        for name in ("u", "B", "C", "delta")
        for suffix in ("", "_b")
    }
    assert (REST, "values", "fp16") in measured
    assert costs.float_accuracy == 100.0


def test_fewer_bits_make_more_noise(costs):
    by_layer = {(c.tensor, c.storage): c.sqnr_db for c in costs.costs if c.what == "weights"}
    for (name, storage), db in by_layer.items():
        if storage == "int8" and db < 80:  # above, it is float32's own noise
            assert db > by_layer[name, "int4-weight"] + 6, name


def test_measuring_leaves_the_model_as_it_was(trained, judge, costs):
    again = sensitivity(trained, CALIBRATION, judge, storages=("int4-weight",))
    before = {(c.tensor, c.what, c.storage): c for c in costs.costs}
    assert all(before[c.tensor, c.what, c.storage] == c for c in again.costs)


def test_bytes_are_exact_and_no_more_than_asked_for(trained, judge):
    found, quantized = searched(trained, judge, max_param_bytes=8000)
    assert found.param_bytes == total_bytes(quantized) <= 8000
    assert found.layers.keys() == quantizable_layers(trained).keys()
    assert len(set(found.layers.values())) > 1


def test_fewest_bytes_for_a_drop(trained, judge):
    loose, quantized = searched(trained, judge, max_drop=60.0)
    strict, _ = searched(trained, judge, max_drop=2.0)
    assert strict.accuracy_drop <= 2.0
    assert loose.param_bytes == total_bytes(quantized) <= strict.param_bytes
    assert json.loads(json.dumps(strict.to_dict()))["layers"] == strict.layers


def test_layers_that_are_named_keep_their_storage(trained, judge):
    section = QuantizeSection(
        keep_float=("head",), layers={"layers.1": "int8-weight"}, search=SearchConfig(max_param_bytes=9000)
    )
    found = search(trained, CALIBRATION, judge, section)
    assert found.layers["head"] == "fp16"
    assert {s for name, s in found.layers.items() if name.startswith("layers.1")} == {"int8-weight"}
    assert found.param_bytes <= 9000


@pytest.mark.parametrize("scan_inputs", [("u", "B", "C"), ("B", "delta")])
@pytest.mark.parametrize("aim", [{"max_param_bytes": 7500}, {"max_drop": 300.0}])
def test_what_is_judged_is_the_model_that_ships(trained, judge, aim, scan_inputs):
    wanted = judge.logits(trained)
    exact = Judge(judge.part, judge.features, lambda logits: -float(np.abs(logits - wanted).sum()))
    section = QuantizeSection(search=SearchConfig(**aim), scan_inputs=scan_inputs)
    found = search(trained, CALIBRATION, exact, section)
    assert any(name.endswith(".out_proj") and storage == "int4-weight" for name, storage in found.layers.items())
    shipped = quantize(trained, CALIBRATION, with_layers(section, found.layers))
    assert found.accuracy_drop == -exact.accuracy(exact.logits(shipped)) <= aim.get("max_drop", np.inf)


@pytest.mark.parametrize("storage", ["int8", "int4-weight"])
@pytest.mark.parametrize("layer", ["in_proj", "out_proj"])
def test_a_layer_costs_what_it_costs_where_it_alone_is_stored_so(trained, judge, costs, layer, storage):
    name = f"layers.0.mixer.{layer}"
    others = dict.fromkeys(quantizable_layers(trained), "fp16")
    alone = prepare(trained, CALIBRATION, with_layers(QuantizeSection(), others | {name: storage}))
    for quantizer in alone.modules():
        if isinstance(quantizer, FakeQuantize):
            quantizer.active = False
    (cost,) = (c for c in costs.costs if (c.tensor, c.what, c.storage) == (name, "weights", storage))
    assert cost.sqnr_db == pytest.approx(signal_to_noise_db(judge.logits(trained), judge.logits(alone)), abs=0.01)


def test_only_inputs_that_become_integers_with_a_layer_count(trained, judge, costs):
    steps, projection = "layers.0.mixer.dt_proj", "layers.0.mixer.x_proj"
    own = costs.noise(steps, "weights", "int8") + costs.noise(steps, "inputs")
    delta = costs.noise("layers.0.mixer.scan_delta", "inputs")
    assert search_module._noise(costs, ("u", "B", "C"), steps, "int8") == own
    assert search_module._noise(costs, ("u", "delta"), steps, "int8") == own + delta > own
    floats = sensitivity(trained, CALIBRATION, judge, QuantizeSection(scan_inputs=()), storages=("int8",))
    assert floats.noise(projection, "inputs") > 0, "it rounds what it reads where u stays in float32"


def test_the_worst_is_rolled_back_and_the_road_goes_on():
    layers = ("a", "b", "c", "d")
    start = dict.fromkeys(layers, "fp16")
    road = [(name, "int8") for name in layers] + [("b", "int4-weight"), ("c", "int4-weight")]

    def drop(chosen):
        return 5.0 if chosen["b"] != "fp16" else 0.1 * sum(value != "fp16" for value in chosen.values())

    chosen, final, rolled_back = search_module._fewest_bytes(start, road, drop, 0.5)
    assert chosen == {"a": "int8", "b": "fp16", "c": "int4-weight", "d": "int8"}
    assert rolled_back == ("b",)
    assert final == pytest.approx(0.3)


def test_aims_that_cannot_be_met_are_refused(trained, judge):
    with pytest.raises(BudgetExceeded, match=r"narrowest mixture of candidates has [\d,]+ bytes, wanted at most 1,000"):
        searched(trained, judge, max_param_bytes=1000)

    fallen = iter([90.0] + [10.0] * 1000)
    worse = Judge(judge.part, judge.features, lambda logits: next(fallen))
    with pytest.raises(AumError, match="accuracy falls by 80.00 points, wanted at most 0.5"):
        searched(trained, worse, max_drop=0.5)


@pytest.mark.parametrize(
    "aims", [{}, {"max_drop": 1.0, "max_param_bytes": 9000}, {"candidates": ["int8"], "max_drop": 1}]
)
def test_an_aim_that_is_none_or_two_is_refused(tmp_path, aims):
    with pytest.raises(RecipeError, match="quantize.search"):
        recipe(tmp_path, quantize={"search": aims}, export={"precisions": ["mixed"]})


@pytest.fixture
def copied(tmp_path_factory, tmp_path, monkeypatch):
    """The finished tiny run, to go on from."""
    finished = finished_run(tmp_path_factory.getbasetemp())
    monkeypatch.setenv("AUM_CACHE", str(finished.cache))
    shutil.copytree(finished.out, tmp_path / "out")
    return finished.tree, tmp_path / "out"


def test_a_recipe_that_searches_and_trains_ships_what_it_found(copied):
    tree, out = copied
    limit = 9 * read_bundle(out / "runs" / "tiny" / "06-quantize").card.budget["param_bytes"] // 10
    section = {
        "calibration_clips": 16,
        "search": {"max_param_bytes": limit, "clips": 12},
        "train": TRAIN,
        "frozen_epochs": 0,
    }
    outcome = run(recipe(tree, quantize=section, export={"precisions": ["fp16", "mixed"]}), out)
    card = outcome.bundles["quantize"].card
    assert card.precision == "mixed"
    found = card.notes["search"]
    assert found["param_bytes"] == card.budget["param_bytes"] <= limit
    assert found["sensitivity"]["part"] == "validation"
    assert len(card.notes["history"]) == TRAIN["epochs"]
    assert card.notes["saturating_pairs"] == 0
    stored = {name: s.removesuffix("-smooth") for name, s in card.quantized_layers.items() if s != "uint8"}
    assert stored == {name: s for name, s in found["layers"].items() if s != "fp16"}
    assert "int4-weight" in stored.values()
    file = check_onnx(outcome.folder / "model-mixed.onnx", config=card.model)
    assert file.param_bytes == found["param_bytes"]
    assert outcome.report["gated"] == "model-mixed.onnx"
    assert outcome.report["verification"]["model-mixed.onnx"]["passed"]
    assert "quantize" in outcome.report["training"]


def test_sensitivity_of_a_float_bundle(copied):
    _, out = copied
    bundle = out / "runs" / "tiny" / "05-prune"
    shown = command("quantize", "--sensitivity", bundle, "--clips", 8)
    assert shown.exit_code == 0, shown.stderr
    assert "layers.0.mixer.in_proj" in shown.stdout
    assert "each tensor quantised alone, on 8 validation clips" in shown.stdout
    written = json.loads((bundle.parent / "quantize-sensitivity.json").read_text())
    assert written["sha256"] == read_bundle(bundle).sha256
    answered = command("quantize", "--sensitivity", bundle, "--clips", 8, "--json")
    assert json.loads(answered.stdout)["costs"] == written["costs"]
    wrong = command("quantize", "--sensitivity", bundle.parent / "06-quantize")
    assert wrong.exit_code == 2
    assert "holds model in int8, wanted a model in fp32" in wrong.stderr


def test_sensitivity_of_a_recipe_judges_on_training_clips_where_there_is_no_other(copied, tmp_path):
    tree, out = copied
    data = {"kind": "tau", "root": str(tree), "clip_seconds": SECONDS, "validation_fraction": 0}
    path = write_recipe(
        tmp_path,
        tree,
        data=data,
        reference=None,
        teacher=None,
        distill=None,
        prune=None,
        student={"d_model": 8, "depth": 1, "d_inner": 16, "d_state": 4, "train": {**TRAIN, "keep": "last"}},
        quantize={"calibration_clips": 4},
    )
    answered = command("quantize", "--sensitivity", path, "--out", out, "--clips", 6, "--json")
    assert answered.exit_code == 0, answered.stderr
    assert json.loads(answered.stdout)["part"] == "train"
