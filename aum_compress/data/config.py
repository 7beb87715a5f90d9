"""The recipe's `data` section: which audio, cut into which parts. Torch-free."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Count = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]


def cache_root() -> Path:
    """Where features and generated audio are kept: $AUM_CACHE, else the platform's folder for a user's caches."""
    if chosen := os.environ.get("AUM_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "aum-compress"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "aum-compress"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aum-compress"


class _DataSection(BaseModel):
    """What every kind of data has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    clip_seconds: Annotated[float, Field(gt=0)] = 1.0
    """Length of one example."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.15
    """Share of the training clips that is set apart, whole groups at a time, to choose checkpoints. With 0 there are
    none, and each training keeps its last epoch (`keep: last`)."""
    on_bad_files: Literal["stop", "skip"] = "stop"
    """What to do about files that cannot be used: name them all and stop, or go on without them."""


class TauData(_DataSection):
    """TAU Urban Acoustic Scenes 2022 Mobile, or any data set in its layout."""

    kind: Literal["tau"]
    root: Path
    """Folder that holds `audio/` and, where there is one, `meta.csv`."""
    train_split: str = "25"
    """`5`, `10`, `25`, `50` or `100` (percent, the official split files), or the path of a split file."""
    test_split: str | None = None
    """Path of the test list; when left out, the official `test.csv` or `fold1_evaluate.csv` is looked for."""
    limit_train: Count | None = None
    """For trials: at most so many training clips (validation included), every class in proportion."""
    limit_test: Count | None = None
    """For trials: at most so many test clips, every class in proportion."""

    @field_validator("train_split", mode="before")
    @classmethod
    def _percent(cls, value: object) -> object:
        # YAML reads `train_split: 25` as a number
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("train_split")
    @classmethod
    def _known_split(cls, value: str) -> str:
        if value not in ("5", "10", "25", "50", "100") and not value.endswith(".csv"):
            raise ValueError(f"{value!r} is neither 5, 10, 25, 50 or 100 nor the path of a .csv file")
        return value


class FolderData(_DataSection):
    """One folder a class, with wav, flac, ogg or mp3 files of any rate, channel count and length in it."""

    kind: Literal["folders"]
    root: Path
    groups_csv: Path | None = None
    """Table with the columns `file` (path below the root) and `group`, `fold` or both. Files of one group are never
    split between parts; without it, each file is its own group."""
    test_fraction: Share = 0.2
    """Share of the clips that makes the test part, where no `test_folds` are named."""
    test_folds: tuple[str, ...] = ()
    """Folds of `groups_csv` that make the test part."""

    @field_validator("test_folds", mode="before")
    @classmethod
    def _fold_names(cls, value: object) -> object:
        # folds are names, but YAML reads `[1, 2]` as numbers
        return tuple(map(str, value)) if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _one_way_to_test(self) -> "FolderData":
        if self.test_folds and self.groups_csv is None:
            raise ValueError("test_folds needs groups_csv, a table with the columns file and fold")
        if self.test_folds and "test_fraction" in self.model_fields_set:
            raise ValueError("test_folds and test_fraction both name a test part: give one of them")
        return self


class SynthData(_DataSection):
    """Synthetic soundscapes: the embedded data set, generated once and read as TAU."""

    kind: Literal["synth"]
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the sounds themselves; the training seed is another one."""
    train_clips_per_class: Count = 160
    """Validation included."""
    test_clips_per_class: Count = 60
    root: Path | None = None
    """Folder to write the audio to; a folder of its own below the cache root when left out."""


DataConfig = Annotated[TauData | FolderData | SynthData, Field(discriminator="kind")]
