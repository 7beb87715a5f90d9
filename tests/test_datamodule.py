"""Batches from the cache: complete, seeded, in the same order after a resume."""

from pathlib import Path

import lightning as L
import pytest
import torch
from audio_trees import SECONDS, write_tau_tree
from torch import nn

from aum_compress.audio.config import LogMelConfig
from aum_compress.data.cache import CachedParts, cache_index
from aum_compress.data.config import TauData
from aum_compress.data.datamodule import ClipsDataModule
from aum_compress.data.tau import load_tau

FRONT_END = LogMelConfig(sample_rate_hz=8000, n_fft=256, window_samples=200, hop_samples=80, n_mels=20)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tau_tree(tmp_path_factory.mktemp("data") / "tau")


def parts_of(tree: Path, what: str = "logmel") -> CachedParts:
    index = load_tau(TauData(kind="tau", root=tree, clip_seconds=SECONDS), seed=0)
    return cache_index(index, FRONT_END, what=what, cache_dir=tree.parent / "cache")


@pytest.fixture(scope="module")
def parts(tree: Path) -> CachedParts:
    return parts_of(tree)


def test_batches_hold_the_clips_that_they_name(parts: CachedParts) -> None:
    data = ClipsDataModule(parts, batch_size=7, seed=3)
    seen = []
    for x, y, index in data.train_dataloader():
        assert x.shape == (len(index), 1, 20, 11)
        assert (x.dtype, y.dtype, index.dtype) == (torch.float32, torch.int64, torch.int64)
        torch.testing.assert_close(x[:, 0], torch.from_numpy(parts.train[index.numpy()]), rtol=0, atol=0)
        assert [parts.index.labels[k] for k in y] == [parts.train.clips[k].label for k in index]
        seen += index.tolist()
    assert seen != sorted(seen)
    assert sorted(seen) == list(range(data.train_clips)) == list(range(len(parts.train)))


def test_validation_and_test_are_complete_and_in_order(parts: CachedParts) -> None:
    data = ClipsDataModule(parts, batch_size=5, seed=0)
    for loader, cached in ((data.val_dataloader(), parts.validation), (data.test_dataloader(), parts.test)):
        assert torch.cat([index for _, _, index in loader]).tolist() == list(range(len(cached)))


def test_waveforms_have_no_channel(tree: Path) -> None:
    parts = parts_of(tree, "waveform")
    x, _, _ = next(iter(ClipsDataModule(parts, batch_size=4, seed=0).train_dataloader()))
    assert x.shape == (4, 800)


def order(parts: CachedParts, seed: int, epoch: int) -> list[int]:
    loader = ClipsDataModule(parts, batch_size=64, seed=seed).train_dataloader()
    loader.sampler.set_epoch(epoch)
    return torch.cat([index for _, _, index in loader]).tolist()


def test_order_depends_on_seed_and_epoch_alone(parts: CachedParts) -> None:
    assert order(parts, 0, 0) == order(parts, 0, 0)
    orders = [order(parts, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len(set(map(tuple, orders))) == 9


class Recorder(L.LightningModule):
    """Notes which clips each training batch held."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 3)
        self.seen: list[list[int]] = []

    def training_step(self, batch: tuple, _: int) -> torch.Tensor:
        x, y, index = batch
        self.seen.append(index.tolist())
        return nn.functional.cross_entropy(self.layer(x.mean(dim=(1, 3))), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_resumed_training_sees_the_order_of_an_unbroken_one(parts: CachedParts, tmp_path: Path) -> None:
    def train(epochs: int, checkpoint: Path | None = None) -> tuple[Recorder, L.Trainer]:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = L.Trainer(max_epochs=epochs, enable_checkpointing=False, default_root_dir=tmp_path, **quiet)
        module = Recorder()
        data = ClipsDataModule(parts, batch_size=16, seed=7)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return module, trainer

    unbroken, _ = train(3)
    first, trainer = train(1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    rest, _ = train(3, tmp_path / "one.ckpt")
    assert first.seen + rest.seen == unbroken.seen
    batches = len(first.seen)
    assert unbroken.seen[:batches] != unbroken.seen[batches : 2 * batches]
