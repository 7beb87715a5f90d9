"""What a data set is to the rest of the package: clips with labels, and three disjoint parts of them."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Clip:
    """One training or test example: `clip_seconds` of one audio file."""

    clip_id: str
    """Stable name, unique in its data set: the file's path below the root (posix), with `#k` behind it for window k of a longer file."""
    path: Path
    label: str
    device: str
    """Recording device, e.g. `a`, `s1`; empty when the data set has none."""
    group: str
    """What must not be split: the recording place (`city-place`) in TAU, the source file or the group column for class folders."""
    start_seconds: float = 0.0


@dataclass(frozen=True)
class DataIndex:
    """A data set cut into parts. No group stands in two of train and validation; the test part chooses nothing."""

    root: Path
    labels: tuple[str, ...]
    """Class names in the order of the model's outputs (C of them), sorted."""
    clip_seconds: float
    train: tuple[Clip, ...]
    validation: tuple[Clip, ...]
    test: tuple[Clip, ...]

    @property
    def seen_devices(self) -> frozenset[str]:
        """Devices that occur in the training part."""
        return frozenset(clip.device for clip in self.train)
