"""The sections of a recipe, their keys, defaults and checks. Torch-free.

Sections follow the order of the work; a section left out is a stage skipped. Every default stands here, so that the
resolved recipe which a bundle carries says all that was done.
"""

import math
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from aum_compress.audio.config import FrontEnd, LogMelConfig
from aum_compress.data.config import DataConfig
from aum_compress.errors import RecipeError
from aum_compress.models.config import (
    AudioMambaConfig,
    Block,
    BlockType,
    ConvStem,
    CPMobileConfig,
    PatchStem,
    block_type_for_directions,
)
from aum_compress.models.presets import PRESET_FRAMES, PRESET_MELS, PRESETS
from aum_compress.models.storage import WEIGHT_BITS, QuantisedPrecision, WeightStorage
from aum_compress.recipe_checks import CUMULATIVE_SUM, NO_BLOCKS, NO_CUMULATIVE_SUM, misfits
from aum_compress.recipe_train import DeviceTrainConfig, NonNegative, Positive, PositiveFloat, Section, TrainConfig

Preset = Literal[
    "aum-tiny", "aum-small", "aum-base", "student", "student-int8", "student-fp16", "student-edge", "cp-mobile"
]


def _one_folder(name: str) -> str:
    if name.startswith(".") or "/" in name or "\\" in name:
        raise ValueError(f"{name!r} is to name a folder, so it cannot begin with a dot or hold a slash")
    return name


FolderName = Annotated[str, AfterValidator(_one_folder)]


class ModelSection(Section):
    """A preset and what is changed about it. Widths given here hold for every block."""

    preset: Preset
    """Keys that are left out are the preset's."""
    d_model: Positive | None = None
    """Width of a token."""
    depth: Positive | None = None
    """Number of blocks."""
    d_inner: Positive | None = None
    d_state: Positive | None = None
    dt_rank: Positive | None = None
    block_type: BlockType | None = None
    blocks: Annotated[tuple[Block, ...], Field(min_length=1)] | None = None
    """Blocks in full, taken in turn until there are `depth` of them (each once where depth is left out), in place of
    d_inner, d_state, dt_rank and block_type: the only way to name another mixer than mamba, or blocks that differ."""
    stem: Annotated[PatchStem | ConvStem, Field(discriminator="kind")] | None = None
    pool: Literal["class_token", "mean"] | None = None
    position: Literal["absolute", "factorised", "rope", "none"] | None = None
    head: Literal["linear", "mlp", "batch_norm"] | None = None
    mean_subtraction: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of each mel bin's mean over the clip that is taken off first: of the microphone, and of steady sound."""

    _reads_directions = model_validator(mode="before")(block_type_for_directions)

    @model_validator(mode="after")
    def _cp_mobile_is_fixed(self) -> "ModelSection":
        own = type(self).model_fields.keys() - {"preset", "train"}
        changed = [key for key in type(self).model_fields if key in own and getattr(self, key) is not None]
        if self.preset == "cp-mobile" and changed:
            raise ValueError(f"cp-mobile is the reference network as published: {', '.join(changed)} cannot be changed")
        train = getattr(self, "train", None)
        if self.preset == "cp-mobile" and train and train.activation_checkpointing:
            raise ValueError(NO_BLOCKS)
        return self

    @model_validator(mode="after")
    def _blocks_are_named_once(self) -> "ModelSection":
        keys = ("d_inner", "d_state", "dt_rank", "block_type", "checkpoint")
        both = [key for key in keys if getattr(self, key, None) is not None]
        if self.blocks is not None and both:
            raise ValueError(f"blocks: say all about the blocks; leave out {', '.join(both)}")
        return self

    def resolve(self, n_mels: int, n_frames: int, n_classes: int) -> AudioMambaConfig | CPMobileConfig:
        """The full configuration for (F,T) features and C classes.

        Raises:
            RecipeError: the stem leaves no token of such features.
        """
        try:
            if self.preset == "cp-mobile":
                return CPMobileConfig(n_mels=n_mels, n_frames=n_frames, n_classes=n_classes)
            # the preset's own stem may not fit these features, and another one be given
            base = PRESETS[self.preset](PRESET_MELS, PRESET_FRAMES, n_classes)
            d_model = self.d_model or base.d_model
            named = self.blocks or tuple(self._changed(block, base.d_model, d_model) for block in base.blocks)
            blocks = tuple(islice(cycle(named), self.depth or len(named)))
            changes = {"n_mels": n_mels, "n_frames": n_frames, "d_model": d_model, "blocks": blocks}
            for key in ("stem", "pool", "position", "head", "mean_subtraction"):
                if (value := getattr(self, key)) is not None:
                    changes[key] = value
            return AudioMambaConfig.model_validate(dict(base) | changes)
        except ValidationError as error:
            raise RecipeError(f"preset {self.preset}: {'; '.join(e['msg'] for e in error.errors())}") from None

    def _changed(self, block: Block, old_d_model: int, d_model: int) -> Block:
        """A block of the preset with the section's widths; those left out keep their proportion to d_model."""
        keys = ("d_inner", "d_state", "dt_rank", "block_type")
        changes = {key: value for key in keys if (value := getattr(self, key)) is not None}
        if foreign := changes.keys() - type(block).model_fields:
            raise RecipeError(f"preset {self.preset}: its {block.mixer} blocks have no {', '.join(sorted(foreign))}")
        if d_model != old_d_model:
            changes.setdefault("d_inner", round(block.d_inner * d_model / old_d_model))
            if block.mixer == "mamba":
                changes.setdefault("dt_rank", math.ceil(d_model / 16))
        return type(block).model_validate(dict(block) | changes)


