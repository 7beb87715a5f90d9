from dataclasses import replace

import lightning as L
import numpy as np
import pytest
import soundfile
import torch
from tiny import aum_config, student_config
from training import AUGMENT, SPEC, killed_and_resumed, make_parts, make_waveforms, model, same, train

from aum_compress.errors import AumError, DataError
from aum_compress.models.config import Mamba2BlockConfig
from aum_compress.models.factory import build_model
from aum_compress.recipe_schema import DistillSection
from aum_compress.recipe_train import AugmentConfig
from aum_compress.train import fit as fit_module
from aum_compress.train.module import MacroAccuracy, TrainingModule, parameter_groups
from aum_compress.train.predict import predict_logits


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory)


@pytest.fixture(scope="module")
def waveforms(parts, tmp_path_factory):
    return make_waveforms(parts, tmp_path_factory)


def test_activation_checkpointing_trains_the_same_and_stays_out_of_the_model(parts, tmp_path):
    plain, first = train(parts, tmp_path / "plain", epochs=1)
    checkpointed, second = train(parts, tmp_path / "checkpointed", epochs=1, activation_checkpointing=True)
    assert first.history == second.history
    assert same(plain, checkpointed)
    assert checkpointed.config == plain.config


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


def test_a_killed_run_whose_folder_was_moved_keeps_its_best_epoch(parts, tmp_path, monkeypatch):
    epochs, begin = [], TrainingModule.on_validation_epoch_start

    def noted(self):
        epochs.append(self.current_epoch)
        begin(self)

    monkeypatch.setattr(TrainingModule, "on_validation_epoch_start", noted)
    monkeypatch.setattr(MacroAccuracy, "compute", lambda self: torch.tensor((0.4, 0.9, 0.5, 0.6)[epochs[-1]]))
    train(parts, tmp_path / "here", epochs=2)
    (tmp_path / "here").rename(tmp_path / "there")
    _, result = train(parts, tmp_path / "there", epochs=4)
    assert (result.kept_epoch, result.validation_accuracy) == (2, pytest.approx(90))
    (tmp_path / "there").rename(tmp_path / "elsewhere")
    _, finished = train(parts, tmp_path / "elsewhere", epochs=4)
    assert finished == result, "nothing is left to train"


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
