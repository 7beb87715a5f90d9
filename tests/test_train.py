from dataclasses import replace

import lightning as L
import numpy as np
import pytest
import soundfile
import torch
from audio_trees import SECONDS, write_tau_tree
from tiny import SPEC as TINY_SPEC
from tiny import aum_config, cp_config, features, student_config, trained_like

from aum_compress.audio.config import InputSpec, LogMelConfig
from aum_compress.data.cache import cache_index
from aum_compress.data.config import TauData
from aum_compress.data.datamodule import ClipsDataModule
from aum_compress.data.index import load_index
from aum_compress.data.views import Rendering, render_views
from aum_compress.errors import AumError, DataError
from aum_compress.models.config import AudioMambaConfig, BlockConfig, ConvStage, ConvStem, Mamba2BlockConfig
from aum_compress.models.factory import build_model
from aum_compress.recipe_schema import DistillSection, TrainConfig
from aum_compress.recipe_train import AugmentConfig
from aum_compress.train import fit as fit_module
from aum_compress.train.embedding import embedding_width
from aum_compress.train.fit import fit
from aum_compress.train.losses import feature_loss
from aum_compress.train.module import TrainingModule, parameter_groups
from aum_compress.train.predict import predict_logits, predict_with_embeddings

FRONT_END = LogMelConfig(sample_rate_hz=16_000, n_fft=512, window_samples=400, hop_samples=160, n_mels=16)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = write_tau_tree(tmp_path_factory.mktemp("tau") / "tree")
    index = load_index(TauData(kind="tau", root=root, clip_seconds=SECONDS, validation_fraction=0.3), seed=0)
    return cache_index(index, FRONT_END, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def waveforms(parts, tmp_path_factory):
    return cache_index(parts.index, FRONT_END, what="waveform", cache_dir=tmp_path_factory.mktemp("cache"))


SPEC = InputSpec(front_end=FRONT_END, clip_seconds=SECONDS, mean=-6.0, std=3.0)


def model(parts, seed=0):
    torch.manual_seed(seed)
    return build_model(
        AudioMambaConfig(
            n_mels=16,
            n_frames=SPEC.feature_shape[2],
            n_classes=len(parts.index.labels),
            d_model=8,
            blocks=(BlockConfig(d_inner=16, d_state=4, dt_rank=1),),
            stem=ConvStem(stages=(ConvStage(channels=8, expansion=0), ConvStage(channels=8))),
        )
    )


def train(parts, work_dir, *, epochs=2, seed=0, log_dir=None, views=None, net=None, teach=None, **settings):
    """Args: teach: `distill` and what it needs, as `fit` takes it. views: of the training clips."""
    net = net or model(parts)
    shared = {"epochs": epochs, "batch_size": 16, "accelerator": "cpu", "views": len(views.names) if views else 1}
    config = TrainConfig(**(shared | settings))
    data = ClipsDataModule(parts, config.batch_size, seed, views=views)
    result = fit(
        net,
        data,
        SPEC,
        config,
        n_classes=len(parts.index.labels),
        seed=seed,
        work_dir=work_dir,
        log_dir=log_dir or work_dir,
        description="test",
        **(teach or {}),
    )
    return net, result


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_activation_checkpointing_trains_the_same_and_stays_out_of_the_model(parts, tmp_path):
    plain, first = train(parts, tmp_path / "plain", epochs=1)
    checkpointed, second = train(parts, tmp_path / "checkpointed", epochs=1, activation_checkpointing=True)
    assert first.history == second.history
    assert same(plain, checkpointed)
    assert checkpointed.config == plain.config


AUGMENT = AugmentConfig(
    mixstyle_p=0.5, mixup_alpha=0.3, frequency_mask_mels=3, time_mask_frames=2, time_roll_seconds=0.02
)


def test_training_changes_weights_and_is_the_same_twice(parts, tmp_path):
    first, result = train(parts, tmp_path / "a", augment=AUGMENT)
    second, _ = train(parts, tmp_path / "b", augment=AUGMENT)
    other, _ = train(parts, tmp_path / "c", augment=AUGMENT, seed=1)
    assert same(first, second)
    assert not same(first, other)
    assert not same(first, model(parts))
    assert [row["epoch"] for row in result.history] == [1, 2]
    assert 1 <= result.kept_epoch <= 2
    assert all(np.isfinite(list(row.values())).all() for row in result.history)
    assert not first.training


class _Killed(BaseException):
    pass


def killed_and_resumed(parts, folder, monkeypatch, **settings):
    """The run of four epochs that died in its third and went on."""

    def die_in_third_epoch(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == 2 and batch_idx == 1:
            raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(fit_module._ProgressCallback, "on_train_batch_end", die_in_third_epoch)
        with pytest.raises(_Killed):
            train(parts, folder, epochs=4, **settings)
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 1, "the epoch before, whether it was the best or not"
    return train(parts, folder, epochs=4, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_average": 0.9, "keep": "last", "accumulate_batches": 2, "scan_learning_rate": 0.5},
        {"weight_average": 0.99},
    ],
    ids=["plain", "averaged, last", "averaged, best"],
)
def test_killed_run_goes_on_and_ends_with_the_same_weights(parts, tmp_path, monkeypatch, settings):
    unbroken, wanted = train(parts, tmp_path / "whole", epochs=4, augment=AUGMENT, **settings)
    resumed, found = killed_and_resumed(parts, tmp_path / "broken", monkeypatch, augment=AUGMENT, **settings)
    assert found == wanted
    assert same(resumed, unbroken)


def without_validation(parts):
    nothing = parts.validation.only([])
    return replace(parts, validation=nothing, index=replace(parts.index, validation=()).validate())


def test_last_epoch_needs_no_validation_clips(parts, tmp_path):
    last, result = train(parts, tmp_path / "last", keep="last", augment=AUGMENT)
    assert result.kept_epoch == 2
    assert result.validation_accuracy == result.history[-1]["val_accuracy"]
    blind, unseen = train(without_validation(parts), tmp_path / "blind", keep="last", augment=AUGMENT)
    assert (unseen.kept_epoch, unseen.validation_accuracy) == (2, None)
    assert [row["train_loss"] for row in unseen.history] == [row["train_loss"] for row in result.history]
    assert [row["val_loss"] for row in unseen.history] == [None, None]
    assert same(last, blind), "validation changes nothing"
    with pytest.raises(AumError, match="train.keep: best is chosen on validation clips, and there are none"):
        train(without_validation(parts), tmp_path / "best")


def test_average_is_that_of_every_step(parts, tmp_path, monkeypatch):
    """Weights and batch statistics, with the decays of the warm-up, by a plain restatement."""
    states = []
    step = TrainingModule.optimizer_step

    def noted(self, *args, **kwargs):
        step(self, *args, **kwargs)
        states.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})

    monkeypatch.setattr(TrainingModule, "optimizer_step", noted)
    averaged, result = train(parts, tmp_path / "averaged", keep="last", weight_average=0.5, augment=AUGMENT)
    wanted = {name: tensor.double() for name, tensor in model(parts).state_dict().items()}
    for k, state in enumerate(states):
        decay = min(0.5, (1 + k) / (10 + k))
        for name, tensor in state.items():
            wanted[name] = decay * wanted[name] + (1 - decay) * tensor.double()
    assert len(states) == 2 * 3
    for name, tensor in averaged.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-5, atol=1e-6, msg=name)
        else:
            assert tensor == states[-1][name], name
    plain, other = train(parts, tmp_path / "plain", keep="last", augment=AUGMENT)
    losses = [[row["train_loss"] for row in r.history] for r in (result, other)]
    assert losses[0] == losses[1], "the average takes no part in training"
    assert not same(averaged, plain)
    assert result.history[-1]["val_loss"] != other.history[-1]["val_loss"], "the average is what is validated"


