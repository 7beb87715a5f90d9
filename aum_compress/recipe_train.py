"""One training run of a recipe, and what all sections are made of. Torch-free."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


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


class DeviceTrainConfig(TrainConfig):
    """Training of one device's model, with the defaults of the DCASE 2025 baseline's."""

    epochs: Positive = 50
    learning_rate: PositiveFloat = 5e-4
