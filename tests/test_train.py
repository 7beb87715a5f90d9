import lightning as L
import numpy as np
import pytest
import torch
from audio_trees import SECONDS, write_tau_tree

from aum_compress.audio.config import InputSpec, LogMelConfig
from aum_compress.data.cache import cache_index
from aum_compress.data.config import TauData
from aum_compress.data.datamodule import ClipsDataModule
from aum_compress.data.index import load_index
from aum_compress.errors import AumError, DataError
from aum_compress.models.config import AudioMambaConfig, BlockConfig, ConvStage, ConvStem
from aum_compress.models.factory import build_model
from aum_compress.recipe_schema import AugmentConfig, DistillSection, TrainConfig
from aum_compress.train import fit as fit_module
from aum_compress.train.fit import fit
from aum_compress.train.module import parameter_groups
from aum_compress.train.predict import predict_logits
from aum_compress.train.teachers import average_logits, load_logits, save_logits

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


def train(parts, work_dir, *, epochs=2, seed=0, log_dir=None, teacher=None, distill=None, net=None, **settings):
    net = net or model(parts)
    config = TrainConfig(**({"epochs": epochs, "batch_size": 16, "accelerator": "cpu"} | settings))
    data = ClipsDataModule(parts, config.batch_size, seed)
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
        teacher_logits=teacher,
        distill=distill,
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
    assert 1 <= result.best_epoch <= 2
    assert all(np.isfinite(list(row.values())).all() for row in result.history)
    assert not first.training


class _Killed(BaseException):
    pass


def test_killed_run_goes_on_and_ends_with_the_same_weights(parts, tmp_path, monkeypatch):
    unbroken, wanted = train(parts, tmp_path / "whole", epochs=4, augment=AUGMENT)

    def die_in_third_epoch(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == 2 and batch_idx == 1:
            raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(fit_module._ProgressCallback, "on_train_batch_end", die_in_third_epoch)
        with pytest.raises(_Killed):
            train(parts, tmp_path / "broken", epochs=4, augment=AUGMENT)
    checkpoint = torch.load(tmp_path / "broken" / "last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 1, "the epoch before, whether it was the best or not"
    resumed, found = train(parts, tmp_path / "broken", epochs=4, augment=AUGMENT)
    assert found.history == wanted.history
    assert found.best_epoch == wanted.best_epoch
    assert same(resumed, unbroken)


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
    import soundfile

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
    _, result = train(parts, tmp_path, teacher=teacher, distill=section, **settings)
    # labels have no weight here, and the teacher's classes are not the labels: only its logits can be learned
    losses = [row["train_loss"] for row in result.history]
    assert losses[-1] < 0.75 * losses[0], losses


def test_predicted_logits_do_not_depend_on_batching(parts, monkeypatch):
    net = model(parts).eval()
    whole = predict_logits(net, parts.train, SPEC)
    monkeypatch.setattr("aum_compress.train.predict.BATCH", 7)
    np.testing.assert_allclose(predict_logits(net, parts.train, SPEC), whole, rtol=1e-4, atol=1e-5)


def test_weight_decay_by_name_and_shape(parts):
    net = model(parts)
    decayed, kept = (set(map(id, group["params"])) for group in parameter_groups(net, 0.1))
    names = {name: id(parameter) for name, parameter in net.named_parameters()}
    mixer = "layers.0.mixer."
    assert {names[mixer + n] for n in ("in_proj.weight", "x_proj_b.weight", "conv1d.weight")} <= decayed
    assert {names[mixer + n] for n in ("A_log", "A_b_log", "D", "dt_proj.bias")} | {names["norm_f.weight"]} <= kept
    assert not decayed & kept
    assert len(decayed) + len(kept) == len(names)


def test_teacher_logits_are_found_by_name_and_checksum(tmp_path):
    path, logits = tmp_path / "t.npz", np.arange(6, dtype=np.float32).reshape(3, 2)
    save_logits(path, ["x", "y", "z"], ["1", "2", "3"], logits, ("bus", "tram"))
    np.testing.assert_array_equal(load_logits(path, ["z", "x"], ["3", "1"], ("bus", "tram")), logits[[2, 0]])
    with pytest.raises(DataError, match=r"(?s)w: has no logits.*y: the teacher heard other audio"):
        load_logits(path, ["w", "y"], ["1", "changed"], ("bus", "tram"))
    with pytest.raises(DataError, match=r"logits are for labels \['bus', 'tram'\], wanted \['tram', 'bus'\]"):
        load_logits(path, ["x"], ["1"], ("tram", "bus"))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match="not a teacher logits file"):
        load_logits(path, ["x"], ["1"], ("bus", "tram"))


def test_teachers_are_averaged():
    np.testing.assert_array_equal(average_logits([np.zeros((2, 2)), np.full((2, 2), 4.0)]), np.full((2, 2), 2.0))
