"""TAU Urban Acoustic Scenes 2022 Mobile, and every data set in its layout.

    root/audio/<scene>-<city>-<place>-<recording>-<part>-<device>.wav    one second each (10 s and no part in 2020)
    root/meta.csv                        filename, scene_label, identifier, source_label     tab-separated, optional
    root/[evaluation_setup|split|split_setup]/split25.csv, test.csv ...  filename, scene_label   tab-separated

Without meta.csv, labels, places and devices come from the file names.
"""

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from aum_compress.audio.reading import audio_info
from aum_compress.data.clips import Clip, DataIndex
from aum_compress.data.config import TauData
from aum_compress.data.splitting import read_table, take_groups, take_stratified
from aum_compress.errors import DataError, join_problems

SPLIT_FOLDERS = ("", "evaluation_setup", "split", "split_setup")
TEST_NAMES = ("test.csv", "fold1_evaluate.csv", "fold1_test.csv")
# The official training lists leave these out, so that they are unseen in the test part
UNSEEN_DEVICES = frozenset(("s4", "s5", "s6"))

_LIST_NAME = re.compile(r"split\d+\.csv|test\.csv|fold\d+_(train|test|evaluate)\.csv")
_NAME = re.compile(
    r"(?P<scene>[^-]+)-(?P<city>[^-]+)-(?P<place>[^-]+)-(?P<recording>[^-]+)(-(?P<part>[^-]+))?-(?P<device>[^-]+)"
)
_ROUNDED_SECONDS = 0.01
_logger = logging.getLogger(__name__)


def parse_name(root: Path, filename: str) -> Clip | None:
    """The clip that a TAU file name (`audio/airport-lisbon-1000-40000-0-a.wav`) describes; None for other names."""
    found = _NAME.fullmatch(Path(filename).stem)
    if found is None:
        return None
    return Clip(
        clip_id=filename,
        path=root / filename,
        label=found["scene"],
        device=found["device"],
        group=f"{found['city']}-{found['place']}",
        follows=_before(filename, found),
    )


def _before(filename: str, found: re.Match[str]) -> str:
    """Name of the one-second part before this one of its ten-second recording: TAU numbers them from 0."""
    part = found["part"]
    if part is None or not part.isdecimal() or int(part) == 0:
        return ""
    stem = Path(filename).stem
    start, end = found.span("part")
    return Path(filename).with_name(f"{stem[:start]}{int(part) - 1}{stem[end:]}.wav").as_posix()


def recording(filename: str) -> str | None:
    """What all parts of one TAU recording, by all its devices, have in common; None for other names."""
    found = _NAME.fullmatch(Path(filename).stem)
    return None if found is None else "-".join(found[key] for key in ("scene", "city", "place", "recording"))


def read_meta(root: Path) -> dict[str, Clip]:
    """Clips of `meta.csv` by file name; empty where there is no such file. Raises DataError for a file listed twice."""
    path = root / "meta.csv"
    if not path.exists():
        return {}
    rows = read_table(path, ("filename", "scene_label", "identifier", "source_label"))
    clips = {
        row["filename"]: Clip(
            clip_id=row["filename"],
            path=root / row["filename"],
            label=row["scene_label"],
            device=row["source_label"],
            group=row["identifier"],
            follows=_before(row["filename"], named) if (named := _NAME.fullmatch(Path(row["filename"]).stem)) else "",
        )
        for row in rows
    }
    if len(clips) < len(rows):
        raise DataError(f"{path}: {len(rows) - len(clips)} files are listed more than once; wanted one row a file")
    return clips


def audio_on_disk(root: Path) -> list[str]:
    """File names (`audio/....wav`) below the root, sorted."""
    return sorted(path.relative_to(root).as_posix() for path in (root / "audio").rglob("*.wav"))


def listed_files(root: Path) -> set[str]:
    """File names in all official-looking split files below the root."""
    paths = [
        path for folder in SPLIT_FOLDERS for path in (root / folder).glob("*.csv") if _LIST_NAME.fullmatch(path.name)
    ]
    return {row["filename"] for path in paths for row in read_table(path, ("filename",))}


def load_tau(config: TauData, seed: int) -> DataIndex:
    """Index of a TAU tree: the split files' lists, with validation cut from the training list by recording place.

    Files are not opened here: those that are listed but missing or unusable are found, all at once, where the audio is
    read (data/cache.py). Raises DataError for lists that cannot be found, read, or told apart.
    """
    root = config.root.expanduser()
    if not (root / "audio").is_dir():
        raise DataError(
            f"{root}: no folder audio/ in it; data.root wants the folder of a TAU mobile data set, "
            f"with audio/<scene>-<city>-<place>-<recording>-<part>-<device>.wav below it"
        )
    meta = read_meta(root)
    test = _listed_clips(root, meta, _find_test_list(root, config.test_split))
    train_list = _find_train_list(root, config.train_split)
    train = _remaining_clips(root, meta, test) if train_list is None else _listed_clips(root, meta, train_list)
    _require_apart(train, test)
    _require_whole_clips(train + test, config.clip_seconds)

    labels = tuple(sorted({clip.label for clip in train + test}))
    if config.limit_train is not None:
        train = take_stratified(train, config.limit_train, seed)
    if config.limit_test is not None:
        test = take_stratified(test, config.limit_test, seed)
    train, validation = take_groups(train, config.validation_fraction, seed, "validation")
    return DataIndex(
        root=root,
        labels=labels,
        clip_seconds=config.clip_seconds,
        train=tuple(train),
        validation=tuple(validation),
        test=tuple(test),
        shortest_seconds=shortest_tau_seconds(config.clip_seconds),
    ).validate()