class TrainedModelSection(ModelSection):
    """A model and the training with labels alone that makes it."""

    checkpoint: Path | None = None
    """Published weights of AuM or Vim to start from; without `block_type`, the checkpoint's own blocks are built."""
    train: TrainConfig


class StudentSection(ModelSection):
    """The small model. Without `train` it is not trained on labels alone first: distillation starts it afresh."""

    preset: Preset = "student"
    train: TrainConfig | None = None


class DistillSection(Section):
    """loss = lambda * CE(labels) + (1 - lambda) * T^2 * KL(teacher || student), both softened by T.

    Teacher logits are computed once, for the clips as they are and for their other views (`train.views`), and kept by
    clip, checksum and view; several teachers' logits are averaged.
    """

    teachers: Annotated[tuple[str, ...], Field(min_length=1)] = ("teacher",)
    """`teacher` and `reference` are this recipe's stages; anything else is the path of a bundle, or of a file of logits
    (`.npz`, docs/distillation.md)."""
    label_weight: Annotated[float, Field(alias="lambda", ge=0, le=1)] = 0.17
    """Written `lambda` in the recipe. 0.17 with `batchmean` weighs as CP-JKU's 0.02 with `mean` over 10 classes."""
    temperature: PositiveFloat = 2.0
    kl_reduction: Literal["batchmean", "mean"] = "batchmean"
    """`batchmean` sums over classes; `mean` also divides by their number, as CP-JKU's code does."""
    feature_weight: NonNegative = 0.0
    """Of a further term, 1 - cosine(projected student embedding, teachers' embeddings); falls linearly to 0."""
    feature_anneal: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the epochs after which that weight is 0."""
    train: TrainConfig


Prunable = Literal["d_inner", "d_model", "d_state", "dt_rank", "directions", "blocks", "stem"]


class PruneSection(Section):
    """Structured pruning, members removed from the tensors, with fine-tuning after each step (docs/pruning.md)."""

    to_budget: bool = False
    """Down to the limits of `budget` at the precision that will ship; `ratio` has no part in it then."""
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of each of `dimensions` to remove, ranked over all blocks together. 0.25 when left out."""
    dimensions: Annotated[tuple[Prunable, ...], Field(min_length=1)] = ()
    """What may give way. When left out, d_inner by ratio, and everything to the budget."""
    start: Literal["student", "teacher"] = "student"
    """What is pruned. From the teacher, there is no student section, and the teacher itself teaches."""
    steps: Positive | None = None
    """When left out, 1 by ratio; to the budget, so many that none has to come down to less than 70 %."""
    importance: Literal["taylor", "activation", "magnitude"] = "taylor"
    importance_clips: Positive = 256
    """Training clips that importance and losses are measured on."""
    round_to: Positive = 8
    """Widths are kept multiples of this."""
    max_block_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """No dimension of any block or stage loses more than this share, nor the model more of its blocks."""
    finetune: TrainConfig
    """Training after each step, with the loss of `distill` where the recipe has that section."""
    last_epochs: Positive | None = None
    """Of the fine-tuning after the last step, where it is to be another number than `finetune.epochs`."""

    @model_validator(mode="before")
    @classmethod
    def _resolves_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("to_budget") in (True, "true"):
            return {"dimensions": get_args(Prunable)} | values
        return {"ratio": 0.25, "dimensions": ("d_inner",), "steps": 1} | values

    @model_validator(mode="after")
    def _one_aim(self) -> "PruneSection":
        if self.to_budget and self.ratio is not None:
            raise ValueError("ratio: has no part in pruning to the budget; leave it out")
        if self.ratio is not None and self.ratio > self.max_block_ratio:
            raise ValueError(
                f"ratio: {self.ratio:g} is above max_block_ratio, {self.max_block_ratio:g}: raise that one"
            )
        if len(set(self.dimensions)) < len(self.dimensions):
            raise ValueError(f"dimensions: {', '.join(self.dimensions)}: each is named once")
        return self


