"""The bundle: what every stage reads and writes (DESIGN section 5). Reading its card needs no torch.

A bundle is written beside its place and renamed into it, its card last, then never changed. Every file is named in the
card with its sha256, so that an altered or cut bundle is refused with the file named.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from aum_compress import __version__
from aum_compress.array_files import read_arrays
from aum_compress.audio.config import InputSpec
from aum_compress.errors import BundleError, join_problems
from aum_compress.models.config import ModelConfig
from aum_compress.models.storage import QUANTISED_INPUTS, QuantisedPrecision, Storage, as_storages
from aum_compress.processor import processor

if TYPE_CHECKING:
    from torch import Tensor

    from aum_compress.models.factory import Model

SCHEMA = 1
CARD, TENSORS, GOLDEN, RECIPE = "bundle.json", "model.safetensors", "golden.npz", "recipe.yaml"
GOLDEN_TOLERANCE = 1e-3
"""Largest difference of golden logits at read time, as a share of the largest: other machines, and other numbers of
threads, sum in another order, no more."""
ROUNDED_GOLDEN_TOLERANCE = 0.05
"""The same where activations are rounded: what lies on the edge between two steps may then fall to either side. It is
what an int8 file is allowed against its model, too (`export.verification`)."""


class ParentRef(BaseModel):
    """The bundle that this one was made from: its path relative to this bundle, and its card's sha256."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    sha256: str


class BundleCard(BaseModel):
    """`bundle.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = SCHEMA
    kind: Literal["model", "onnx"]
    stage: str
    recipe: str
    inputs_sha256: str = ""
    """Hash over everything the stage read; an equal one means that the stage need not run again."""
    parent: ParentRef | None = None
    model: ModelConfig
    input: InputSpec
    labels: tuple[str, ...]
    precision: Literal["fp32", "fp16", QuantisedPrecision]
    quantized_layers: dict[str, Storage] = {}
    """Name of each layer and activation that is quantised -> how; a list of names, as older cards have, is int8."""
    seed: int
    versions: dict[str, str]
    created: str
    metrics: dict[str, Any] = {}
    budget: dict[str, Any] | None = None
    notes: dict[str, Any] = {}
    """What the stage wants to be remembered: training curves, pruning importances, quantisation error."""
    files: dict[str, str] = {}

    _reads_names = field_validator("quantized_layers", mode="before")(as_storages)

    @field_validator("files")
    @classmethod
    def _lie_in_the_folder(cls, files: dict[str, str]) -> dict[str, str]:
        if outside := [name for name in files if name in ("", ".", "..") or "/" in name or "\\" in name]:
            raise ValueError(f"files: {outside[0]!r} leads out of the bundle's folder; wanted plain names")
        return files


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose files have been checked against its card."""

    path: Path
    card: BundleCard

    @property
    def sha256(self) -> str:
        """Of the card, and through it of every file."""
        return file_sha256(self.path / CARD)

    def tensors(self) -> dict[str, "Tensor"]:
        """Tensors at their stored width."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._file(TENSORS)
        try:
            return load_file(path)
        except SafetensorError as error:
            raise BundleError(f"{path}: cannot be read as safetensors: {error}; make the bundle again") from None

    def golden(self) -> tuple[np.ndarray, np.ndarray]:
        """Golden inputs (B,1,F,T) and the logits (B,C) that the bundle's writer computed."""
        path = self._file(GOLDEN)
        try:
            stored = read_arrays(path, ("inputs", "logits"))
        except ValueError as error:
            raise BundleError(
                f"{path}: cannot be read as golden inputs and logits: {error}; make the bundle again"
            ) from None
        return stored["inputs"], stored["logits"]

    def load_model(self) -> "Model":
        """The model in evaluation mode, rebuilt from configuration and tensors, and proved on the golden inputs.

        Raises:
            BundleError: tensors that do not fit the configuration, or golden logits that differ.
        """
        import torch

        from aum_compress.models.factory import build_model
        from aum_compress.models.quantized import load_stored, swap_in_quantized, unfit_layers

        model = build_model(self.card.model)
        if unknown := set(self.card.quantized_layers) - {name for name, _ in model.named_modules()}:
            raise BundleError(
                f"{self.path / CARD}: quantized_layers names {', '.join(sorted(unknown))}, which the model lacks"
            )
        if unfit := unfit_layers(model, self.card.quantized_layers):
            raise BundleError(f"{self.path / CARD}: quantized_layers: {'; '.join(unfit)}")
        swap_in_quantized(model, self.card.quantized_layers)
        if problems := load_stored(model, self.tensors()):
            raise BundleError(
                join_problems(f"{self.path / TENSORS}: tensors do not fit the model of {CARD}:", problems)
            )
        model.eval()
        inputs, expected = self.golden()
        config = self.card.model
        wanted = ((1, config.n_mels, config.n_frames), (len(inputs), config.n_classes))
        if inputs.dtype != np.float32 or (inputs.shape[1:], expected.shape) != wanted:
            raise BundleError(
                f"{self.path / GOLDEN}: holds {inputs.dtype} inputs {inputs.shape} and logits {expected.shape}, wanted "
                f"float32 (B, 1, {config.n_mels}, {config.n_frames}) and (B, {config.n_classes}); make the bundle again"
            )
        with torch.inference_mode():
            found = model(torch.from_numpy(inputs)).numpy()
        error = float(np.abs(found - expected).max())
        rounds = not {*QUANTISED_INPUTS, "uint8"}.isdisjoint(self.card.quantized_layers.values())
        tolerance = ROUNDED_GOLDEN_TOLERANCE if rounds else GOLDEN_TOLERANCE
        if not error <= tolerance * max(1.0, float(np.abs(expected).max())):
            raise BundleError(
                f"{self.path}: golden logits differ by {error:.3g} from {GOLDEN}, wanted at most {tolerance:g} "
                "relative: this machine or version does not compute what the bundle's writer did; make the bundle again"
            )
        return model

    def _file(self, name: str) -> Path:
        if name not in self.card.files:
            raise BundleError(f"{self.path}: has no {name} (kind {self.card.kind}, stage {self.card.stage})")
        return self.path / name