def shortest_tau_seconds(clip_seconds: float) -> float:
    """A TAU file is one whole clip, within what recorders round."""
    return max(clip_seconds - _ROUNDED_SECONDS, 0.5 * clip_seconds)


def _require_whole_clips(clips: list[Clip], clip_seconds: float) -> None:
    """Refuses files of which a clip would be the beginning alone, by one file of each device."""
    for clip in {clip.device: clip for clip in reversed(clips)}.values():
        try:
            seconds = audio_info(clip.path).seconds
        except (DataError, OSError):
            continue  # reading all files says what is wrong with which
        if seconds > clip_seconds + _ROUNDED_SECONDS:
            raise DataError(
                f"{clip.path}: lasts {seconds:.2f} s, and data.clip_seconds is {clip_seconds:g}: in this layout a file "
                f"is one clip, and the rest of it would not be heard. Set data.clip_seconds: {seconds:.3g}, or cut the "
                "files"
            )


def _find_list(root: Path, names: Iterable[str], wanted: str) -> Path:
    """The first of the split files that exists."""
    tried = [root / folder / name for name in names for folder in SPLIT_FOLDERS]
    for path in tried:
        if path.is_file():
            return path
    raise DataError(join_problems(f"{root}: found no {wanted}; looked for", [str(path) for path in tried]))


def _find_explicit(root: Path, name: str, key: str) -> Path:
    """A split file that the recipe names: a path as it stands, or one below the root or a split folder."""
    path = Path(name).expanduser()
    return path if path.is_file() else _find_list(root, [str(path)], f"split file {name} (data.{key})")


def _find_test_list(root: Path, test_split: str | None) -> Path:
    if test_split is not None:
        return _find_explicit(root, test_split, "test_split")
    return _find_list(root, TEST_NAMES, "test list (name one with data.test_split)")


def _find_train_list(root: Path, train_split: str) -> Path | None:
    """None for the whole development set, where no file lists it."""
    if train_split.endswith(".csv"):
        return _find_explicit(root, train_split, "train_split")
    if train_split != "100":
        return _find_list(root, [f"split{train_split}.csv"], f"list of the {train_split} % training split")
    try:
        return _find_list(root, ["split100.csv", "fold1_train.csv"], "training list")
    except DataError:
        return None


def _listed_clips(root: Path, meta: dict[str, Clip], path: Path) -> list[Clip]:
    """Clips of a split file. Label, place and device come from meta.csv, or from the name where it lacks the file."""
    clips, problems = [], []
    for row in read_table(path, ("filename",)):
        filename, label = row["filename"], row.get("scene_label")
        clip = meta.get(filename) or parse_name(root, filename)
        if clip is None:
            where = "is not in meta.csv and has" if meta else "has"
            problems.append(f"{filename} {where} no name like <scene>-<city>-<place>-<recording>-<part>-<device>.wav")
        elif label is not None and label != clip.label:
            source = "meta.csv" if filename in meta else "its name"
            problems.append(f"{filename} is {label!r} here and {clip.label!r} by {source}")
        else:
            clips.append(clip)
    if problems:
        raise DataError(join_problems(f"{path}: {len(problems)} rows cannot be used:", problems))
    return clips


def _remaining_clips(root: Path, meta: dict[str, Clip], test: list[Clip]) -> list[Clip]:
    """Every development clip that the test part leaves: other places than its own, and no device kept unseen."""
    places = {clip.group for clip in test}
    clips = meta.values() or filter(None, (parse_name(root, name) for name in audio_on_disk(root)))
    return [clip for clip in clips if clip.group not in places and clip.device not in UNSEEN_DEVICES]


def _require_apart(train: list[Clip], test: list[Clip]) -> None:
    """DataError for a file in both lists; a warning for a recording place in both, which flatters the accuracy."""
    tested = {clip.clip_id for clip in test}
    if both := sorted(clip.clip_id for clip in train if clip.clip_id in tested):
        raise DataError(
            f"{len(both)} files are in the training list and in the test list, first {both[0]}; "
            f"wanted two lists without a common file: check data.train_split and data.test_split"
        )
    places = {clip.group for clip in test}
    if shared := places & {clip.group for clip in train}:
        _logger.warning(
            "%d of %d recording places of the test list are in the training list too (first %s): "
            "test accuracy will be too high",
            *(len(shared), len(places), min(shared)),
        )
