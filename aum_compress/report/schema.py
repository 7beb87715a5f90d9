"""What `report.json` holds: the one source of all figures in every form of the report. Torch-free.

Accuracies are in percent, losses in nats; a figure that was not finite is None.
"""

from typing import Any, Literal, NotRequired

# typing's own TypedDict is checked by pydantic only from Python 3.12 on
from typing_extensions import TypedDict

REPORT_SCHEMA = 1


class Scores(TypedDict):
    """One model on the test part; `accuracy`, `by_device`, `seen` and `unseen` are means over classes."""

    clips: int
    clips_sha256: NotRequired[str]
    """Of their ids, labels and audio: equal where models were tested on the same; older reports lack it."""
    accuracy: float
    overall_accuracy: float
    log_loss: float | None
    ece: NotRequired[float | None]
    """Expected calibration error, percent."""
    by_class: dict[str, float]
    confusion: NotRequired[list[list[int]]]
    """Row the true class, column the answer; in the order of the data's labels."""
    by_device: NotRequired[dict[str, float]]
    seen: NotRequired[float]
    unseen: NotRequired[float]
    by_device_group: NotRequired[dict[str, float]]
    """real, simulated, unseen, as DCASE Task 1 has them."""


class RoadStep(TypedDict):
    """One model on the way from teacher to shipped file. `macs` is for one second of audio."""

    stage: str
    title: str
    measured_with: str
    """torch or onnxruntime"""
    file: str | None
    file_bytes: int | None
    precision: str
    params: int
    param_bytes: int
    macs: int
    latency_ms: NotRequired[float | None]
    """For one clip on one core: of a file measured, else estimated from the configuration (docs/budgets.md)."""
    latency_is: NotRequired[Literal["measured", "estimated"] | None]
    within_budget: bool
    validation_accuracy: float | None
    test: Scores


class DataSummary(TypedDict):
    """Clips of each part; devices are empty where recordings name none."""

    kind: str
    labels: list[str]
    clip_seconds: float
    train: int
    validation: int
    test: int
    seen_devices: list[str]
    unseen_devices: list[str]


class Input(TypedDict):
    """`InputSpec.model_dump()`"""

    front_end: dict[str, Any]
    clip_seconds: float
    mean: float
    std: float


class Limits(TypedDict):
    max_param_bytes: int
    max_macs: int


class Layer(TypedDict):
    """`macs` and `elementwise` are for one clip."""

    name: str
    kind: str
    params: int
    param_bytes: int
    macs: int
    elementwise: dict[str, int]


class Budget(TypedDict):
    """`BudgetReport.to_dict()`"""

    verdict: Literal["within", "over"]
    param_bytes: int
    params: int
    macs: int
    macs_per_clip: int
    clip_seconds: float
    witnesses: list[str]
    elementwise: dict[str, int]
    dcase_bytes: int | None
    dcase_macs: int | None
    front_end_macs: int | None
    limits: Limits
    notes: list[str]
    layers: list[Layer]


class FileCheck(TypedDict):
    """One check of a file; figures are None where nothing was compared by value."""

    name: str
    passed: bool
    reason: str
    optimised: bool | None
    n_inputs: int | None
    max_abs_error: float | None
    sqnr_db: float | None
    agreement: float | None


class Verified(TypedDict):
    """`Verification.to_dict()`"""

    file: str
    precision: str
    reference: str
    passed: bool
    max_abs_error: float | None
    checks: list[FileCheck]
    warnings: list[str]


class LayerSignal(TypedDict):
    """One quantised layer against the float model's, on training clips: SQNR in dB, None where nothing was lost."""

    name: str
    weight_sqnr_db: float | None
    output_sqnr_db: float | None
    """Of what it puts out, the errors of all layers before it included."""


class Epoch(TypedDict):
    epoch: int
    train_loss: float | None
    val_loss: float | None
    val_accuracy: float | None


class PruningStep(TypedDict):
    """One pruning step."""

    before: list[int]
    """d_inner of every block."""
    after: list[int]
    kinds: NotRequired[dict[str, tuple[int, int]]]
    """Dimension -> its size before and after, summed over the model; reports of older runs lack this and the rest."""
    param_bytes: NotRequired[tuple[int, int]]
    """At the precision that ships."""
    macs: NotRequired[tuple[int, int]]
    validation_accuracy: NotRequired[float | None]
    """Behind the step's fine-tuning."""


class Search(TypedDict):
    """What a search of precisions found, and on which clips it was judged."""

    param_bytes: int
    accuracy_drop: float
    rolled_back: list[str]
    part: str
    clips: int


class Quantisation(TypedDict):
    layers: dict[str, str]
    """Name of each quantised layer, or input of a scan -> its storage (`models.storage`)."""
    weight_bits: int
    """Of weights whose inputs are integers too."""
    saturating_pairs: int
    """Pairs of such weights whose products can leave 16 bits together (`compress.saturation`)."""
    sqnr_db: float | None
    search: Search | None


class DeviceModel(TypedDict):
    """A device with a model of its own; what it gains is None where the test part has no clips of it."""

    device: str
    training_clips: int
    test_clips: int
    param_bytes: int
    macs: int
    within_budget: bool
    general_accuracy: float | None
    accuracy: float | None
    gain: float | None
    """In percentage points."""
    general_validation_accuracy: float | None
    validation_accuracy: float | None


class DevicePack(TypedDict):
    """A model for each device, and the general one for all others, measured in onnxruntime."""

    pack: str
    """Folder beside that of the report."""
    precision: str
    models: list[DeviceModel]
    test: dict[Literal["pack", "general"], dict[str, Any]]
    """Of all test clips: each by its device's model, and all by the general one."""


class Report(TypedDict):
    """One run of a recipe, to its end or up to some stage."""

    schema_version: int
    recipe: str
    created: str
    seed: int
    versions: dict[str, str]
    data: DataSummary
    input: Input
    road: list[RoadStep]
    """In the order in which the models were made."""
    budget: Budget | None
    """Of the model named in `gated`; None where no model was made."""
    gated: str | None
    """The file that ships; the newest bundle's folder where nothing was exported."""
    verification: dict[str, Verified]
    """By file name; empty where nothing was verified."""
    training: dict[str, list[Epoch]]
    """By training run."""
    pruning: list[PruningStep] | None
    quantisation: NotRequired[Quantisation | None]
    devices: NotRequired[DevicePack | None]
    signal: NotRequired[list[LayerSignal] | None]
    """Of the quantised model; None where nothing was quantised."""
    machine: NotRequired[str]
    """On which latencies were measured."""
    next: str
    """The command to try now; empty where there is none."""
