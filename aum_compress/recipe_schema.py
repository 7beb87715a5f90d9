"""The sections of a recipe, their keys, defaults and checks. Torch-free.

Sections follow the order of the work; a section left out is a stage skipped. Every default stands here, so that the
resolved recipe which a bundle carries says all that was done.
"""

import math
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

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
from aum_compress.recipe_checks import NO_BLOCKS, misfits

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Preset = Literal["aum-tiny", "aum-small", "aum-base", "student", "student-int8", "student-fp16", "cp-mobile"]
Probability = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


def _one_folder(name: str) -> str:
    if name.startswith(".") or "/" in name or "\\" in name:
        raise ValueError(f"{name!r} is to name a folder, so it cannot begin with a dot or hold a slash")
    return name


FolderName = Annotated[str, AfterValidator(_one_folder)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True)


class AugmentConfig(Section):
    """Training-time augmentation; all off by default but the baseline's small time roll."""

    time_roll_seconds: NonNegative = 0.1
    """Circular shift by up to this much either way."""
    window_shift_seconds: NonNegative = 0.0
    """Of views: the window begins up to this much earlier or later in its recording, as far as training clips of it
    reach."""
    speed_factor: Annotated[float, Field(ge=1, le=2)] = 1.0
    """Of views: the clip is played up to this much faster or slower, pitch and tempo together; 1 switches it off."""
    frequency_mask_mels: Annotated[int, Field(ge=0)] = 0
    time_mask_frames: Annotated[int, Field(ge=0)] = 0
    mixstyle_p: Probability = 0.0
    """Freq-MixStyle: chance that a batch has its per-frequency statistics mixed."""
    mixstyle_alpha: PositiveFloat = 0.3
    mixup_alpha: NonNegative = 0.0
    """Beta(alpha, alpha) mixing of clips and their targets; 0 switches it off."""
    device_response_p: Probability = 0.0
    """Chance that a clip is played through a random impulse response of `device_response_folder`."""
    device_response_folder: Path | None = None
    device_response_exclude: tuple[str, ...] = ()
    """Names of files of that folder that are left out: responses of devices that occur in the test part."""

    @model_validator(mode="after")
    def _responses_have_a_folder(self) -> "AugmentConfig":
        if self.device_response_p and self.device_response_folder is None:
            raise ValueError("device_response_p needs device_response_folder, a folder of impulse responses (wav)")
        if self.device_response_exclude and not self.device_response_p:
            raise ValueError("device_response_exclude has nothing to leave files out of: device_response_p is 0")
        return self


VIEWED = {"time_roll_seconds": 0, "window_shift_seconds": 0, "speed_factor": 1, "device_response_p": 0}
"""Augmentation that makes views differ -> the value that switches it off."""


class TrainConfig(Section):
    """One training run: AdamW, linear warm-up, cosine down to zero."""

    epochs: Positive
    batch_size: Positive = 32
    learning_rate: PositiveFloat = 1e-3
    scan_learning_rate: PositiveFloat = 1.0
    """Factor on `learning_rate` for what the scan alone has: decay rates A, skip D, biases of the step sizes."""
    weight_decay: NonNegative = 0.05
    warmup_epochs: NonNegative = 1.0
    gradient_clip: PositiveFloat | None = 1.0
    """Largest gradient norm."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    accumulate_batches: Positive = 1
    """Batches summed into one optimiser step."""
    weight_average: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of weights and batch statistics, such as 0.999. The average is what is
    validated, kept and shipped."""
    keep: Literal["best", "last"] = "best"
    """Which epoch: the best by validation accuracy, or the last, which needs no validation clips."""
    precision: Literal["32", "16-mixed", "bf16-mixed"] = "32"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: Positive | Literal["auto"] = 1
    nodes: Positive = 1
    strategy: str = "auto"
    """Lightning's name: `auto`, `ddp`, `fsdp`, ..."""
    activation_checkpointing: bool = False
    """Keep only what enters each Mamba block and compute the rest again on the way back: less memory, more time."""
    logger: Literal["none", "csv", "tensorboard", "wandb"] = "none"
    views: Positive = 1
    """How many renderings of every training clip are kept in the feature cache; the first is the clip itself. With more
    than one, shift, speed, roll and impulse responses are drawn for these, each step takes one, and teachers hear the
    very same."""
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _views_differ(self) -> "TrainConfig":
        augment = self.augment
        drawn = {key: getattr(augment, key) > idle for key, idle in VIEWED.items()}
        if self.views > 1 and not any(drawn.values()):
            wanted = ", ".join(f"augment.{key} above {idle}" for key, idle in VIEWED.items())
            raise ValueError(f"views: {self.views} were wanted, and all would be the same: set one of {wanted}")
        alone = [key for key in ("window_shift_seconds", "speed_factor") if drawn[key]]
        if self.views == 1 and alone:
            raise ValueError(f"augment.{alone[0]}: is drawn for views alone; set views above 1, such as 8")
        return self

    @model_validator(mode="after")
    def _averages_whole_weights(self) -> "TrainConfig":
        if self.weight_average and self.strategy.startswith(("fsdp", "deepspeed")):
            raise ValueError(
                f"weight_average: needs all weights in each process, and strategy {self.strategy} cuts them up; use ddp"
            )
        return self


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
            for key in ("stem", "pool", "position", "head"):
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
        if len(set(self.dimensions)) < len(self.dimensions):
            raise ValueError(f"dimensions: {', '.join(self.dimensions)}: each is named once")
        return self


class QuantizeSection(Section):
    """int8 weights for each output channel, calibrated uint8 inputs; everything else is stored as float16."""

    calibration_clips: Positive = 256
    """Training clips that set the ranges of the layers' inputs."""
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    """Of each layer's input values that the range has to cover, either way."""
    weight_bits: Literal[7, 8] = 7
    """7 keeps integer products within 16 bits, where x86 CPUs without VNNI would saturate silently."""
    keep_float: tuple[str, ...] = ()
    """Names (or beginnings of names) of layers that stay float16."""


class BudgetSection(Section):
    """Limits of what ships; a model over one of them ends the run with exit code 3, before export."""

    max_param_bytes: Positive = 128_000
    max_macs: Positive = 30_000_000
    """For one second of audio."""


class ExportSection(Section):
    """ONNX files, to exports/<name>/."""

    precisions: Annotated[tuple[Literal["fp32", "fp16", "int8"], ...], Field(min_length=1)] = ("fp32", "fp16", "int8")
    """One file each; the smallest is the one that the budget is about."""
    waveform: bool = True
    """Beside each file that reads features, one that reads samples and has the front-end inside."""
    input_rate_hz: Annotated[int, Field(gt=0)] | None = None
    """Of the samples that those files read, and resample; the front-end's own rate when left out."""
    dynamic_batch: bool = False
    """Any number of clips at once, in place of one."""
    scan: Literal["scan", "chunked", "unrolled"] = "scan"
    """How Mamba-1's recurrence is written: as ONNX `Scan`, or without control flow for runtimes that have none."""
    name: FolderName | None = None
    """Folder below exports/; the recipe's name when left out."""


class VerifySection(Section):
    """Each file against the model that it was made of, in onnxruntime; what differs ends the run with exit code 4."""

    clips: Annotated[int, Field(ge=0)] = 64
    """Test clips to compare on, beside golden, random, silent and full-scale inputs."""


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
        return found | ({"prune.finetune": self.prune.finetune} if self.prune else {})
