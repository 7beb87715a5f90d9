"""A data set's parts written down as split files, tab-separated as TAU's own."""

import csv
from pathlib import Path

from aum_compress.data.clips import DataIndex


def write_split(index: DataIndex, folder: Path) -> list[tuple[Path, int]]:
    """Writes train.csv, validation.csv and test.csv (filename, scene_label); returns each path with its count."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for part in ("train", "validation", "test"):
        clips = getattr(index, part)
        path = folder / f"{part}.csv"
        with path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle, delimiter="\t", lineterminator="\n")
            writer.writerow(("filename", "scene_label"))
            writer.writerows((clip.clip_id, clip.label) for clip in clips)
        written.append((path, len(clips)))
    return written
