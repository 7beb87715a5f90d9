"""Cached clips as Lightning batches."""

from collections.abc import Iterator, Sequence

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from aum_compress.data.cache import CachedClips, CachedParts

Batch = tuple[Tensor, Tensor, Tensor]
"""Features (B,1,F,T) or waveforms (B,S) float32; class numbers (B,) int64; positions in the part (B,) int64."""


class CachedDataset(Dataset[Batch]):
    """One part of a data set. A whole batch is one read from the memory map."""

    def __init__(self, cached: CachedClips, labels: Sequence[str]) -> None:
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
        return (x.unsqueeze(1) if self.cached.what == "logmel" else x), self.targets[positions], positions


class EpochShuffle(Sampler[int]):
    """A random order that depends on seed and epoch alone, so that a resumed run sees what an unbroken one would have.

    Lightning calls `set_epoch` before each training epoch.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        # of the pair, not the sum: epoch 1 of seed 0 is not epoch 0 of seed 1
        yield from np.random.default_rng([self.seed, self.epoch]).permutation(self.n).tolist()


class ClipsDataModule(L.LightningDataModule):
    """Training, validation and test batches of a cached data set.

    Every clip comes once an epoch: training clips in an order of the epoch's own, the others as they stand. The third
    tensor of a training batch finds teacher logits and checksums: it counts into `parts.train.clips`.
    """

    def __init__(self, parts: CachedParts, batch_size: int, seed: int, num_workers: int = 0) -> None:
        super().__init__()
        self.parts = parts
        self.labels = parts.index.labels
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers

    @property
    def train_clips(self) -> int:
        """How many clips an epoch has."""
        return len(self.parts.train)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled anew each epoch."""
        return self._loader(self.parts.train, EpochShuffle(self.train_clips, self.seed))

    def val_dataloader(self) -> DataLoader[Batch]:
        """All validation clips in order."""
        return self._loader(self.parts.validation)

    def test_dataloader(self) -> DataLoader[Batch]:
        """All test clips in order."""
        return self._loader(self.parts.test)

    def _loader(self, cached: CachedClips, sampler: EpochShuffle | None = None) -> DataLoader:
        return DataLoader(
            CachedDataset(cached, self.labels),
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # __getitems__ gives whole batches
            collate_fn=_as_it_is,
        )


def _as_it_is(batch: Batch) -> Batch:
    return batch
