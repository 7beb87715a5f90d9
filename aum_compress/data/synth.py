"""Synthetic soundscapes, the embedded data set: ten scenes, nine devices, the layout of TAU 2022 mobile. numpy only.

    root/audio/<scene>-<city>-<place>-<recording>-<part>-<device>.wav       44.1 kHz, mono, 16 bits
    root/meta.csv                                filename, scene_label, identifier, source_label      tab-separated
    root/evaluation_setup/fold1_train.csv, fold1_evaluate.csv     filename, scene_label               tab-separated
    root/evaluation_setup/fold1_test.csv                          filename

Test places are no training places, and devices s4 to s6 are heard in the test part alone, as in TAU.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from aum_compress.data.synth_devices import DEVICES, record
from aum_compress.data.synth_scenes import EVENT_RATE_HZ, SAMPLE_RATE_HZ, SCENES, Place, make_place, soundscape
from aum_compress.errors import DataError

_PARTS_PER_RECORDING = 10
_SHORTEST_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class _Part:
    """Training or test: which places, and who records there."""

    places: tuple[tuple[str, int], ...]
    """City and number within the scene."""
    devices: tuple[str, ...]
    """Taken in turn. As their number shares no divisor with the number of places + 1, each place meets all of them."""


# As in TAU, one device made most training recordings and all made equally many test recordings.
_TRAIN = _Part(
    places=tuple((city, place) for place in (0, 1) for city in ("arden", "brevik", "calder", "dunmore")),
    devices=("a", "b", "a", "s1", "a", "c", "a", "s2", "a", "s3"),
)
_TEST = _Part(
    places=tuple((city, 2) for city in ("arden", "brevik", "calder", "elstow")),
    devices=tuple(DEVICES),
)


def write_soundscapes(
    root: Path,
    *,
    seed: int,
    train_clips_per_class: int,
    test_clips_per_class: int,
    clip_seconds: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the data set below `root`, a folder that is absent or empty; when that fails, it is left empty.

    The same arguments give the same bytes: each clip has a random stream of its own, keyed by seed, place and turn, so
    a larger set holds the clips of a smaller one. (Another build of numpy may round some sample the other way.) About
    6 ms a clip. `progress` is called with the clips written and their total.

    Raises DataError for a root that holds something or cannot be written to, for counts below 1, for a negative seed,
    and for clips that are no finite length from 0.1 s up.
    """
    wanted = {
        "seed": (seed, 0),
        "train_clips_per_class": (train_clips_per_class, 1),
        "test_clips_per_class": (test_clips_per_class, 1),
        "clip_seconds": (clip_seconds, _SHORTEST_SECONDS),
    }
    for name, (found, least) in wanted.items():
        if not least <= found < math.inf:
            raise DataError(f"synthetic soundscapes: data.{name} is {found}, wanted a number from {least} up")
    try:
        root.mkdir(parents=True, exist_ok=True)
        held = next(root.iterdir(), None)
    except OSError as error:
        raise DataError(
            f"{root}: cannot hold soundscapes ({error.strerror}); name a folder that can be written"
        ) from error
    if held is not None:
        raise DataError(
            f"{root}: holds {held.name} already; soundscapes want an empty folder: name another or empty this one"
        )
    counts = {"train": train_clips_per_class, "evaluate": test_clips_per_class}
    try:
        _write_tree(root, seed, counts, 2 * round(clip_seconds * EVENT_RATE_HZ), progress)
    except BaseException as error:  # Ctrl-C too
        for folder in ("audio", "evaluation_setup"):
            shutil.rmtree(root / folder, ignore_errors=True)
        (root / "meta.csv").unlink(missing_ok=True)
        if isinstance(error, OSError | soundfile.SoundFileError):
            raise DataError(
                f"{root}: soundscapes could not be written ({error}); see to its permissions and the space on its disk"
            ) from error
        raise


def _write_tree(
    root: Path, seed: int, counts: dict[str, int], n_samples: int, progress: Callable[[int, int], None] | None
) -> None:
    (root / "audio").mkdir()
    (root / "evaluation_setup").mkdir()
    total, done = len(SCENES) * sum(counts.values()), 0
    rows: dict[str, list[tuple[str, str, str, str]]] = {"train": [], "evaluate": []}
    for part_name, part, first_place in (("train", _TRAIN, 0), ("evaluate", _TEST, len(_TRAIN.places))):
        for filename, place, device, samples in _clips(part, first_place, seed, counts[part_name], n_samples):
            pcm = np.round(samples * 32767).astype(np.int16)
            soundfile.write(root / filename, pcm, SAMPLE_RATE_HZ, subtype="PCM_16")
            rows[part_name].append((filename, place.scene, place.identifier, device))
            done += 1
            if progress is not None:
                progress(done, total)
    columns = ("filename", "scene_label", "identifier", "source_label")
    _write_table(root / "evaluation_setup" / "fold1_train.csv", columns[:2], [row[:2] for row in rows["train"]])
    _write_table(root / "evaluation_setup" / "fold1_evaluate.csv", columns[:2], [row[:2] for row in rows["evaluate"]])
    _write_table(root / "evaluation_setup" / "fold1_test.csv", columns[:1], [row[:1] for row in rows["evaluate"]])
    _write_table(root / "meta.csv", columns, rows["train"] + rows["evaluate"])


def _clips(
    part: _Part, first_place: int, seed: int, count: int, n_samples: int
) -> Iterator[tuple[str, Place, str, np.ndarray]]:
    """File name, place, device and samples (S,) of `count` clips of each scene, place by place."""
    for scene_index, scene in enumerate(SCENES):
        for place_index, (city, number) in enumerate(part.places):
            key = (seed, scene_index, first_place + place_index)
            turns = len(range(place_index, count, len(part.places)))  # places are dealt clips in turn
            if turns == 0:
                continue
            # ten numbers a scene, so that no two scenes share a place
            place = make_place(_stream(*key, 0), scene, city, 10 * scene_index + number, n_samples)
            for turn in range(turns):
                device = part.devices[(turn * (len(part.places) + 1) + place_index) % len(part.devices)]
                recording, piece = divmod(turn, _PARTS_PER_RECORDING)
                filename = f"audio/{scene}-{place.identifier}-{recording}-{piece}-{device}.wav"
                rng = _stream(*key, 1 + turn)
                yield filename, place, device, record(rng, device, soundscape(rng, place, n_samples), n_samples)


def _stream(*key: int) -> np.random.Generator:
    # named outright: `default_rng` may stand for another generator one day
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def _write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = ["\t".join(row) for row in (header, *rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
