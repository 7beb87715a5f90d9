"""Training with teachers: on views, with mixed targets and with the feature term."""

import numpy as np
import pytest
import soundfile
import torch
from tiny import SPEC as TINY_SPEC
from tiny import aum_config, cp_config, features, student_config, trained_like
from training import AUGMENT, SPEC, Killed, make_parts, make_waveforms, model, same, train

from aum_compress.data.views import Rendering, render_views
from aum_compress.recipe_schema import DistillSection, TrainConfig
from aum_compress.recipe_train import AugmentConfig
from aum_compress.train import fit as fit_module
from aum_compress.train.embedding import embedding_width
from aum_compress.train.losses import feature_loss
from aum_compress.train.module import TrainingModule
from aum_compress.train.predict import predict_logits, predict_with_embeddings


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory)


@pytest.fixture(scope="module")
def waveforms(parts, tmp_path_factory):
    return make_waveforms(parts, tmp_path_factory)


@pytest.fixture(scope="module")
def viewed(parts, waveforms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("responses")
    soundfile.write(folder / "thin.wav", np.r_[1.0, -0.9, np.zeros(30)], 16_000)
    rendering = Rendering(3, 0, 0.02, device_response_p=0.5, device_response_folder=folder)
    return render_views(rendering, parts.train, lambda: waveforms.train, cache_dir=tmp_path_factory.mktemp("views"))


def section(**changes):
    return DistillSection.model_validate({"train": {"epochs": 1}} | changes)


def answers(parts, count, seed=0, width=6):
    """Logits (K,n,C) and embeddings (K,n,E) of a teacher that knows the clips and hears views as a little different."""
    chance = torch.Generator().manual_seed(seed)
    labels = torch.tensor([parts.index.labels.index(clip.label) for clip in parts.train.clips])
    logits = 4 * torch.eye(len(parts.index.labels))[labels] + torch.randn(count, len(labels), 3, generator=chance)
    return logits, torch.randn(count, len(labels), width, generator=chance)


def taught(parts, viewed, folder, **settings):
    logits, embeddings = answers(parts, 3)
    distill = section(feature_weight=0.5, feature_anneal=0.75)
    teach = {"teacher_logits": logits, "teacher_embeddings": embeddings, "distill": distill}
    return train(parts, folder, views=viewed, teach=teach, augment=AUGMENT, **settings)


def test_killed_distillation_on_views_goes_on_and_ends_with_the_same_weights(parts, viewed, tmp_path, monkeypatch):
    """Views, mixed targets, the projector of the feature term and averaged weights at once."""
    settings = {"epochs": 4, "weight_average": 0.9}
    unbroken, wanted = taught(parts, viewed, tmp_path / "whole", **settings)

    def die_in_third_epoch(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == 2 and batch_idx == 1:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(fit_module._ProgressCallback, "on_train_batch_end", die_in_third_epoch)
        with pytest.raises(Killed):
            taught(parts, viewed, tmp_path / "broken", **settings)
    resumed, found = taught(parts, viewed, tmp_path / "broken", **settings)
    assert found == wanted
    assert same(resumed, unbroken)
    assert set(resumed.state_dict()) == set(model(parts).state_dict()), "the projector is dropped"
    assert not resumed.head._forward_pre_hooks


def test_student_learns_from_what_the_teacher_said_of_that_very_view(parts, viewed, tmp_path, monkeypatch):
    """Logits that name their own row: what reaches the loss is the answer for the view in the batch."""
    n = len(parts.train)
    rows = torch.arange(3 * n, dtype=torch.float32).reshape(3, n, 1).expand(-1, -1, 3)
    seen = []
    step = TrainingModule.training_step

    def noted(self, batch, batch_idx):
        x, _, index = batch
        np.testing.assert_array_equal(x[:, 0], viewed[index.numpy()])
        assert torch.equal(self.teacher_logits[index][:, 0].long(), index)
        seen.append(index // n)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", noted)
    teach = {"teacher_logits": rows, "distill": section()}
    train(parts, tmp_path, views=viewed, teach=teach, epochs=1)
    assert set(torch.cat(seen).tolist()) == {0, 1, 2}


def test_views_are_not_rolled_again(parts, viewed, tmp_path, monkeypatch):
    monkeypatch.setattr("aum_compress.audio.augment.time_roll", lambda *_: pytest.fail("rolled"))
    _, result = train(parts, tmp_path, views=viewed, epochs=1)
    assert np.isfinite(result.history[0]["train_loss"])


def test_feature_weight_falls_linearly_to_nothing(parts):
    logits, embeddings = answers(parts, 1)
    config = TrainConfig(epochs=10)
    module = TrainingModule(
        *(model(parts), SPEC, config),
        **{"n_classes": 3, "steps_per_epoch": 1, "seed": 0, "teacher_logits": logits},
        **{"teacher_embeddings": embeddings, "distill": section(feature_weight=0.4, feature_anneal=0.5)},
    )
    found = []
    for epoch in range(10):
        type(module).current_epoch = property(lambda self, epoch=epoch: epoch)
        found.append(module.feature_weight())
    del type(module).current_epoch
    np.testing.assert_allclose(found, [0.4, 0.32, 0.24, 0.16, 0.08, 0, 0, 0, 0, 0], atol=1e-12)


def test_feature_term_pulls_the_embedding(parts, tmp_path):
    """Labels and logits have no weight: what falls is 1 - cosine to the teacher's embedding."""
    n = len(parts.train)
    labels = torch.tensor([parts.index.labels.index(clip.label) for clip in parts.train.clips])
    embeddings = torch.eye(5)[labels]
    distill = DistillSection.model_validate(
        {"lambda": 1.0, "feature_weight": 1.0, "train": {"epochs": 1}},
    )
    teach = {"teacher_logits": torch.zeros(n, 3), "teacher_embeddings": embeddings, "distill": distill}
    settings = {"epochs": 8, "learning_rate": 1e-2, "augment": AugmentConfig(time_roll_seconds=0.0)}
    with_term, result = train(parts, tmp_path / "with", teach=teach, **settings)
    teach = {"teacher_logits": torch.zeros(n, 3), "distill": distill}
    without, _ = train(parts, tmp_path / "without", teach=teach, **settings)
    assert not same(with_term, without)
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]


@pytest.mark.parametrize("make", [student_config, aum_config, cp_config], ids=["mean", "class token", "convolution"])
def test_embedding_is_what_the_head_reads(make):
    net = trained_like(make())
    clips, spec = features(5)[:, 0].numpy(), TINY_SPEC
    logits, embeddings = predict_with_embeddings(net, clips, spec)
    np.testing.assert_array_equal(logits, predict_logits(net, clips, spec))
    assert embeddings.shape == (5, embedding_width(net))
    if make is not cp_config:
        with torch.no_grad():
            np.testing.assert_allclose(net.head(torch.from_numpy(embeddings)), logits, rtol=1e-5, atol=1e-6)
    assert not net.head._forward_pre_hooks


def test_feature_loss_is_one_less_the_cosine():
    one, other = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[5.0, 0.0], [0.0, -1.0]])
    assert feature_loss(one, one) == pytest.approx(0.0, abs=1e-6)
    assert feature_loss(one, other) == pytest.approx((0 + 2) / 2)
