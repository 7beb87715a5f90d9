"""Small trainings that several test modules run: data, network, and the run that is killed and goes on."""

import pytest
import torch
from audio_trees import SECONDS, write_tau_tree

from aum_compress.audio.config import InputSpec, LogMelConfig
from aum_compress.data.cache import cache_index
from aum_compress.data.config import TauData
from aum_compress.data.datamodule import ClipsDataModule
from aum_compress.data.index import load_index
from aum_compress.models.config import AudioMambaConfig, BlockConfig, ConvStage, ConvStem
from aum_compress.models.factory import build_model
from aum_compress.recipe_schema import TrainConfig
from aum_compress.recipe_train import AugmentConfig
from aum_compress.train import fit as fit_module
from aum_compress.train.fit import fit

FRONT_END = LogMelConfig(sample_rate_hz=16_000, n_fft=512, window_samples=400, hop_samples=160, n_mels=16)


def make_parts(tmp_path_factory):
    """A TAU tree, cut into parts and cached as features."""
    root = write_tau_tree(tmp_path_factory.mktemp("tau") / "tree")
    index = load_index(TauData(kind="tau", root=root, clip_seconds=SECONDS, validation_fraction=0.3), seed=0)
    return cache_index(index, FRONT_END, cache_dir=tmp_path_factory.mktemp("cache"))


def make_waveforms(parts, tmp_path_factory):
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


AUGMENT = AugmentConfig(
    mixstyle_p=0.5, mixup_alpha=0.3, frequency_mask_mels=3, time_mask_frames=2, time_roll_seconds=0.02
)


class Killed(BaseException):
    pass


def killed_and_resumed(parts, folder, monkeypatch, **settings):
    """The run of four epochs that died in its third and went on."""

    def die_in_third_epoch(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == 2 and batch_idx == 1:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(fit_module._ProgressCallback, "on_train_batch_end", die_in_third_epoch)
        with pytest.raises(Killed):
            train(parts, folder, epochs=4, **settings)
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 1, "the epoch before, whether it was the best or not"
    return train(parts, folder, epochs=4, **settings)
