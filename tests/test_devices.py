"""Stage `devices`: a model for each recording device, the pack of them, and what devices gain by it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from answers import answer, message, record
from tiny_recipe import ONE_FILE, TRAIN, changed_copy, command, raw_recipe, recipe, write_recipe

from aum_compress.bundle import read_bundle
from aum_compress.device_names import GENERAL
from aum_compress.devices import device_names
from aum_compress.errors import BudgetExceeded, BundleError, DataError, RecipeError
from aum_compress.packs import PACK, read_pack
from aum_compress.pipeline import run
from aum_compress.recipe import validate_recipe
from aum_compress.recipe_schema import DevicesSection
from aum_compress.submission import package as writing
from aum_compress.workspace import Workspace

DEVICES = {"finetune": TRAIN | {"learning_rate": 3e-3}}
HEARD = ["a", "b", "s1"]

pytestmark = pytest.mark.usefixtures("cache_of_finished")


@pytest.fixture(scope="module")
def packed(finished, tmp_path_factory):
    """The finished run with the stage `devices` on top: its folder, and the report."""
    out = tmp_path_factory.mktemp("devices") / "out"
    return out, changed_copy(finished, out, devices=DEVICES, **ONE_FILE).report


@pytest.fixture
def copied(packed, tmp_path) -> Path:
    return Path(shutil.copytree(packed[0], tmp_path / "copy"))


def made(out: Path) -> dict[str, str]:
    """Bundle of each device -> its digest, in which is when it was made."""
    folder = out / "runs" / "tiny" / "08-devices"
    found = sorted(card.parent for card in folder.rglob("bundle.json"))
    return {str(path.relative_to(folder)): read_bundle(path).sha256 for path in found}


def test_the_defaults_are_those_of_the_baseline():
    train = DevicesSection().finetune
    assert (train.epochs, train.learning_rate, train.augment.mixstyle_p) == (50, 5e-4, 0.0)


def test_each_device_of_training_has_a_model_and_the_report_its_gain(packed):
    out, report = packed
    models = report["devices"]["models"]
    assert [model["device"] for model in models] == HEARD
    assert sum(model["training_clips"] for model in models) == report["data"]["train"]
    for model in models:
        assert model["within_budget"]
        assert model["param_bytes"] == report["budget"]["param_bytes"], "fine-tuning changes no shape"
        if model["test_clips"]:
            assert model["gain"] == pytest.approx(model["accuracy"] - model["general_accuracy"])
        assert None not in (model["validation_accuracy"], model["general_validation_accuracy"])
    assert [model["gain"] is None for model in models] == [False, True, False], "the test part has no clips of b"
    general = next(row for row in report["road"] if row["file"] == "model-int8.onnx")
    assert report["devices"]["test"]["general"]["accuracy"] == general["test"]["accuracy"]
    for name in ("report.md", "report.html"):
        text = (out / "exports" / "tiny" / name).read_text()
        assert "Gain by device" in text
        assert "tiny-devices holds a model for each device" in text
    assert "gain by device: a " in answer("report", out / "exports" / "tiny")


def test_a_device_s_model_is_the_general_one_trained_further_on_its_clips(packed):
    out, _ = packed
    runs = out / "runs" / "tiny"
    parent = read_bundle(runs / "05-prune")
    for name in HEARD:
        tuned = read_bundle(runs / "08-devices" / name / "01-finetune")
        assert tuned.card.parent.sha256 == parent.sha256
        assert (tuned.path / tuned.card.parent.path).resolve() == parent.path.resolve()
        assert (tuned.card.model, tuned.card.input) == (parent.card.model, parent.card.input)
        assert any(not np.array_equal(t, parent.tensors()[key]) for key, t in tuned.tensors().items())
    recipes = {path: record("quantize", path)["recipe"] for path in (runs / "08-devices" / "a" / "01-finetune",)}
    assert set(recipes.values()) == {"tiny"}, "a device's bundle knows its run"


def test_the_pack_is_checked_measured_and_packed_by_the_verbs(packed, finished, tmp_path, monkeypatch):
    out, report = packed
    pack = out / "exports" / "tiny-devices"
    assert sorted(path.name for path in pack.iterdir()) == ["a", "b", "general", PACK, "s1"]
    for name in (GENERAL, *HEARD):
        (found,) = record("verify", pack / name)
        assert found["passed"]
        assert record("verify", pack / name, "--reference", pack / name)[0]["passed"]
    budget = record("budget", pack)
    assert {Path(name).name for name in budget["models"]} == {GENERAL, *HEARD}
    data = write_recipe(tmp_path, finished.tree)
    words = ("evaluate", pack, "--data", data, "--draws", 50)
    found = record(*words)
    assert found["accuracy"] == pytest.approx(report["devices"]["test"]["pack"]["accuracy"])
    assert found["measured_with"] == "onnxruntime"
    compared = record(*words, "--compare", pack / GENERAL)
    by_device = [compared[key]["by_device"] for key in ("first", "second")]
    assert by_device[0]["s4"] == by_device[1]["s4"], "training has not heard it: the general model"
    gains = {model["device"]: model["gain"] for model in report["devices"]["models"]}
    assert by_device[0]["a"] - by_device[1]["a"] == pytest.approx(gains["a"])
    monkeypatch.setattr(writing, "check_package", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    packaged = record("package", pack, "--label", "Doe_XY_task1", "--data", data)
    assert set(packaged["budget"]["models"]) == {GENERAL, *HEARD}
    right = record(*words)["overall_accuracy"]
    assert packaged["test_accuracy"] == pytest.approx(right, abs=100 / 18 + 0.01), "torch may round one clip otherwise"
    meta = (tmp_path / "Doe_XY_task1" / "predictions" / "Doe_XY_task1_1" / "Doe_XY_task1_1.meta.yaml").read_text()
    assert "num_models_at_inference: 4" in meta


def test_second_run_does_nothing(copied, finished):
    before, pack = made(copied), (copied / "exports" / "tiny-devices" / PACK).read_text()
    published = (copied / "exports" / "tiny" / "bundle.json").read_bytes()
    run(recipe(finished.tree, devices=DEVICES, **ONE_FILE), copied)
    assert made(copied) == before
    assert (copied / "exports" / "tiny-devices" / PACK).read_text() == pack
    assert (copied / "exports" / "tiny" / "bundle.json").read_bytes() == published


def test_killed_between_devices_it_goes_on_there(copied, finished, packed):
    before = made(copied)
    shutil.rmtree(copied / "exports" / "tiny-devices")
    for path in ("b/02-quantize", "s1"):
        shutil.rmtree(copied / "runs" / "tiny" / "08-devices" / path)
    outcome = run(recipe(finished.tree, devices=DEVICES, **ONE_FILE), copied)
    after = made(copied)
    kept = [name for name in before if after[name] == before[name]]
    assert {"a/01-finetune", "a/02-quantize", "b/01-finetune"} <= set(kept)
    assert outcome.report["devices"] == packed[1]["devices"], "the same models as of the unbroken run"


def test_fewer_devices_are_named_and_others_keep_the_general_model(copied, finished):
    before = made(copied)
    outcome = run(recipe(finished.tree, devices=DEVICES | {"names": ["s1"]}, **ONE_FILE), copied)
    assert [model["device"] for model in outcome.report["devices"]["models"]] == ["s1"]
    pack = read_pack(copied / "exports" / "tiny-devices")
    assert [pack.model_for(name) for name in ("a", "s1", "s4", "never heard of")] == [GENERAL, "s1", GENERAL, GENERAL]
    assert made(copied) == before, "and no model was trained again"
    without = run(recipe(finished.tree, **ONE_FILE), copied)
    assert without.report["devices"] is None


def test_a_device_s_model_over_budget_stops_the_run(copied, finished, monkeypatch):
    size = read_bundle(copied / "runs" / "tiny" / "06-quantize").card.budget["param_bytes"]
    shutil.rmtree(copied / "exports")
    over = recipe(finished.tree, devices=DEVICES, budget={"max_param_bytes": size - 1}, **ONE_FILE)
    with pytest.raises(BudgetExceeded):
        run(over, copied)
    monkeypatch.setattr("aum_compress.pipeline.enforce", lambda report: None)
    with pytest.raises(BudgetExceeded, match="3 of 3 models of the pack") as caught:
        run(over, copied)
    assert "model for s1: " in str(caught.value)
    assert not (copied / "exports").exists()


@pytest.mark.parametrize(
    ("devices", "error", "wanted"),
    [
        ({"names": ["c"]}, RecipeError, "devices.names: no training clip of c; training has a, b, s1"),
        ({"names": ["s4"]}, RecipeError, "no training clip of s4"),
    ],
)
def test_names_that_training_does_not_have_are_named_before_any_training(devices, error, wanted, finished, tmp_path):
    with pytest.raises(error, match=wanted):
        run(recipe(finished.tree, devices=DEVICES | devices), tmp_path)
    assert not list(tmp_path.rglob("bundle.json"))


def test_devices_without_validation_clips_are_named(finished, tmp_path):
    data = raw_recipe(finished.tree)["data"] | {"validation_fraction": 0}
    last = TRAIN | {"keep": "last"}
    base = raw_recipe(finished.tree)
    changes = {key: base[key] | {"train": last} for key in ("reference", "teacher", "distill")}
    changes |= {"data": data, "prune": base["prune"] | {"finetune": last}}
    with pytest.raises(RecipeError, match=r"devices\.finetune\.keep: best is chosen on validation clips"):
        recipe(finished.tree, **changes, devices=DEVICES)
    recipe(finished.tree, **changes, devices={"finetune": last})


def test_a_device_without_validation_clips_cannot_choose_an_epoch_of_its_quantisation_either(finished, tmp_path):
    last = DEVICES["finetune"] | {"keep": "last"}
    quantize = raw_recipe(finished.tree)["quantize"] | {"train": TRAIN}
    space = Workspace(recipe(finished.tree, devices={"finetune": last}, quantize=quantize), tmp_path)
    assert device_names(space) == HEARD
    index = space.parts.index
    others = tuple(clip for clip in index.validation if clip.device != "b")
    space.parts = replace(space.parts, index=replace(index, validation=others))
    with pytest.raises(RecipeError, match=r"quantize\.train\.keep: best is chosen .* there are none of b; set keep"):
        device_names(space)


def test_names_from_the_data_cannot_lead_out_of_the_folder(finished, tmp_path):
    root = Path(shutil.copytree(finished.tree, tmp_path / "tree"))
    meta = root / "meta.csv"
    meta.write_text(meta.read_text().replace("\tb\n", "\t../../b\n"))
    with pytest.raises(DataError, match=r"devices named '\.\./\.\./b'"):
        run(recipe(root, devices=DEVICES), tmp_path / "out")
    assert not list(tmp_path.rglob("bundle.json"))


def test_class_folders_have_no_devices(tmp_path):
    raw = raw_recipe(tmp_path) | {"data": {"kind": "folders", "root": str(tmp_path)}, "devices": DEVICES}
    with pytest.raises(RecipeError, match="class folders do not say which device recorded"):
        validate_recipe(raw, "test")


def test_a_pack_that_was_altered_is_refused(copied):
    pack = copied / "exports" / "tiny-devices"
    card = json.loads((pack / PACK).read_text())
    for models, wanted in (
        ({**card["models"], "../../runs": "0"}, "cannot name a model's folder"),
        ({**card["models"], "c": "0"}, "c: absent"),
        ({**card["models"], "a": "0"}, "a: altered, or not of this pack"),
        ({"a": card["models"]["a"]}, "general: has no model"),
    ):
        (pack / PACK).write_text(json.dumps(card | {"models": models}))
        with pytest.raises(BundleError, match=wanted):
            read_pack(pack)
    (pack / PACK).write_text(json.dumps(card)[:-20])
    assert "cannot be read as the card of a pack" in message("evaluate", pack, "--data", "x")
    (pack / PACK).write_text(json.dumps(card))
    file = pack / "a" / "model-int8.onnx"
    file.write_bytes(file.read_bytes()[:-1])
    assert "model-int8.onnx: altered or cut short" in command("verify", pack / "a").stderr
