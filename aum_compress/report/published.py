"""Published systems of DCASE Task 1 as points of reference, where a model was tested on the same data. Torch-free.

Only systems whose accuracy, bytes and MACs are all known; MACs as DCASE's script prints them, which for these
convolutional networks is what they are.
"""

from dataclasses import dataclass
from typing import Literal

TAU_SCENES = frozenset(
    (
        *("airport", "bus", "metro", "metro_station", "park", "public_square", "shopping_mall"),
        *("street_pedestrian", "street_traffic", "tram"),
    )
)


@dataclass(frozen=True)
class PublishedSystem:
    name: str
    accuracy: float
    """Macro, percent."""
    tested_on: Literal["development test", "evaluation"]
    """The evaluation set's labels are not public; both sets lie within a point of each other for the baseline."""
    param_bytes: int
    macs: int
    source: str


PUBLISHED = (
    PublishedSystem(
        *("SNTL-NTU 2025, CNN-GRU", 60.35, "development test", 116_342, 10_902_300),
        "arXiv 2509.09931; joesephgit/DCASE2025",
    ),
    PublishedSystem(
        *("AITHU-SJTU 2025, pruned c64", 59.06, "development test", 127_496, 29_982_132),
        "EOPhoeny/dcase2025_task1_inference",
    ),
    PublishedSystem(
        *("AITHU-SJTU 2025, pruned c96", 58.97, "development test", 126_430, 29_221_122),
        "EOPhoeny/dcase2025_task1_inference",
    ),
    PublishedSystem(
        *("SEOULTECH 2025, a model a device", 57.93, "development test", 122_296, 26_059_412), "arXiv 2509.09262"
    ),
    PublishedSystem(
        *("baseline 2025, a model a device", 51.89, "development test", 122_296, 29_419_156),
        "CPJKU/dcase2025_task1_baseline",
    ),
    PublishedSystem(
        *("baseline 2025, one model", 50.72, "development test", 122_296, 29_419_156),
        "CPJKU/dcase2025_task1_baseline",
    ),
    PublishedSystem(
        *("JKU 2025, winner, a model a device", 61.47, "evaluation", 122_296, 29_419_156),
        "official ranking of DCASE 2025 Task 1",
    ),
    PublishedSystem(
        *("XJTLU 2025, TF-SepNet-64 in int8", 55.52, "evaluation", 125_524, 29_419_648),
        "official ranking; Azhou0/dcase2025t1",
    ),
)


def published_for(kind: str, labels: list[str]) -> tuple[PublishedSystem, ...]:
    """Those that were tested on this data set: TAU's ten scenes, and not soundscapes that bear their names."""
    return PUBLISHED if kind == "tau" and set(labels) == TAU_SCENES else ()