def test_checkpoint_cut_short_is_no_reason_to_stop(parts, tmp_path, capfd):
    wanted, _ = train(parts, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "last.ckpt").write_bytes((tmp_path / "a" / "last.ckpt").read_bytes()[:500])
    found, _ = train(parts, tmp_path / "b")
    assert same(found, wanted)
    assert "was cut short; this training starts over" in capfd.readouterr().err


def test_ctrl_c_ends_as_keyboard_interrupt(parts, tmp_path, monkeypatch):
    def interrupt(self, trainer, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_module._ProgressCallback, "on_train_batch_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(parts, tmp_path)


def test_full_disk_is_an_error_with_the_folder_named(parts, tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(L.Trainer, "save_checkpoint", full)
    with pytest.raises(AumError, match=f"{tmp_path}.*checkpoint cannot be written"):
        train(parts, tmp_path)


def test_diverging_run_says_what_to_do(parts, tmp_path):
    net = model(parts)
    with torch.no_grad():
        net.head.bias.fill_(float("nan"))
    with pytest.raises(AumError, match="training diverged in epoch 1.*Lower learning_rate"):
        train(parts, tmp_path, net=net)


def test_absent_accelerator_is_an_error(parts, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(AumError, match="accelerator=gpu.*not possible here"):
        train(parts, tmp_path, accelerator="gpu")


def test_csv_logger_writes(parts, tmp_path):
    train(parts, tmp_path / "work", logger="csv", log_dir=tmp_path / "logs")
    metrics = list((tmp_path / "logs").rglob("metrics.csv"))
    assert len(metrics) == 1
    assert "val_accuracy" in metrics[0].read_text().splitlines()[0]


def test_waveform_batches_pass_through_device_responses(waveforms, tmp_path):
    folder = tmp_path / "responses"
    folder.mkdir()
    soundfile.write(folder / "thin.wav", np.r_[1.0, -0.9, np.zeros(30)], 16_000)
    plain, _ = train(waveforms, tmp_path / "a")
    augment = AugmentConfig(device_response_p=1.0, device_response_folder=folder)
    heard, _ = train(waveforms, tmp_path / "b", augment=augment)
    assert not same(plain, heard)
    gone = AugmentConfig(device_response_p=1.0, device_response_folder=tmp_path / "none")
    with pytest.raises(DataError, match="no such folder"):
        train(waveforms, tmp_path / "c", augment=gone)


def test_distillation_pulls_the_student_to_the_teacher(parts, tmp_path):
    n_classes = len(parts.index.labels)
    teacher = 8 * torch.eye(n_classes)[torch.arange(len(parts.train)) % n_classes]
    section = DistillSection.model_validate({"lambda": 0.0, "temperature": 1.0, "train": {"epochs": 1}})
    settings = {"epochs": 30, "learning_rate": 1e-2, "augment": AugmentConfig(time_roll_seconds=0.0)}
    _, result = train(parts, tmp_path, teach={"teacher_logits": teacher, "distill": section}, **settings)
    # labels have no weight here, and the teacher's classes are not the labels: only its logits can be learned
    losses = [row["train_loss"] for row in result.history]
    assert losses[-1] < 0.75 * losses[0], losses


def test_predicted_logits_do_not_depend_on_batching(parts, monkeypatch):
    net = model(parts).eval()
    whole = predict_logits(net, parts.train, SPEC)
    monkeypatch.setattr("aum_compress.train.predict.BATCH", 7)
    np.testing.assert_allclose(predict_logits(net, parts.train, SPEC), whole, rtol=1e-4, atol=1e-5)


def group_names(net, groups):
    """Parameter names of each optimiser group."""
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    found = [{names[id(parameter)] for parameter in group["params"]} for group in groups]
    assert sum(map(len, found)) == len(names) == len(set.union(*found)), "each parameter once"
    return found


@pytest.mark.parametrize("block_type", ["none", "v1", "v2"])
def test_weight_decay_and_scan_rate_by_name_and_shape(block_type):
    net = build_model(student_config(block_type=block_type).model_copy(update={"position": "factorised"}))
    groups = parameter_groups(net, 0.1, 3e-4)
    decayed, plain, scan = group_names(net, groups)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    assert [group.get("lr") for group in groups] == [None, None, 3e-4]
    mixer = "layers.0.mixer."
    assert {mixer + n for n in ("in_proj.weight", "x_proj.weight", "conv1d.weight", "dt_proj.weight")} <= decayed
    assert {mixer + "conv1d.bias", "norm_f.weight", "pos_embed.rows", "pos_embed.columns", "head.bias"} <= plain
    own = {"none": {"A_log", "D", "dt_proj.bias"}, "v1": {"A_log", "A_b_log", "D", "dt_proj.bias"}}
    own["v2"] = own["v1"] | {"D_b", "dt_proj_b.bias"}
    assert scan == {f"layers.{layer}.mixer.{name}" for layer in (0, 1) for name in own[block_type]}
    assert "lr" not in parameter_groups(net, 0.1)[2]


def test_scan_rate_of_mamba2_and_of_the_class_token():
    blocks = (Mamba2BlockConfig(d_inner=32, d_state=4, head_dim=8),)
    net = build_model(aum_config().model_copy(update={"blocks": blocks}))
    decayed, plain, scan = group_names(net, parameter_groups(net, 0.1))
    assert scan == {f"layers.0.mixer.{name}" for name in ("A_log", "D", "dt_bias")}
    assert {"cls_token", "pos_embed.pos_embed"} <= plain
    assert "layers.0.mixer.norm.weight" in plain
    assert decayed >= {"head.weight", "patch_embed.proj.weight"}


def test_a_model_that_comes_in_evaluation_is_trained(parts, tmp_path):
    """As pruning and bundles give them: its batch statistics move."""
    net = model(parts).eval()
    before = {name: t.clone() for name, t in net.state_dict().items() if "running" in name}
    settings = {"epochs": 1, "keep": "last", "learning_rate": 1e-3, "batch_size": 64}
    trained, _ = train(parts, tmp_path, net=net, **settings)
    after = trained.state_dict()
    assert before
    assert all(not torch.equal(after[name], old) for name, old in before.items())


def test_scan_rate_scales_the_steps_of_the_scan_alone(parts, tmp_path):
    """One step: its gradients are the same whatever the rate."""
    before = dict(model(parts).named_parameters())
    settings = {"epochs": 1, "keep": "last", "learning_rate": 1e-3, "warmup_epochs": 0.0, "weight_decay": 0.0}
    settings |= {"batch_size": 64, "augment": AugmentConfig(time_roll_seconds=0.0), "gradient_clip": None}
    plain, _ = train(parts, tmp_path / "plain", **settings)
    slow, _ = train(parts, tmp_path / "slow", scan_learning_rate=0.1, **settings)
    for name, parameter in plain.named_parameters():
        moved, moved_slowly = (parameter - before[name]).detach(), (slow.get_parameter(name) - before[name]).detach()
        share = 0.1 if name.endswith(("_log", ".D", ".D_b", "dt_proj.bias", "dt_proj_b.bias")) else 1.0
        torch.testing.assert_close(moved_slowly, share * moved, rtol=0.02, atol=1e-7, msg=name)


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
            raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(fit_module._ProgressCallback, "on_train_batch_end", die_in_third_epoch)
        with pytest.raises(_Killed):
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
