"""What a data set is to the rest of the package: clips with labels, and three disjoint parts of them."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from aum_compress.errors import DataError, join_problems


@dataclass(frozen=True, slots=True)
class Clip:
    """One training or test example: `clip_seconds` of one audio file."""

    clip_id: str
    """Stable name, unique in its data set: the file's path below the root (posix), with `#k` behind it for window k of
    a longer file."""
    path: Path
    label: str
    device: str
    """Recording device, e.g. `a`, `s1`; empty when the data set has none."""
    group: str
    """What must not be split: the recording place (`city-place`) in TAU, the source file or the group column for class
    folders."""
    start_seconds: float = 0.0
    follows: str = ""
    """`clip_id` of the clip that ends, in the same recording of the same device, where this one begins; empty when
    there is none. It need not be part of the data set."""

    @property
    def filename(self) -> str:
        """`clip_id` of the whole file: the path below the root, without the window's number."""
        return re.sub(r"#\d+$", "", self.clip_id)


@dataclass(frozen=True)
class DataIndex:
    """A data set cut into parts. No group stands in two of train and validation; the test part chooses nothing.

    The validation part may be empty, where nothing is to be chosen on it.
    """

    root: Path
    labels: tuple[str, ...]
    """Class names in the order of the model's outputs (C of them), sorted."""
    clip_seconds: float
    train: tuple[Clip, ...]
    validation: tuple[Clip, ...]
    test: tuple[Clip, ...]
    shortest_seconds: float = 0.0
    """A file with less audio than this is a bad file; one that has less than `clip_seconds` is padded with silence."""

    @property
    def seen_devices(self) -> frozenset[str]:
        """Devices that occur in the training part."""
        return frozenset(clip.device for clip in self.train)

    def validate(self) -> "DataIndex":
        """This index, when a model can be trained and judged on it; else DataError with everything that is wrong."""
        problems = [
            f"the {name} part has no clips"
            for name, part in (("training", self.train), ("test", self.test))
            if not part
        ]
        trained = {clip.label for clip in self.train}
        if untrained := [label for label in self.labels if label not in trained]:
            problems.append(f"no training clips of {', '.join(untrained)}: each class needs some")
        if strange := {clip.label for clip in self.train + self.validation + self.test} - set(self.labels):
            problems.append(f"clips of {', '.join(sorted(strange))}, which are not among the labels")
        if len(self.labels) < 2:
            problems.append(f"{len(self.labels)} class found ({', '.join(self.labels)}), wanted at least two")
        times = Counter(clip.clip_id for clip in self.train + self.validation + self.test)
        if twice := sorted(clip_id for clip_id, count in times.items() if count > 1):
            problems.append(f"{len(twice)} clips are listed twice, or stand in two parts, first {twice[0]}")
        if shared := {clip.group for clip in self.train} & {clip.group for clip in self.validation}:
            problems.append(f"{len(shared)} groups stand in training and in validation, first {min(shared)}")
        if problems:
            raise DataError(join_problems(f"{self.root}: this data set cannot be trained on:", problems))
        return self
