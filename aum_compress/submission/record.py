"""`package.json`: what was packed, and its costs. A further system of the same team joins by it."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from aum_compress import __version__
from aum_compress.errors import BundleError

RECORD = "package.json"


class Costs(BaseModel):
    """Of one model of a system."""

    model_config = ConfigDict(frozen=True)

    bundle_sha256: str
    param_bytes: NonNegativeInt
    macs: NonNegativeInt
    """For one second of audio."""
    dcase_bytes: NonNegativeInt
    dcase_macs: NonNegativeInt
    """As the organisers' script counts one clip."""


class Record(BaseModel):
    """`package.json`."""

    model_config = ConfigDict(frozen=True)

    label: str
    aum_compress: str = __version__
    sources_sha256: str
    """Over the source files in the package, which all its systems share."""
    systems: dict[Annotated[int, Field(ge=1, le=4)], dict[str, Costs]] = {}
    """Index of a system -> name of each of its models -> its costs."""
    checkpoints: dict[str, str] = {}
    """`<label>_<index>` -> sha256 of the file."""

    def joined(self, index: int, models: dict[str, Costs], checkpoint_sha256: str) -> "Record":
        """The same with a system more, or another one in the place of that index."""
        checkpoints = self.checkpoints | {f"{self.label}_{index}": checkpoint_sha256}
        return self.model_copy(update={"systems": self.systems | {index: models}, "checkpoints": checkpoints})


def read_record(place: Path, label: str) -> Record:
    """The record of the package of `label` in the folder `place`.

    Raises:
        BundleError: no such package there, or a record that cannot be read.
    """
    try:
        found = Record.model_validate_json((place / label / RECORD).read_bytes())
        if found.label != label:  # it names a folder to write to
            raise ValueError(found.label)
        return found
    except (OSError, ValueError):
        raise BundleError(
            f"{place}: holds something other than a package of {label}, which would be lost; wanted a new or empty "
            "folder, or that package. Name another folder with --to, or move away what is there"
        ) from None


def write_record(place: Path, record: Record) -> Path:
    """Writes the record into the folder of its package."""
    path = place / record.label / RECORD
    path.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return path