class SearchConfig(Section):
    """Of all mixtures of `candidates`, the fewest bytes for a stated loss of accuracy, or the least loss for stated
    bytes. Judged on validation clips, or where there are none on training clips that calibrate nothing."""

    max_drop: NonNegative | None = None
    """Largest loss of macro accuracy against float32, in percentage points."""
    max_param_bytes: Positive | None = None
    """Of the whole model, scales and zero points included."""
    candidates: Annotated[tuple[WeightStorage | Literal["fp16"], ...], Field(min_length=2)] = (
        "fp16",
        "int8",
        "int4-weight",
    )
    """What a layer may be stored as; the search starts from the first."""
    clips: Positive = 512
    """To judge on."""

    @model_validator(mode="after")
    def _one_aim(self) -> "SearchConfig":
        if (self.max_drop is None) == (self.max_param_bytes is None):
            raise ValueError("search: wanted one of max_drop and max_param_bytes; the other is what is searched for")
        return self


class QuantizeSection(Section):
    """Which tensor is stored how, and what sets the ranges. What is no matrix and no convolution (A, D, biases, norms)
    is stored as float16; the scan and its state run in float32. docs/quantisation.md says why."""

    weights: WeightStorage = "int8"
    """Of every matrix and convolution that is smaller so than as float16: one of at most 4 weights an output is not (2
    with int4-weight). `int8`: with uint8 inputs; `int8-weight`, `int4-weight`: float32 inputs."""
    layers: dict[str, WeightStorage | Literal["fp16"]] = Field(default_factory=dict)
    """Name of a layer, or the beginning of one -> its own storage; the longest that fits decides."""
    keep_float: tuple[str, ...] = ()
    """Names (or beginnings of names) of layers that stay float16."""
    weight_bits: Literal[7, 8] = 7
    """Of weights whose inputs are integers too. 7 keeps the products within 16 bits, where x86 CPUs without VNNI would
    saturate silently."""
    scan_inputs: tuple[Literal["u", "B", "C", "delta"], ...] = ("u", "B", "C")
    """What is rounded to uint8 before it enters a Mamba-1 scan, each with a scale of its own; `delta` before softplus.
    Only where the layer that makes it has integer inputs."""
    smoothing: Annotated[float, Field(ge=0, le=1)] = 0.5
    """How much of the spread of out_proj's input channels its weights take over (SmoothQuant's alpha); 0 is none."""
    calibration_clips: Positive = 256
    """Training clips that set the ranges of the layers' inputs."""
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    """Of each layer's input values that the range has to cover, either way."""
    scan_percentile: Annotated[float, Field(gt=50, le=100)] = 99.95
    """The same for `u`, whose outliers the scan would otherwise pay for in steps."""

    search: SearchConfig | None = None
    """Chooses the storage of each layer that neither `layers` nor `keep_float` names."""
    train: TrainConfig | None = None
    """Quantisation-aware training, from the calibrated model on, with the loss of `distill` where the recipe has that
    section. Batch normalisation is folded before it."""
    frozen_epochs: Annotated[int, Field(ge=0)] | None = None
    """Epochs at the end of that training in which ranges stay as they are; a fifth of them when left out."""

    @property
    def precision(self) -> QuantisedPrecision:
        """What the model that comes out is called: after its quantised weights, where they have one width."""
        if self.search:
            return "mixed"
        bits = {WEIGHT_BITS[storage] for storage in (self.weights, *self.layers.values()) if storage != "fp16"}
        return {(8,): "int8", (4,): "int4"}.get(tuple(bits), "mixed")

    @model_validator(mode="after")
    def _ranges_move(self) -> "QuantizeSection":
        if self.train is not None and self.frozen_epochs is not None and self.frozen_epochs >= self.train.epochs:
            raise ValueError(
                f"frozen_epochs: {self.frozen_epochs} of {self.train.epochs} epochs, in which no range would move; "
                "wanted fewer, or leave it out"
            )
        return self

    @property
    def last_epochs(self) -> int:
        """Those of `train` in which ranges stay as they are."""
        return self.train.epochs // 5 if self.frozen_epochs is None else self.frozen_epochs