def read_bundle(path: Path) -> Bundle:
    """Opens a bundle and checks the sha256 of each file.

    Raises:
        BundleError: no bundle there, a card that cannot be read, a file absent, cut or altered: all named at once.
    """
    card_path = path / CARD
    if not card_path.is_file():
        what = "no such folder" if not path.exists() else f"no {CARD} in it"
        raise BundleError(f"{path}: not a bundle: {what}. A bundle is a folder that a stage of a recipe has written")
    try:
        card = BundleCard.model_validate_json(card_path.read_bytes())
    except (ValidationError, UnicodeDecodeError) as error:
        detail = str(error).splitlines()[:6]
        raise BundleError(
            f"{card_path}: cannot be read as a bundle card of schema {SCHEMA}; cut short or altered? {' '.join(detail)}"
        ) from None
    problems = []
    inside = path.resolve()
    for name, wanted in card.files.items():
        file = path / name
        if inside not in file.resolve().parents:  # `..`, an absolute path, or a link
            problems.append(f"{name}: leads out of the folder, wanted a file in it")
        elif not file.is_file():
            problems.append(f"{name}: absent")
        elif (found := file_sha256(file)) != wanted:
            problems.append(f"{name}: altered or cut short: sha256 {found[:12]}..., wanted {wanted[:12]}...")
    if problems:
        raise BundleError(
            join_problems(f"{path}: files differ from {CARD}; delete the folder and run its stage again:", problems)
        )
    return Bundle(path, card)


def find_bundle(path: Path, inputs_sha256: str) -> Bundle | None:
    """The whole bundle at `path` if it was made from the same inputs, else None. A damaged one is an error."""
    if not (path / CARD).is_file():
        return None
    bundle = read_bundle(path)
    return bundle if bundle.card.inputs_sha256 == inputs_sha256 else None


def run_of_bundle(bundle: Path) -> tuple[Path, Path]:
    """The resolved recipe of a run, and the folder below which it is at work, from one of its bundles.

    Raises:
        BundleError: a bundle that lies in neither runs/<recipe>/ nor exports/.
    """
    place = bundle.resolve()
    runs = next((folder for folder in place.parents if folder.name == "runs"), place)
    for name, folder in {"runs": runs, "exports": place.parent}.items():
        if folder.name == name and (place / RECIPE).is_file():
            return place / RECIPE, folder.parent
    raise BundleError(
        f"{bundle}: is no bundle of a run: wanted runs/<recipe>/<stage> or exports/<name>, with {RECIPE} in it; "
        "name the recipe instead, with --out"
    )


