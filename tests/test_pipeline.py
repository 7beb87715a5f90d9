"""The whole road on a small data set: every stage is real, only small."""

import json
import shutil

import onnxruntime
import pytest
from tiny_recipe import ONE_FILE, TRAIN, changed_copy, finished_run, raw_recipe, recipe

from aum_compress.bundle import file_sha256, read_bundle
from aum_compress.errors import AumError, BudgetExceeded, BundleError, DataError, VerificationFailed
from aum_compress.export.runtime import read_metadata, run_session
from aum_compress.pipeline import run
from aum_compress.recipe import find_recipe, load_recipe


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory):
    return finished_run(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def tree(finished_once):
    return finished_once.tree


@pytest.fixture(autouse=True)
def _cache_folder(finished_once, monkeypatch):
    monkeypatch.setenv("AUM_CACHE", str(finished_once.cache))


@pytest.fixture(scope="module")
def finished(finished_once):
    """A run that nobody may change; tests that want to take a copy."""
    return finished_once.out, finished_once.outcome


@pytest.fixture(scope="module")
def shorter(finished_once, tmp_path_factory):
    """The same run with `ONE_FILE`."""
    out = tmp_path_factory.mktemp("shorter") / "out"
    changed_copy(finished_once, out, **ONE_FILE)
    return out


@pytest.fixture
def copied(shorter, tmp_path):
    """To be altered, and gone on with as `recipe(tree, **ONE_FILE)`."""
    out = tmp_path / "copy"
    shutil.copytree(shorter, out)
    return out


STAGES = ("01-reference", "02-teacher", "04-distill", "05-prune", "06-quantize", "07-export")


def stamps(out):
    return {name: read_bundle(out / "runs" / "tiny" / name).card.created for name in STAGES}


def test_the_road_ends_with_three_files_and_a_report(finished):
    out, outcome = finished
    exports = out / "exports" / "tiny"
    assert outcome.folder == exports
    names = {path.name for path in exports.iterdir()}
    precisions = ("fp32", "fp16", "int8")
    models = {f"model-{precision}{reads}.onnx" for precision in precisions for reads in ("", "-waveform")}
    assert names >= models | {
        "report.json",
        "report.md",
        "report.html",
        "bundle.json",
        "golden.npz",
        "recipe.yaml",
        "MODEL_CARD.md",
    }
    report = json.loads((exports / "report.json").read_text())
    assert [row["stage"] for row in report["road"]] == [
        *("reference", "teacher", "distill", "prune", "quantize", "fp32", "fp16", "int8")
    ]
    assert [row["measured_with"] for row in report["road"]][-3:] == ["onnxruntime"] * 3
    assert all(report["verification"][name]["passed"] for name in models)
    assert report["budget"]["verdict"] == "within"
    assert report["gated"] == "model-int8.onnx"
    assert not list((out / "runs" / "tiny" / ".work").iterdir()), "checkpoints of finished stages are gone"


def test_shipped_file_is_measured_as_it_is(finished):
    """The report's int8 accuracy is that of the file, and torch's simulation agrees with it."""
    _, outcome = finished
    rows = {row["stage"]: row for row in outcome.report["road"]}
    assert rows["int8"]["test"]["clips"] == rows["quantize"]["test"]["clips"] == 18
    assert rows["int8"]["test"]["log_loss"] == pytest.approx(rows["quantize"]["test"]["log_loss"], abs=0.05)
    assert rows["fp32"]["test"]["log_loss"] == pytest.approx(rows["prune"]["test"]["log_loss"], abs=1e-4)
    assert rows["int8"]["param_bytes"] == rows["quantize"]["param_bytes"]
    assert rows["int8"]["macs"] == rows["quantize"]["macs"] == rows["prune"]["macs"]


def test_metadata_say_all_that_a_runtime_needs(finished):
    path = finished[0] / "exports" / "tiny" / "model-int8.onnx"
    metadata = read_metadata(onnxruntime.InferenceSession(path), path)
    assert metadata.labels == tuple(finished[1].report["data"]["labels"])
    assert metadata.sample_rate_hz == 16_000
    assert metadata.budget["limits"] == {"max_param_bytes": 128_000, "max_macs": 30_000_000}
    assert metadata.recipe == "tiny"
    assert metadata.recipe_sha256 == file_sha256(path.parent / "recipe.yaml")


def test_pruning_shows_in_the_configuration(finished):
    before = read_bundle(finished[0] / "runs" / "tiny" / "04-distill").card
    after = read_bundle(finished[0] / "runs" / "tiny" / "05-prune").card
    widths = [[block.d_inner for block in card.model.blocks] for card in (before, after)]
    assert sum(widths[1]) < 0.8 * sum(widths[0])
    assert after.budget["param_bytes"] < before.budget["param_bytes"]
    assert after.parent.sha256 == read_bundle(finished[0] / "runs" / "tiny" / "04-distill").sha256


def test_second_run_does_nothing(copied, tree):
    before = stamps(copied)
    outcome = run(recipe(tree, **ONE_FILE), copied)
    assert stamps(copied) == before
    assert outcome.report["gated"] == "model-int8.onnx"


def test_changed_section_runs_its_stage_and_those_behind(copied, tree):
    before = {name: read_bundle(copied / "runs" / "tiny" / name).sha256 for name in STAGES}
    run(recipe(tree, quantize={"calibration_clips": 8}, **ONE_FILE), copied)
    after = {name: read_bundle(copied / "runs" / "tiny" / name) for name in STAGES}
    assert [name for name in STAGES if after[name].sha256 != before[name]] == ["06-quantize", "07-export"]
    assert after["06-quantize"].card.notes == {"calibration_clips": 8, "saturating_pairs": 0}


def test_killed_between_stages_goes_on(copied, tree, finished):
    shutil.rmtree(copied / "exports")
    for name in ("06-quantize", "07-export"):
        shutil.rmtree(copied / "runs" / "tiny" / name)
    before = {name: read_bundle(copied / "runs" / "tiny" / name).card.created for name in STAGES[:4]}
    outcome = run(recipe(tree, **ONE_FILE), copied)
    assert {name: stamps(copied)[name] for name in STAGES[:4]} == before
    wanted = finished[1].report["road"][-1]
    assert outcome.report["road"][-1]["test"] == wanted["test"], "the same result as the unbroken run"


def test_altered_bundle_stops_the_run_with_the_file_named(copied, tree):
    path = copied / "runs" / "tiny" / "02-teacher" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"02-teacher: files differ.*\n.*model.safetensors: altered"):
        run(recipe(tree, **ONE_FILE), copied)


