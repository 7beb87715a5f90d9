"""On what a model is measured: all usable files of a folder, or the test part of a recipe. Torch-free."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aum_compress.console import log, progress
from aum_compress.data.check import check_data
from aum_compress.data.clips import Clip
from aum_compress.data.folders import windows
from aum_compress.data.index import load_index
from aum_compress.data.tau import recording
from aum_compress.errors import DataError, RecipeError, join_problems
from aum_compress.recipe import find_recipe, load_recipe


@dataclass(frozen=True)
class TestClips:
    """Labelled clips that have chosen nothing."""

    __test__ = False  # no test, though pytest would take it for one by its name

    clips: tuple[Clip, ...]
    seen_devices: frozenset[str]
    """Devices of the training part; empty where they are not known."""


def find_clips(data: str, settings: list[str], clip_seconds: float, seen_devices: list[str]) -> TestClips:
    """The clips that `--data` names.

    Args:
        data: a folder of audio, or a recipe (name or path).
        settings: `section.key=value` for a recipe.
        clip_seconds: length of the model's input: longer files of a folder are cut into windows.
        seen_devices: of the training part, for a folder, which cannot say; a recipe knows them.

    Raises:
        AumError: no such data, or an option that is not for this kind.
    """
    root = Path(data).expanduser()
    if not root.is_dir():
        try:
            path = find_recipe(data)
        except RecipeError as error:
            raise DataError(f"--data: no folder of audio there, and {error}") from None
        if seen_devices:
            raise DataError(f"--seen-devices: {data} is a recipe, whose training part says which devices were heard")
        recipe = load_recipe(path, settings)
        with progress("evaluate: data") as reporter:
            index = load_index(recipe.data, recipe.seed, reporter.advance)
        return TestClips(index.test, frozenset(filter(None, index.seen_devices)))
    if settings:
        raise DataError(f"--set changes a recipe, and {data} is a folder of audio")
    with progress("evaluate: reading") as reporter:
        report = check_data(root, clip_seconds=clip_seconds, progress=reporter.advance)
    if report.bad:
        log(f"{root}: {len(report.bad)} files are left out; aum-compress data check {root} says why")
    clips = tuple(window for clip, _ in report.good for window in windows(clip, clip_seconds))
    devices = {clip.device for clip in clips if clip.device}
    if unknown := sorted(set(seen_devices) - devices):
        log(
            f"--seen-devices: no clip of {', '.join(unknown)} in {data}; devices there: "
            f"{', '.join(sorted(devices)) or 'none'}"
        )
    return TestClips(clips, frozenset(seen_devices))


def recordings_of(clips: Sequence[Clip]) -> list[str]:
    """Of each clip the recording that it was cut from: what a bootstrap draws as a whole.

    In TAU one recording was made at one time in one place, by several devices, and is stored in parts of one second. A
    file of class folders is a recording, or belongs to the group that its table says.
    """
    return [tau_recording(clip) or clip.group for clip in clips]


def tau_recording(clip: Clip) -> str | None:
    """What all parts of a TAU recording have in common; None for a clip of other data.

    Its name alone does not tell: `2024-05-01-12-00.wav` has as many dashes. TAU's say the class, and class folders know
    no device.
    """
    found = recording(clip.filename) if clip.device else None
    return found if found and found.startswith(f"{clip.label}-") else None


def require_labels(clips: tuple[Clip, ...], labels: tuple[str, ...], data: str, model: Path) -> None:
    """Raises DataError for labels of the data that the model does not know."""
    if unknown := sorted({clip.label for clip in clips} - set(labels)):
        raise DataError(
            join_problems(f"{data}: has labels that {model} does not know (it knows {', '.join(labels)}):", unknown)
        )