def write_bundle(path: Path, card: BundleCard, files: Mapping[str, bytes | Path]) -> Bundle:
    """Writes `files` (content, or a file to copy) and the card beside `path`, then renames the folder into place.

    A bundle that stood at `path` is replaced as a whole. `card.files` is filled in here.

    Raises:
        BundleError: something other than a bundle stands at `path`, or the disk is full or not writable; nothing is
            left at `path` that was not there before.
    """
    place = path.resolve()  # `.` and `..` have no name of their own
    if place.exists() and not (place / CARD).is_file() and not (place.is_dir() and not any(place.iterdir())):
        raise BundleError(
            f"{path}: holds something other than a bundle, which would be lost; wanted a new or empty folder, or a "
            "bundle to replace. Name another folder, or move away what is there"
        )
    beside = place.with_name(f".{place.name}.writing-{os.getpid()}")
    try:
        for leftover in _leftovers(place):
            shutil.rmtree(leftover)
        beside.mkdir(parents=True)
        for name, content in files.items():
            target = beside / name
            if isinstance(content, Path):
                shutil.copyfile(content, target)
            else:
                target.write_bytes(content)
        card = card.model_copy(update={"files": {name: file_sha256(beside / name) for name in files}})
        (beside / CARD).write_text(card.model_dump_json(indent=1) + "\n", encoding="utf-8")
        replace_folder(beside, place)
    except OSError as error:
        raise BundleError(
            f"{path}: cannot be written: {error.strerror or error}. Free space or choose another --out"
        ) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return read_bundle(path)


def _leftovers(path: Path) -> list[Path]:
    """What writers of `path` that were killed have left beside it; not what another one is at work on."""
    prefixes = (f".{path.name}.writing-", f".{path.name}.replaced-")
    if not path.parent.is_dir():
        return []
    found = [entry for entry in path.parent.iterdir() if entry.name.startswith(prefixes)]
    return [entry for entry in found if not _is_another_process(entry.name.rpartition("-")[2])]


def _is_another_process(pid: str) -> bool:
    """Whether a process of this machine, other than this one, has that number now."""
    if not pid.isdecimal() or int(pid) == os.getpid() or sys.platform == "win32":  # where signal 0 is Ctrl-C
        return False
    try:
        os.kill(int(pid), 0)
    except PermissionError:  # another user's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def replace_folder(source: Path, target: Path) -> None:
    """Renames `source` to `target`; a folder that stood there goes away only once the new one is in place."""
    old = target.with_name(f".{target.name}.replaced-{os.getpid()}")
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(source, target)
    except BaseException:  # Ctrl-C too
        if old.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def golden_inputs(spec: InputSpec) -> np.ndarray:
    """(4,1,F,T) float32 normalised features made up from a seed: smooth maps, quiet to loud, noise upon them.

    Made up, because a file that ships must not carry anybody's recordings. Verification hears real ones besides.
    """
    generator = np.random.default_rng(0)
    _, n_mels, n_frames = spec.feature_shape
    across = np.linspace(0, 1, n_mels)[:, None] * generator.uniform(1, 4, (4, 1, 1))
    along = np.linspace(0, 1, n_frames)[None, :] * generator.uniform(1, 8, (4, 1, 1))
    smooth = np.sin(2 * np.pi * (across + along)) + np.array([-1.5, -0.5, 0.5, 1.5])[:, None, None]
    noise = 0.5 * generator.standard_normal((4, n_mels, n_frames))
    return (smooth + noise).astype(np.float32)[:, None]


def model_files(model: "Model", inputs: np.ndarray, *, half: bool = False) -> dict[str, bytes]:
    """`model.safetensors` and `golden.npz` of a model in evaluation mode.

    Args:
        inputs: golden ones, (B,1,F,T) float32.
        half: store floats (but quantisation scales) as float16; the model must already hold such values.
    """
    import io

    import torch
    from safetensors.torch import save

    from aum_compress.models.quantized import stored_tensors

    with torch.inference_mode():
        logits = model(torch.from_numpy(inputs)).float().numpy()
    buffer = io.BytesIO()
    np.savez(buffer, inputs=inputs, logits=logits)
    return {TENSORS: save(stored_tensors(model, half=half)), GOLDEN: buffer.getvalue()}


def file_sha256(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def json_sha256(value: Any) -> str:
    """Hex digest of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def tool_versions() -> dict[str, str]:
    """Versions that decide what a stage computes."""
    found = {"aum-compress": __version__, "python": platform.python_version()}
    for package in ("torch", "lightning", "onnx", "onnxruntime", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """Processor and operating system, in words; no name of the machine."""
    return f"{processor()}, {os.cpu_count()} cores, {platform.system()}"


def now() -> str:
    """UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