def test_until_stops_early(tree, tmp_path):
    outcome = run(recipe(tree), tmp_path, until="teacher")
    assert set(outcome.bundles) == {"reference", "teacher"}
    assert outcome.folder == tmp_path / "runs" / "tiny"
    assert (outcome.folder / "report.md").is_file()
    assert not (tmp_path / "exports").exists()


def test_over_budget_exports_nothing_and_names_the_largest(copied, tree):
    shutil.rmtree(copied / "exports")
    size = read_bundle(copied / "runs" / "tiny" / "06-quantize").card.budget["param_bytes"]
    run(recipe(tree, budget={"max_param_bytes": size}, **ONE_FILE), copied)
    shutil.rmtree(copied / "exports")
    with pytest.raises(BudgetExceeded, match=rf"{size:,} bytes of parameters.*over by 1\); largest: "):
        run(recipe(tree, budget={"max_param_bytes": size - 1}, **ONE_FILE), copied)
    assert not (copied / "exports").exists()


def test_failed_verification_publishes_nothing(finished, tree, tmp_path, monkeypatch):
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / "exports")
    monkeypatch.setattr("aum_compress.export.verify.run_session", lambda session, x: run_session(session, x) + 0.1)
    with pytest.raises(VerificationFailed, match=r"model-fp32.onnx .*FAILED"):
        run(recipe(tree), out)
    assert not (out / "exports").exists()


def test_without_verify_the_report_says_so(tree, copied):
    outcome = run(recipe(tree, verify=None, **ONE_FILE), copied)
    assert outcome.report["verification"] == {}


def test_fp16_lane_without_quantisation(tree, copied):
    outcome = run(recipe(tree, quantize=None, export={"precisions": ["fp32", "fp16"], "waveform": False}), copied)
    assert outcome.report["gated"] == "model-fp16.onnx"
    assert [row["stage"] for row in outcome.report["road"]][-2:] == ["fp32", "fp16"]


def test_student_trained_on_labels_alone(tree, tmp_path):
    student = raw_recipe(tree)["student"] | {"train": TRAIN}
    plain = recipe(tree, reference=None, teacher=None, distill=None, prune=None, student=student, **ONE_FILE)
    outcome = run(plain, tmp_path)
    assert [row["stage"] for row in outcome.report["road"]] == ["student", "quantize", "int8"]