class DevicesSection(Section):
    """The student fine-tuned for each recording device of training, from its last float model, and quantised again.

    With the loss of `distill` where the recipe has that section.
    """

    names: tuple[str, ...] = ()
    """Devices to make a model for; all of training when left out. Every other device has the general model."""
    finetune: DeviceTrainConfig = DeviceTrainConfig()


class BudgetSection(Section):
    """Limits of what ships; a model over one of them ends the run with exit code 3, before export."""

    max_param_bytes: Positive = 128_000
    max_macs: Positive = 30_000_000
    """For one second of audio."""


class ExportSection(Section):
    """ONNX files, to exports/<name>/."""

    precisions: Annotated[tuple[Literal["fp32", "fp16", QuantisedPrecision], ...], Field(min_length=1)] = (
        "fp32",
        "fp16",
        "int8",
    )
    """One file each; the smallest is the one that the budget is about. A quantised one is called after what `quantize`
    makes: int8, int4 or mixed."""
    waveform: bool = True
    """Beside each file that reads features, one that reads samples and has the front-end inside."""
    input_rate_hz: Annotated[int, Field(gt=0)] | None = None
    """Of the samples that those files read, and resample; the front-end's own rate when left out."""
    dynamic_batch: bool = False
    """Any number of clips at once, in place of one."""
    ort: bool = False
    """Each file in onnxruntime's own format too, with the list of operators for a reduced build of it."""
    scan: Literal["scan", "chunked", "unrolled"] = "scan"
    """How Mamba-1's recurrence is written: as ONNX `Scan`, or without control flow for runtimes that have none."""
    name: FolderName | None = None
    """Folder below exports/; the recipe's name when left out."""

    @field_validator("scan", mode="before")
    @classmethod
    def _is_no_cumulative_sum(cls, form: Any) -> Any:
        if form in CUMULATIVE_SUM:
            raise ValueError(f"{form}: {NO_CUMULATIVE_SUM}")
        return form


class VerifySection(Section):
    """Each file against the model that it was made of, in onnxruntime; what differs ends the run with exit code 4."""

    clips: Annotated[int, Field(ge=0)] = 256
    """Test clips to compare on, beside golden, random, silent and full-scale inputs. From 200 on an int8 file has to
    name the very same class as its model on 99.5 % of them."""


class Recipe(Section):
    """The whole file."""

    name: FolderName = ""
    """Taken from the file's name when left out."""
    seed: Annotated[int, Field(ge=0)] = 0
    threads: Positive | None = None
    """CPU threads; torch's own choice when left out."""
    data: DataConfig
    features: FrontEnd = LogMelConfig()
    reference: TrainedModelSection | None = None
    """A rival, trained and measured on the same data; may also teach."""
    teacher: TrainedModelSection | None = None
    student: StudentSection | None = None
    distill: DistillSection | None = None
    prune: PruneSection | None = None
    quantize: QuantizeSection | None = None
    devices: DevicesSection | None = None
    """A model for each recording device, beside the general one (docs/dcase.md)."""
    budget: BudgetSection | None = None
    export: ExportSection | None = None
    verify: VerifySection | None = None

    @model_validator(mode="after")
    def _sections_fit(self) -> "Recipe":
        if problems := misfits(self):
            raise ValueError("; ".join(problems))
        return self

    @property
    def distillation(self) -> DistillSection | None:
        """Whom the student, or what is pruned, listens to: pruned itself, a teacher teaches as by default."""
        if self.distill is None and self.prune is not None and self.prune.start == "teacher":
            return DistillSection(train=self.prune.finetune)
        return self.distill

    def trainings(self) -> dict[str, TrainConfig]:
        """The recipe's training runs by their place, in the order of the stages."""
        models = {f"{name}.train": getattr(self, name) for name in ("reference", "teacher", "student", "distill")}
        found = {place: section.train for place, section in models.items() if section and section.train}
        if self.prune:
            found["prune.finetune"] = self.prune.finetune
        if self.quantize and self.quantize.train:
            found["quantize.train"] = self.quantize.train
        return found | ({"devices.finetune": self.devices.finetune} if self.devices else {})
