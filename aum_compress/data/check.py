"""`data check`: reads every file of a data set, says which cannot be used and why, writes lists of both. Torch-free."""

import csv
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from aum_compress.data.clips import Clip
from aum_compress.data.examine import BadFile, GoodFile, Progress, examine_files
from aum_compress.data.folders import audio_files, shortest_folder_seconds, windows
from aum_compress.data.tau import audio_on_disk, listed_files, parse_name, read_meta, shortest_tau_seconds
from aum_compress.errors import DataError


@dataclass(frozen=True)
class CheckReport:
    """What `check_data` found, files in the order of their names."""

    root: Path
    good: tuple[tuple[Clip, GoodFile], ...]
    """Usable files; the clip stands for the whole file."""
    bad: tuple[BadFile, ...]

    def summary(self) -> dict[str, int | float | dict[str, int]]:
        """Counts for a table or JSON: usable files by class and device, rejected files by reason."""
        return {
            "files": len(self.good) + len(self.bad),
            "usable": len(self.good),
            "rejected": len(self.bad),
            "usable_hours": round(sum(file.seconds for _, file in self.good) / 3600, 3),
            "by_class": _counts(clip.label for clip, _ in self.good),
            "by_device": _counts(clip.device for clip, _ in self.good if clip.device),
            "by_sample_rate_hz": _counts(str(file.sample_rate_hz) for _, file in self.good),
            "by_reason": _counts(file.reason for file in self.bad),
        }


def check_data(
    root: Path,
    *,
    sample_rate_hz: int | None = None,
    clip_seconds: float = 1.0,
    progress: Progress | None = None,
) -> CheckReport:
    """Read every file of a TAU tree (a root with a folder `audio` or a `meta.csv`) or of class folders.

    A file of another rate than `sample_rate_hz` is rejected. Without that argument a TAU tree is held to its commonest
    rate, and class folders may mix rates. A TAU file has to be as long as a clip, a file in a class folder at least a
    tenth of it.

    Raises DataError for a root that is neither, and for a meta.csv or split file that cannot be read.
    """
    root = root.expanduser()
    is_tau = (root / "audio").is_dir() or (root / "meta.csv").is_file()
    if is_tau:
        files, bad = _tau_files(root)
    else:
        files, bad = _folder_files(root), []
    shortest = shortest_tau_seconds(clip_seconds) if is_tau else shortest_folder_seconds(clip_seconds)
    parts = [part for clip in files.values() for part in windows(clip, clip_seconds)]
    examined, unusable = examine_files(parts, clip_seconds, shortest, progress=progress)
    bad += unusable
    if is_tau and sample_rate_hz is None and examined:
        sample_rate_hz = Counter(file.sample_rate_hz for file in examined).most_common(1)[0][0]
    good = []
    for file in examined:
        if sample_rate_hz in (None, file.sample_rate_hz):
            good.append((files[file.filename], file))
        else:
            detail = f"{file.sample_rate_hz} Hz, wanted {sample_rate_hz} Hz"
            bad.append(BadFile(file.filename, "wrong_rate", detail))
    return CheckReport(root, tuple(good), tuple(sorted(bad, key=lambda file: file.filename)))


def write_reports(report: CheckReport, folder: Path) -> tuple[Path, Path]:
    """Write `meta_clean.csv`, the usable files in the format of TAU's meta.csv, and `rejected.csv` with the reasons.

    Both are tab-separated. Returns their paths; raises DataError when the folder cannot be written to.
    """
    clean, rejected = folder / "meta_clean.csv", folder / "rejected.csv"
    kept = ((clip.clip_id, clip.label, clip.group, clip.device) for clip, _ in report.good)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_table(clean, ("filename", "scene_label", "identifier", "source_label"), kept)
        reasons = ((file.filename, file.reason, file.detail) for file in report.bad)
        _write_table(rejected, ("filename", "reason", "detail"), reasons)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot write the lists there: {error.strerror or error}; name another folder"
        ) from error
    return clean, rejected


def _tau_files(root: Path) -> tuple[dict[str, Clip], list[BadFile]]:
    """Files that are listed anywhere or lie on disk, by name, but for those that the meta data does not cover."""
    meta = read_meta(root)
    on_disk = set(audio_on_disk(root))
    files, bad = {}, []
    for name in sorted(meta.keys() | on_disk | listed_files(root)):
        clip = meta.get(name) or parse_name(root, name)
        if clip is None:
            detail = "no name like <scene>-<city>-<place>-<recording>-<part>-<device>.wav, and no row in meta.csv"
            bad.append(BadFile(name, "unknown_name", detail))
        elif meta and name in on_disk and name not in meta:
            bad.append(BadFile(name, "absent_in_meta", f"{clip.path} has no row in meta.csv"))
        else:
            files[name] = clip
    return files, bad


def _folder_files(root: Path) -> dict[str, Clip]:
    files = {}
    for label, paths in audio_files(root).items():
        for path in paths:
            name = path.relative_to(root).as_posix()
            files[name] = Clip(clip_id=name, path=path, label=label, device="", group=name)
    return files


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _write_table(path: Path, header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
