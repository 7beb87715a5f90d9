"""Teachers of a run: stages, bundles and files that somebody brings, on clips and on their views."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tiny_recipe import TRAIN, recipe

from aum_compress.bundle import read_bundle
from aum_compress.data.views import render_views
from aum_compress.errors import AumError, DataError
from aum_compress.pipeline import run
from aum_compress.teaching import find_teachers, teacher_targets
from aum_compress.train.predict import predict_with_embeddings
from aum_compress.train.teachers import load_outputs, unit_length
from aum_compress.workspace import Workspace

DOCS = Path(__file__).parent.parent / "docs" / "distillation.md"


pytestmark = pytest.mark.usefixtures("cache_of_finished")


@pytest.fixture(scope="module")
def irs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("responses")
    soundfile.write(folder / "bright.wav", np.r_[1.0, -0.9, np.zeros(30)], 16_000)
    soundfile.write(folder / "test-device.wav", np.r_[1.0, 0.9, np.zeros(30)], 16_000)
    return folder


def views(irs, **changes):
    """A training on three views, each clip of two of them through the one response that is left."""
    augment = {"time_roll_seconds": 0.02, "device_response_p": 1.0, "device_response_folder": str(irs)}
    augment |= {"device_response_exclude": ["test-device.wav"], "mixup_alpha": 0.3}
    return TRAIN | {"views": 3, "augment": augment} | changes


def bundles(finished):
    return [str(finished.out / "runs" / "tiny" / name) for name in ("02-teacher", "01-reference")]


def distilled(finished, train, **changes):
    """A recipe that ends with the stage `distill`, its teachers brought as bundles."""
    distill = {"teachers": bundles(finished), "train": train} | changes
    rest = {"reference": None, "teacher": None, "prune": None, "quantize": None, "export": None, "verify": None}
    return recipe(finished.tree, name="viewed", distill=distill, **rest)


def test_teachers_hear_every_view_and_weigh_alike(finished, irs, tmp_path):
    given = distilled(finished, views(irs), feature_weight=0.5)
    space = Workspace(given, tmp_path)
    logits, embeddings = teacher_targets(space, find_teachers(space, {}), given.distill.train, embeddings=True)
    n = len(space.parts.train)
    viewed = space.training_clips(given.distill.train, given.features)
    assert len(viewed) == 3 * n
    wanted_logits, wanted = [], []
    for path in bundles(finished):
        bundle = read_bundle(Path(path))
        found = [
            predict_with_embeddings(bundle.load_model(), viewed[v * n : (v + 1) * n], bundle.card.input)
            for v in range(3)
        ]
        wanted_logits.append(np.stack([pair[0] for pair in found]))
        wanted.append(unit_length(np.stack([pair[1] for pair in found])))
    np.testing.assert_allclose(logits, np.mean(wanted_logits, axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(embeddings, np.concatenate(wanted, axis=2), atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=2), 2**0.5, rtol=1e-4)
    assert np.abs(logits[1] - logits[0]).max() > 0.01, "another view, another answer"
    again = teacher_targets(space, find_teachers(space, {}), given.distill.train, embeddings=True)
    assert torch.equal(again[0], logits)
    assert torch.equal(again[1], embeddings)


def test_answers_are_computed_once_for_each_teacher_and_set_of_views(finished, irs, tmp_path, monkeypatch):
    given = distilled(finished, views(irs))
    space = Workspace(given, tmp_path)
    teachers = find_teachers(space, {})
    first, none = teacher_targets(space, teachers, given.distill.train)
    assert none is None
    kept = sorted(path.name for path in (space.runs / "teacher-logits").iterdir())
    assert len(kept) == 2
    monkeypatch.setattr("aum_compress.teaching.predict_logits", lambda *_: pytest.fail("computed again"))
    assert torch.equal(teacher_targets(space, teachers, given.distill.train)[0], first)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        teacher_targets(space, teachers, given.distill.train.model_copy(update={"views": 2}))


def test_run_on_views_is_kept_until_a_response_changes(finished, irs, tmp_path):
    folder = tmp_path / "irs"
    shutil.copytree(irs, folder)
    given = distilled(finished, views(folder), feature_weight=0.5)
    first = run(given, tmp_path).bundles["distill"].sha256
    assert run(given, tmp_path).bundles["distill"].sha256 == first
    soundfile.write(folder / "test-device.wav", np.r_[1.0, 0.5], 16_000)
    assert run(given, tmp_path).bundles["distill"].sha256 == first, "that one is left out"
    soundfile.write(folder / "bright.wav", np.r_[1.0, -0.5], 16_000)
    assert run(given, tmp_path).bundles["distill"].sha256 != first


def test_student_alone_trains_on_views(finished, irs, tmp_path):
    student = {"d_model": 8, "depth": 1, "d_inner": 16, "d_state": 4, "stem": recipe(finished.tree).student.stem}
    rest = dict.fromkeys(("reference", "teacher", "distill", "prune", "quantize", "export", "verify"))
    given = recipe(finished.tree, student=student | {"train": views(irs)}, **rest)
    outcome = run(given, tmp_path)
    assert set(outcome.bundles) == {"student"}


def example(finished, folder, monkeypatch) -> Path:
    """Executes the documented script in `folder`, on the tiny data."""
    (script,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in script.splitlines() if line.strip()]) <= 14
    given = recipe(finished.tree)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("aum_compress.recipe.find_recipe", lambda name: name)
    monkeypatch.setattr("aum_compress.recipe.load_recipe", lambda path: given)

    def my_teacher(path, start_seconds):
        assert path.is_file()
        assert start_seconds == 0
        return np.array([3.0, -1.0, 0.5])

    exec(script, {"my_teacher": my_teacher})
    return folder / "my-teacher.npz"


def test_documented_script_writes_a_teacher(finished, tmp_path, monkeypatch):
    path = example(finished, tmp_path, monkeypatch)
    given = distilled(finished, views_of_roll(), teachers=[str(path), bundles(finished)[0]])
    space = Workspace(given, tmp_path / "out")
    logits, _ = teacher_targets(space, find_teachers(space, {}), given.distill.train)
    other, _ = teacher_targets(space, find_teachers(space, {})[1:], given.distill.train)
    wanted = (torch.tensor([3.0, -1.0, 0.5]) + other) / 2
    torch.testing.assert_close(logits, wanted)
    assert set(run(given, tmp_path / "out").bundles) == {"distill"}
    with pytest.raises(DataError, match="no teacher has embeddings"):
        teacher_targets(space, find_teachers(space, {})[:1], given.distill.train, embeddings=True)


def views_of_roll():
    return TRAIN | {"views": 2, "augment": {"time_roll_seconds": 0.02}}


def test_changed_file_is_another_teacher(finished, tmp_path, monkeypatch):
    path = example(finished, tmp_path, monkeypatch)
    given = distilled(finished, TRAIN, teachers=[str(path)])
    first = run(given, tmp_path / "out").bundles["distill"].sha256
    with np.load(path) as stored:
        arrays = dict(stored)
    np.savez(path, **(arrays | {"logits": arrays["logits"] + [1, 0, 0]}))
    assert run(given, tmp_path / "out").bundles["distill"].sha256 != first
    np.savez(path, **(arrays | {"checksums": arrays["checksums"][::-1]}))
    student = {"student": recipe(finished.tree).student.model_dump() | {"train": TRAIN}}
    with pytest.raises(DataError, match=r"my-teacher.npz: does not match the training clips"):
        run(recipe(finished.tree, **student, distill={"teachers": [str(path)], "train": TRAIN}), tmp_path / "new")
    assert not list((tmp_path / "new").rglob("bundle.json")), "said before any training"


def test_absent_file_is_named(finished, tmp_path):
    given = distilled(finished, TRAIN, teachers=[str(tmp_path / "none.npz")])
    with pytest.raises(DataError, match=r"distill.teachers: .*none.npz: no such file of logits; docs/distillation.md"):
        run(given, tmp_path)


def test_bundle_that_cannot_teach_is_named_before_any_training(finished, tmp_path):
    student = {"student": recipe(finished.tree).student.model_dump() | {"train": TRAIN}}
    given = recipe(finished.tree, **student, distill={"teachers": [str(tmp_path / "none")], "train": TRAIN})
    with pytest.raises(AumError, match="none"):
        run(given, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("bundle.json"))


def test_clips_of_another_device_are_other_data(finished, tmp_path):
    space, other = (Workspace(recipe(finished.tree), tmp_path) for _ in range(2))
    clips = other.parts.test.clips
    renamed = replace(other.parts.test, clips=(replace(clips[0], device="s9"), *clips[1:]))
    other.parts = replace(other.parts, test=renamed)
    assert space.data_sha256 != other.data_sha256, "figures by device are to be measured again"


def test_teacher_with_a_front_end_of_its_own_hears_the_views(finished, tmp_path, monkeypatch):
    """Its features are made of the same rolls, and its answers stand beside those of the student's own front-end."""
    train = views_of_roll()
    other = {"sample_rate_hz": 8000, "n_fft": 256, "window_samples": 200, "hop_samples": 80, "n_mels": 16}
    rest = dict.fromkeys(("reference", "student", "distill", "prune", "quantize", "export", "verify", "budget"))
    teacher = run(recipe(finished.tree, name="teacher-only", features=other, **rest), tmp_path).bundles["teacher"]
    given = distilled(finished, train, teachers=[str(teacher.path)])
    space = Workspace(given, tmp_path)
    seen = []

    def noted(rendering, clean, *args, **kwargs):
        seen.append((rendering.names, clean.front_end.sample_rate_hz))
        return render_views(rendering, clean, *args, **kwargs)

    monkeypatch.setattr("aum_compress.workspace.render_views", noted)
    logits, _ = teacher_targets(space, find_teachers(space, {}), given.distill.train)
    space.data_module(given.distill.train)
    assert logits.shape == (2, len(space.parts.train), 3)
    assert [rate for _, rate in seen] == [8000, 16_000]
    assert seen[0][0] == seen[1][0]
    (path,) = (space.runs / "teacher-logits").iterdir()
    ids = [clip.clip_id for clip in space.parts.train.clips]
    kept = load_outputs(path, ids, space.parts.train.checksums, space.labels, seen[0][0])
    np.testing.assert_array_equal(kept.logits, logits)
