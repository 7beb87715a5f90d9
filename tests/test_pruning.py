"""The stage `prune` on a small data set: to the budget, from the teacher, by ratio; killed and resumed; refused."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_recipe import TRAIN, raw_recipe, recipe

from aum_compress.budget.records import Limits
from aum_compress.bundle import read_bundle
from aum_compress.compress.prune_plan import Cost, Costing
from aum_compress.errors import AumError, BudgetExceeded, RecipeError
from aum_compress.pipeline import run
from aum_compress.pruning import steps_needed

pytestmark = pytest.mark.usefixtures("cache_of_finished")

TO_BUDGET = {"to_budget": True, "round_to": 2, "importance_clips": 32, "finetune": TRAIN}


@pytest.fixture
def copied(finished, tmp_path):
    """The finished run without what pruning and all behind it made."""
    shutil.copytree(finished.out, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "exports")
    for name in ("05-prune", "06-quantize", "07-export"):
        shutil.rmtree(tmp_path / "copy" / "runs" / "tiny" / name)
    return tmp_path / "copy"


def cost_of(bundle):
    return Costing("int8", bundle.card.input.clip_seconds)(bundle.card.model)


@pytest.fixture
def limits(copied):
    """Well below what the distilled student costs."""
    now = cost_of(read_bundle(copied / "runs" / "tiny" / "04-distill"))
    return {"max_param_bytes": round(0.5 * now.param_bytes), "max_macs": round(0.7 * now.macs)}


@pytest.mark.parametrize("importance", ["taylor", "activation"])
def test_the_model_that_ships_is_within_the_budget(finished, copied, limits, importance):
    prune = TO_BUDGET | {"importance": importance, "steps": 2}
    outcome = run(recipe(finished.tree, prune=prune, budget=limits), copied, until="budget")
    shipped = outcome.bundles["quantize"].card.budget
    assert shipped["verdict"] == "within"
    notes = outcome.bundles["prune"].card.notes
    first, *_, last = notes["steps"]
    assert len(notes["steps"]) <= 2
    assert last["param_bytes"][1] == shipped["param_bytes"] > 0.8 * limits["max_param_bytes"]
    assert last["macs"][1] == shipped["macs"]
    assert first["precision"] == "int8"
    assert first["importances"].keys() >= {"d_model", "layers.0.d_inner", "stem.0.channels", "stem.1.hidden"}
    assert first["measured"]["layers.0"].keys() == {"size", "loss_increase"}
    assert last["loss_after"].keys() == {"cut", "fine_tuned"}
    told = json.loads((outcome.folder / "report.json").read_text())["pruning"]
    assert [step["param_bytes"] for step in told] == [step["param_bytes"] for step in notes["steps"]]
    assert f"| 1 | {next(iter(first['kinds']))} " in (outcome.folder / "report.md").read_text()


def test_a_killed_run_goes_on_at_its_step(finished, copied, limits, tmp_path, monkeypatch):
    prune = TO_BUDGET | {"steps": 2, "dimensions": ["d_inner", "d_state", "d_model"]}
    wanted = recipe(finished.tree, prune=prune, budget=limits)
    whole = tmp_path / "whole"
    shutil.copytree(copied, whole)
    unbroken = run(wanted, whole, until="prune").bundles["prune"].card
    assert len(unbroken.notes["steps"]) == 2
    fits = []

    def killed(*arguments, **names):
        fits.append(arguments)
        if len(fits) == 2:
            raise KeyboardInterrupt
        return fit_stage(*arguments, **names)

    from aum_compress.stages import fit_stage

    with monkeypatch.context() as patch:
        patch.setattr("aum_compress.pruning.fit_stage", killed)
        with pytest.raises(KeyboardInterrupt):
            run(wanted, copied, until="prune")
        (work,) = (copied / "runs" / "tiny" / ".work").glob("prune-*")
        assert {path.parent.name for path in work.rglob("choice.json")} == {"step-1", "step-2"}
    with monkeypatch.context() as patch:  # neither step is chosen anew

        def chosen_again(*_, **__):
            raise AssertionError

        patch.setattr("aum_compress.pruning.choose_by_budget", chosen_again)
        resumed = run(wanted, copied, until="prune").bundles["prune"].card
    assert resumed.files["model.safetensors"] == unbroken.files["model.safetensors"]
    assert resumed.notes == unbroken.notes


def test_the_teacher_itself_is_pruned(finished, copied):
    teacher = read_bundle(copied / "runs" / "tiny" / "02-teacher")
    budget = {"max_param_bytes": round(0.4 * cost_of(teacher).param_bytes)}
    raw = raw_recipe(finished.tree, prune=TO_BUDGET | {"start": "teacher", "steps": 1, "last_epochs": 2}, budget=budget)
    sections = raw | dict.fromkeys(("reference", "student", "distill", "export", "verify"))
    outcome = run(recipe(finished.tree, **sections), copied, until="budget")
    assert list(outcome.bundles) == ["teacher", "prune", "quantize"]
    pruned = outcome.bundles["prune"].card
    assert pruned.parent.sha256 == teacher.sha256
    assert (pruned.model.pool, pruned.model.stem.kind) == ("class_token", "patch")
    assert outcome.bundles["quantize"].card.budget["param_bytes"] <= budget["max_param_bytes"]
    assert [row["title"] for row in outcome.report["road"]][1:] == ["teacher, pruned", "teacher, quantised"]
    assert pruned.notes["steps"][-1]["epochs"] == 2
    assert len(list((copied / "runs" / "tiny" / "teacher-logits").glob("teacher-*.npz"))) >= 1


def test_other_mixers_and_dimensions_go_by_ratio(finished, tmp_path):
    blocks = [
        {"mixer": "mamba2", "d_inner": 16, "d_state": 8, "head_dim": 4},
        {"mixer": "conv", "d_inner": 16, "d_conv": 5},
    ]
    student = {"d_model": 8, "blocks": blocks, "stem": raw_recipe(finished.tree)["student"]["stem"], "train": TRAIN}
    prune = {"ratio": 0.5, "dimensions": ["d_inner", "d_state", "stem"], "round_to": 4, "finetune": TRAIN}
    rest = dict.fromkeys(("reference", "teacher", "distill", "quantize", "export", "verify"))
    outcome = run(recipe(finished.tree, student=student, prune=prune, **rest), tmp_path, until="prune")
    config = outcome.bundles["prune"].card.model
    assert sum(block.d_inner for block in config.blocks) == 16
    assert config.blocks[0].d_state == 4
    assert [stage.channels for stage in config.stem.stages] == [4, 4] or sum(
        s.channels for s in config.stem.stages
    ) == 8


def test_a_hopeless_budget_is_refused_before_any_training(finished, tmp_path):
    hopeless = recipe(finished.tree, prune=TO_BUDGET, budget={"max_param_bytes": 100})
    with pytest.raises(BudgetExceeded, match=r"prune.to_budget: cannot be reached: of 4,692 bytes .* limits 100 bytes"):
        run(hopeless, tmp_path)
    with pytest.raises(AumError, match="within the limits as it is"):
        run(recipe(finished.tree, prune=TO_BUDGET, budget={}), tmp_path)
    convolutions = raw_recipe(finished.tree)["student"] | {"d_inner": None, "d_state": None}
    convolutions |= {"depth": 1, "blocks": [{"mixer": "conv", "d_inner": 16, "d_conv": 5}]}
    prune = {"dimensions": ["d_inner", "d_state"], "finetune": TRAIN}
    with pytest.raises(RecipeError, match="prune.dimensions: names d_state, and the student has none"):
        run(recipe(finished.tree, student=convolutions, prune=prune), tmp_path)
    assert not list(Path(tmp_path).rglob("bundle.json"))


def test_steps_follow_from_what_is_over():
    limits = Cost(Limits().max_param_bytes, Limits().max_macs)
    assert steps_needed(Cost(128_000, 30_000_000), limits) == 1
    assert steps_needed(Cost(128_000, 40_000_000), limits) == 1
    assert steps_needed(Cost(384_000, 40_000_000), limits) == 4
    assert steps_needed(Cost(25_000_000, 1_750_000_000), limits) == 15


def test_a_layer_that_left_with_pruning_needs_no_precision_and_one_that_never_was_is_refused_at_once(
    finished, copied, tmp_path, capsys
):
    prune = {"ratio": 0.5, "dimensions": ["blocks"], "finetune": TRAIN}
    quantize = {"calibration_clips": 16, "layers": {"layers.1": "fp16"}, "keep_float": ["layers.0.mixer.x_proj"]}
    outcome = run(recipe(finished.tree, prune=prune, quantize=quantize), copied, until="quantize")
    assert len(outcome.bundles["prune"].card.model.blocks) == 1
    assert "quantize: layers.1: left with pruning" in capsys.readouterr().err
    stored = outcome.bundles["quantize"].card.quantized_layers
    assert stored["layers.0.mixer.in_proj"] == "int8"
    assert "layers.0.mixer.x_proj" not in stored

    misspelt = quantize | {"keep_float": ["layer.0"]}
    with pytest.raises(AumError, match=r"quantize.keep_float: layer.0: no such layer; the model has patch_embed"):
        run(recipe(finished.tree, quantize=misspelt), tmp_path / "new")
    assert not list((tmp_path / "new").rglob("bundle.json"))