def test_road_without_validation_clips(tree, tmp_path):
    last = TRAIN | {"keep": "last", "weight_average": 0.9}
    base = raw_recipe(tree)
    changes = {key: base[key] | {"train": last} for key in ("teacher", "distill")}
    changes |= {"data": base["data"] | {"validation_fraction": 0}, "prune": base["prune"] | {"finetune": last}}
    changes["distill"] |= {"teachers": ["teacher"]}
    outcome = run(recipe(tree, reference=None, **changes, **ONE_FILE), tmp_path)
    assert outcome.report["data"]["validation"] == 0
    assert [row["validation_accuracy"] for row in outcome.report["road"]] == [None] * 5
    assert outcome.bundles["quantize"].card.metrics["train_sqnr_db"] > 10
    assert outcome.bundles["distill"].card.notes["kept_epoch"] == TRAIN["epochs"]
    assert (outcome.folder / "report.html").is_file()


def test_so_few_clips_that_all_calibrate(tree, copied):
    """The SQNR is then that of the clips that calibrate; a search has nothing to judge on, which is said at once."""
    last = TRAIN | {"keep": "last"}
    sections = {"data": raw_recipe(tree)["data"] | {"validation_fraction": 0}}
    sections |= {"quantize": {"calibration_clips": 10_000}}
    sections |= dict.fromkeys(("reference", "teacher", "distill", "prune", "export", "verify"))
    sections |= {"student": raw_recipe(tree)["student"] | {"train": last}}
    searching = sections | {"quantize": sections["quantize"] | {"search": {"max_drop": 1.0}}}
    with pytest.raises(DataError, match=r"quantize: no clip to judge on: .* all \d+ training clips calibrate"):
        run(recipe(tree, name="few", **searching), copied)
    assert not list((copied / "runs" / "few").rglob("bundle.json"))
    outcome = run(recipe(tree, name="few", **sections), copied)
    assert outcome.bundles["quantize"].card.metrics["calibration_sqnr_db"] > 10


def test_bundle_as_teacher(tree, copied, tmp_path):
    teacher = str(copied / "runs" / "tiny" / "02-teacher")
    other = recipe(
        tree, name="other", reference=None, teacher=None, prune=None, distill={"teachers": [teacher], "train": TRAIN}
    )
    outcome = run(other, tmp_path, until="distill")
    assert set(outcome.bundles) == {"distill"}


def test_bad_files_stop_the_run_before_any_training(tree, tmp_path):
    root = tmp_path / "tree"
    shutil.copytree(tree, root)
    victims = sorted((root / "audio").iterdir())[:2]
    victims[0].write_bytes(b"RIFF")
    victims[1].write_bytes(b"")
    with pytest.raises(DataError) as caught:
        run(recipe(root), tmp_path / "out")
    assert all(path.name in str(caught.value) for path in victims)
    assert not list((tmp_path / "out").rglob("bundle.json"))
    skipping = raw_recipe(root)["data"] | {"on_bad_files": "skip"}
    outcome = run(recipe(root, data=skipping), tmp_path / "out", until="reference")
    parts = outcome.report["data"]
    assert parts["train"] + parts["validation"] + parts["test"] == 90 - 2


def test_class_missing_from_training_is_refused(tree, tmp_path):
    root = tmp_path / "tree"
    shutil.copytree(tree, root)
    split = root / "evaluation_setup" / "split25.csv"
    lines = split.read_text().splitlines(keepends=True)
    label = lines[1].split("\t")[1].strip()
    split.write_text("".join(line for line in lines if not line.rstrip().endswith(label)))
    with pytest.raises(DataError, match=label):
        run(recipe(root), tmp_path / "out")


def test_two_runs_at_once_are_refused(tree, tmp_path):
    from filelock import FileLock

    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"), pytest.raises(AumError, match="another run of this recipe is at work"):
        run(recipe(tree), tmp_path)


def test_shipped_quickstart_runs(tmp_path):
    """The very recipe that README names, only with less of everything."""
    less = ["data.train_clips_per_class=16", "data.test_clips_per_class=9", "quantize.calibration_clips=16"]
    less += [f"{key}.epochs=1" for key in ("teacher.train", "distill.train", "prune.finetune")]
    outcome = run(load_recipe(find_recipe("quickstart"), less), tmp_path)
    assert outcome.folder == tmp_path / "exports" / "quickstart"
    assert outcome.report["budget"]["verdict"] == "within"
    assert [file for file, found in outcome.report["verification"].items() if found["passed"]] == [
        f"model-{precision}{reads}.onnx" for precision in ("fp32", "fp16", "int8") for reads in ("", "-waveform")
    ]
    assert outcome.report["data"]["unseen_devices"] == ["s4", "s5", "s6"]
