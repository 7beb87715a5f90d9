"""Class folders: one folder a class, audio files of any rate, channel count and length below it, cut into windows."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from aum_compress.audio.reading import AUDIO_SUFFIXES, audio_info
from aum_compress.data.clips import Clip, DataIndex
from aum_compress.data.config import FolderData
from aum_compress.data.splitting import read_table, take_groups
from aum_compress.errors import DataError, join_problems


def audio_files(root: Path) -> dict[str, list[Path]]:
    """Audio files by class, each class sorted; hidden files and folders are not looked at.

    Raises DataError for a root without class folders, or with one that holds no audio.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; data.root wants a folder with one folder a class in it")
    classes = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        classes[folder.name] = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in AUDIO_SUFFIXES
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
            and path.is_file()
        )
    kinds = ", ".join(sorted(AUDIO_SUFFIXES))
    if not classes:
        raise DataError(f"{root}: no folders in it; wanted one folder a class with {kinds} files in each")
    if empty := [name for name, files in classes.items() if not files]:
        raise DataError(
            join_problems(f"{root}: class folders without a {kinds} file; fill them or move them away:", empty)
        )
    return classes


def load_folders(config: FolderData, seed: int) -> DataIndex:
    """Index of the windows of all files, cut into parts so that a file and its group stay on one side.

    A window is `clip_seconds` long; windows follow each other without overlap. What remains at the end of a file is
    dropped, unless it is the file's only window: that one is padded with silence where the audio is read, as a device
    would hear it. A file whose header cannot be read counts as one window, so that reading it reports it together with
    all other bad files.
    """
    root = config.root.expanduser()
    groups, folds = _read_groups(root, config)
    by_part: dict[bool, list[Clip]] = {False: [], True: []}
    unlisted = []
    for label, paths in audio_files(root).items():
        for path in paths:
            name = path.relative_to(root).as_posix()
            if config.groups_csv is not None and name not in groups:
                unlisted.append(name)
                continue
            clip = Clip(clip_id=name, path=path, label=label, device="", group=groups.get(name, name))
            by_part[folds.get(name) in config.test_folds].extend(windows(clip, config.clip_seconds))
    if unlisted:
        raise DataError(join_problems(f"{config.groups_csv}: lacks {len(unlisted)} of the files in {root}:", unlisted))

    rest, test = by_part[False], by_part[True]
    if not config.test_folds:
        rest, test = take_groups(rest, config.test_fraction, seed, "test")
    elif shared := {clip.group for clip in rest} & {clip.group for clip in test}:
        raise DataError(
            f"{config.groups_csv}: {len(shared)} groups lie in a test fold and in another one, first {min(shared)}; "
            f"wanted each group in one fold"
        )
    labels = tuple(sorted({clip.label for clip in rest + test}))
    # the share is of the training clips, so it does not depend on the size of the test part
    train, validation = take_groups(rest, config.validation_fraction, seed, "validation")
    return DataIndex(
        root=root,
        labels=labels,
        clip_seconds=config.clip_seconds,
        train=tuple(train),
        validation=tuple(validation),
        test=tuple(test),
        shortest_seconds=shortest_folder_seconds(config.clip_seconds),
    ).validate()


def shortest_folder_seconds(clip_seconds: float) -> float:
    """A file with less than a tenth of a window says next to nothing: padding would make silence of it."""
    return 0.1 * clip_seconds


def windows(clip: Clip, clip_seconds: float) -> list[Clip]:
    """The whole windows of the clip's file; one where it is shorter, or where its header cannot be read."""
    try:
        seconds = audio_info(clip.path).seconds
    except DataError:
        seconds = 0.0
    # a hair of tolerance, so that 0.1 s windows of a 1 s file are ten
    count = max(1, int(seconds / clip_seconds + 1e-6))
    return [
        replace(
            clip,
            clip_id=f"{clip.clip_id}#{k}",
            start_seconds=k * clip_seconds,
            follows=f"{clip.clip_id}#{k - 1}" if k else "",
        )
        for k in range(count)
    ]


def _read_groups(root: Path, config: FolderData) -> tuple[dict[str, str], dict[str, str]]:
    """Group and fold of each file; both empty without a csv."""
    if config.groups_csv is None:
        return {}, {}
    path = config.groups_csv.expanduser()
    if not path.is_file() and (root / path).is_file():
        path = root / path
    rows = read_table(path, ("file", "fold") if config.test_folds else ("file",), delimiters=",\t;")
    if "group" not in rows[0] and "fold" not in rows[0]:
        raise DataError(f"{path}: columns {', '.join(rows[0])}; wanted `file` with `group`, `fold` or both")
    seen = defaultdict(int)
    for row in rows:
        seen[row["file"]] += 1
    if twice := sorted(name for name, times in seen.items() if times > 1):
        raise DataError(join_problems(f"{path}: files that are listed more than once:", twice))
    folds = {row["file"]: row["fold"] for row in rows if "fold" in row}
    if missing := sorted(set(config.test_folds) - set(folds.values())):
        raise DataError(
            f"{path}: no file in fold {', '.join(missing)} (data.test_folds); folds found: "
            f"{', '.join(sorted(set(folds.values())))}"
        )
    return {row["file"]: row.get("group", row["file"]) for row in rows}, folds
