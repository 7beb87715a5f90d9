"""A pack: one model for each recording device that has its own, and a general one. Torch-free.

<folder>/pack.json                 which models, with the sha256 of each one's card, and what was measured
<folder>/general/, <folder>/<device>/    bundles: tensors, golden logits and the verified ONNX file
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from aum_compress.bundle import CARD, Bundle, file_sha256, read_bundle
from aum_compress.device_names import GENERAL, names_a_folder
from aum_compress.errors import BundleError, join_problems
from aum_compress.models.storage import QuantisedPrecision

PACK = "pack.json"


class PackCard(BaseModel):
    """`pack.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    recipe: str
    created: str
    inputs_sha256: str
    """Over all that the pack was made from: an equal one means that it need not be made again."""
    precision: Literal["fp32", "fp16", QuantisedPrecision]
    """Of the ONNX files."""
    models: dict[str, str]
    """Name, `general` or a device -> sha256 of its bundle's card."""
    devices: list[dict[str, Any]]
    """For each device with a model of its own, what it gains by it."""
    test: dict[str, Any]
    """Metrics of the whole test part, each clip by its device's model, and of the general model on the same clips."""


@dataclass(frozen=True)
class Pack:
    """A pack on disk whose bundles have been checked against its card."""

    path: Path
    card: PackCard

    def bundle(self, name: str) -> Bundle:
        """The bundle of a model, its files checked."""
        return read_bundle(self.path / name)

    def onnx_file(self, name: str) -> Path:
        """The ONNX file of a model, checked against its bundle's card.

        Raises:
            BundleError: a bundle that was altered, or one whose card does not name the file.
        """
        bundle, file = self.bundle(name), f"model-{self.card.precision}.onnx"
        if file not in bundle.card.files:
            raise BundleError(
                f"{bundle.path}: its card names no {file}, wanted by the precision in {PACK}; run the recipe again"
            )
        return bundle.path / file

    def model_for(self, device: str) -> str:
        """The device itself where it has a model of its own, else `general`."""
        return device if device in self.card.models else GENERAL


def is_pack(path: Path) -> bool:
    return (path / PACK).is_file()


def read_pack(path: Path) -> Pack:
    """Opens a pack and checks that its bundles are those that it was written with.

    Raises:
        BundleError: no pack there, a card that cannot be read, names that lead out of the folder, bundles absent or
            altered.
    """
    try:
        card = PackCard.model_validate(json.loads((path / PACK).read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, ValidationError) as error:
        detail = " ".join(str(error).split())[:300]
        raise BundleError(f"{path / PACK}: cannot be read as the card of a pack: {detail}") from None
    problems = [f"{name!r}: cannot name a model's folder" for name in card.models if not names_a_folder(name)]
    if GENERAL not in card.models:
        problems.append(f"{GENERAL}: has no model, and each pack has one")
    if not problems:
        for name, wanted in card.models.items():
            file = path / name / CARD
            if not file.is_file():
                problems.append(f"{name}: absent")
            elif file_sha256(file) != wanted:
                problems.append(f"{name}: altered, or not of this pack")
    if problems:
        raise BundleError(join_problems(f"{path}: models differ from {PACK}; run the recipe again:", problems))
    return Pack(path, card)
