"""Small audio trees with real names, for tests: a TAU mobile one, and class folders."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import soundfile

TAU_RATE_HZ = 44_100
SECONDS = 0.1
"""Length of a clip; real ones last 1 s."""
SCENES = ("airport", "metro_station", "street_traffic")
META_COLUMNS = ("filename", "scene_label", "identifier", "source_label")


def noise(seed: int, seconds: float = SECONDS, rate: int = TAU_RATE_HZ, channels: int = 1) -> np.ndarray:
    """(S,) or (S, channels) noise at -30 dBFS, another one for each seed."""
    shape = (round(seconds * rate), channels) if channels > 1 else (round(seconds * rate),)
    return 0.03 * np.random.default_rng(seed).standard_normal(shape)


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]], delimiter: str = "\t") -> None:
    """A table with a header, its folder made where needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


def tau_names(scenes: Sequence[str] = SCENES) -> tuple[list[str], list[str]]:
    """Training and test names: 6 places and device a, b, s1 a scene; 2 other places and device a, s1, s4."""

    def names(cities: Sequence[str], places: range, devices: Sequence[str]) -> list[str]:
        return [
            f"audio/{scene}-{city}-{1000 + 10 * number + place}-{40000 + place}-{part}-{device}.wav"
            for number, scene in enumerate(scenes)
            for city in cities
            for place in places
            for part, device in enumerate(devices)
        ]

    return names(("lisbon", "milan"), range(3), ("a", "a", "b", "s1")), names(("lyon",), range(3, 5), ("a", "s1", "s4"))


def meta_row(name: str) -> tuple[str, str, str, str]:
    """The row of meta.csv for a TAU name."""
    scene, city, place, _, _, device = Path(name).stem.split("-")
    return name, scene, f"{city}-{place}", device


def write_tau_tree(root: Path, *, meta: bool = True, lists: str = "evaluation_setup", seconds: float = SECONDS) -> Path:
    """A tree of 72 training and 18 test files (24-bit mono wav at 44.1 kHz), with split25.csv and test.csv."""
    train, test = tau_names()
    (root / "audio").mkdir(parents=True)
    for seed, name in enumerate(train + test):
        soundfile.write(root / name, noise(seed, seconds), TAU_RATE_HZ, subtype="PCM_24")
    write_table(root / lists / "split25.csv", META_COLUMNS[:2], [meta_row(name)[:2] for name in train])
    write_table(root / lists / "test.csv", META_COLUMNS[:2], [meta_row(name)[:2] for name in test])
    if meta:
        write_table(root / "meta.csv", META_COLUMNS, [meta_row(name) for name in train + test])
    return root


def write_class_folders(root: Path, classes: Sequence[str] = ("bark", "rain"), files: int = 10) -> Path:
    """Folders of wav files (8 kHz mono), 0.35 s each: three windows of 0.1 s and a rest."""
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for k in range(files):
            soundfile.write(root / name / f"{k}.wav", noise(100 * number + k, 0.35, 8000), 8000)
    return root
