"""Cached clips as Lightning batches."""

import math
from collections.abc import Iterator, Sequence

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from aum_compress.data.cache import CachedClips, CachedParts
from aum_compress.data.views import ViewedClips

Batch = tuple[Tensor, Tensor, Tensor]
"""Features (B,1,F,T) or waveforms (B,S) float32; class numbers (B,) int64; positions in the part (B,) int64, of view v
of clip k of n `v * n + k`."""


class CachedDataset(Dataset[Batch]):
    """One part of a data set. A whole batch is one read from the memory map."""

    def __init__(self, cached: CachedClips | ViewedClips, labels: Sequence[str]) -> None:
        self.cached = cached
        number = {label: k for k, label in enumerate(labels)}
        self.targets = torch.tensor([number[clip.label] for clip in cached.clips], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.cached)

    def __getitem__(self, index: int) -> Batch:
        """A batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        """The batch of the clips at `indices`; what the data loader calls."""
        positions = torch.tensor(indices, dtype=torch.int64)
        x = torch.from_numpy(self.cached[positions.numpy()])
        return (
            (x.unsqueeze(1) if self.cached.what == "logmel" else x),
            self.targets[positions % len(self.targets)],
            positions,
        )


class EpochShuffle(Sampler[int]):
    """A random order that depends on seed and epoch alone, so that a resumed run sees what an unbroken one would have.

    Of several processes each takes every `world_size`-th clip of the same order: batch k of all of them together is
    batch k of one process with `world_size` times the batch size. All take equally many, as each step needs them all:
    where the clips do not divide evenly, the order's first ones fill it up.

    Of each clip's views one is drawn, all equally likely, by seed, epoch and clip.

    Lightning calls `set_epoch` before each training epoch.
    """

    def __init__(self, n: int, seed: int, rank: int = 0, world_size: int = 1, views: int = 1) -> None:
        self.n = n
        self.views = views
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.n // self.world_size)

    def __iter__(self) -> Iterator[int]:
        # of the pair, not the sum: epoch 1 of seed 0 is not epoch 0 of seed 1
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n)
        view = np.random.default_rng([self.seed, self.epoch, 1]).integers(self.views, size=self.n)
        order += self.n * view[order]
        yield from np.resize(order, len(self) * self.world_size)[self.rank :: self.world_size].tolist()


class ClipsDataModule(L.LightningDataModule):
    """Training, validation and test batches of a cached data set, or the share of them of one process among several.

    Every clip comes once an epoch: training clips in an order of the epoch's own, the others as they stand. The third
    tensor of a training batch finds teacher logits and checksums: it counts into `parts.train.clips`, or into `views`.
    """

    def __init__(
        self,
        parts: CachedParts,
        batch_size: int,
        seed: int,
        *,
        views: ViewedClips | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Args: batch_size of each process. views: of the training clips, of which one is taken each time."""
        super().__init__()
        self.parts = parts
        self.views = views
        self.labels = parts.index.labels
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    @property
    def train_clips(self) -> int:
        """How many clips an epoch has."""
        return len(self.parts.train)

    @property
    def train_batches(self) -> int:
        """How many batches this process, like each other one, has in an epoch."""
        return math.ceil(len(self._train_order()) / self.batch_size)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled anew each epoch."""
        return self._loader(self.parts.train if self.views is None else self.views, self._train_order())

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation clips in order: no clip twice, so that the processes' shares may differ by one."""
        return self._loader(self.parts.validation, self._as_they_stand(self.parts.validation))

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test clips in the same way."""
        return self._loader(self.parts.test, self._as_they_stand(self.parts.test))

    def _train_order(self) -> EpochShuffle:
        views = 1 if self.views is None else len(self.views.names)
        return EpochShuffle(self.train_clips, self.seed, self.rank, self.world_size, views)

    def _as_they_stand(self, cached: CachedClips) -> range:
        return range(self.rank, len(cached), self.world_size)

    def _loader(self, cached: CachedClips | ViewedClips, sampler: EpochShuffle | range) -> DataLoader:
        return DataLoader(
            CachedDataset(cached, self.labels),
            batch_size=self.batch_size,
            sampler=sampler,
            pin_memory=torch.cuda.is_available(),
            # __getitems__ gives whole batches
            collate_fn=_as_it_is,
        )


def _as_it_is(batch: Batch) -> Batch:
    return batch
