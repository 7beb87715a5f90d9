"""What a person names is what is measured: a bundle, an ONNX file, a preset, or a folder with several of them.

Torch is imported only for what needs it: an ONNX file does not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aum_compress.audio.config import InputSpec
from aum_compress.budget.records import BudgetReport, Limits
from aum_compress.bundle import CARD, read_bundle
from aum_compress.errors import AumError
from aum_compress.models.presets import PRESETS, front_end_of


@dataclass(frozen=True)
class Reading:
    """How a target is to be read. Each value is for some kinds of target alone, and refused for others."""

    dims: Mapping[str, int] = field(default_factory=dict)
    """ONNX files: size of each symbolic dimension of the input."""
    trips: Mapping[str, int] = field(default_factory=dict)
    """ONNX files: name of a Loop -> how often its body runs."""
    clip_seconds: float | None = None
    """ONNX files and presets: length of a clip."""
    n_classes: int | None = None
    """Presets."""


def named_counts(option: str, words: Sequence[str]) -> dict[str, int]:
    """NAME=COUNT words as a mapping.

    Args:
        option: for the message.

    Raises:
        AumError: a word of another form.
    """
    found = {}
    for word in words:
        name, _, count = word.rpartition("=")
        if not name or not count.isdecimal() or not int(count):
            raise AumError(f"{option} {word}: wanted NAME=COUNT with a positive whole number, such as batch=1")
        found[name] = int(count)
    return found


def targets_in(names: Sequence[str]) -> list[str]:
    """The targets named, each folder of several models replaced by what lies in it, in order of name."""
    found = []
    for name in names:
        inside = [] if _is_preset(name) else _models_in(Path(name))
        found += [str(path) for path in inside] or [name]
    return list(dict.fromkeys(found))


def check_target(target: str, limits: Limits, reading: Reading) -> BudgetReport:
    """The budget of one bundle, ONNX file or preset.

    Raises:
        AumError: no such thing, a way of reading that is not for it, or all that the check itself raises.
    """
    path = Path(target)
    if path.suffix == ".onnx":
        from aum_compress.budget.check_onnx import check_onnx

        _refuse(target, "an ONNX file", n_classes=reading.n_classes)
        return check_onnx(path, limits, clip_seconds=reading.clip_seconds, dims=reading.dims, trips=reading.trips)
    if _is_preset(target):
        from aum_compress.budget.check import check_preset

        _refuse(target, "a preset", dims=reading.dims, trips=reading.trips)
        spec = InputSpec(front_end=front_end_of(target), clip_seconds=reading.clip_seconds or 1.0)
        return check_preset(target, spec, reading.n_classes or 10, limits)
    if not path.exists():
        raise AumError(
            f"{target}: no such bundle or ONNX file, and no preset of that name; presets: {', '.join(PRESETS)}"
        )
    from aum_compress.budget.check import check_bundle

    bundle = read_bundle(path)
    _refuse(target, "a bundle, whose card says all this", **vars(reading))
    return check_bundle(bundle, limits)


def _is_preset(name: str) -> bool:
    return name in PRESETS and not Path(name).exists()


def _models_in(folder: Path) -> list[Path]:
    """Bundles and ONNX files in a folder that is no bundle itself."""
    if not folder.is_dir() or (folder / CARD).exists():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix == ".onnx" or (path / CARD).is_file())


def _refuse(target: str, what: str, **given: object) -> None:
    options = {"dims": "--dim", "trips": "--trips", "clip_seconds": "--clip-seconds", "n_classes": "--classes"}
    if wrong := [options[name] for name, value in given.items() if value]:
        raise AumError(f"{target}: {', '.join(wrong)} cannot be used with {what}")
