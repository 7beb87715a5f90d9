"""One training run: Lightning called from code, resumed where it was killed, the best epoch's weights kept."""

import copy
import logging
import math
import pickle  # only its error class: what torch.load raises on a file cut short
import warnings
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from aum_compress.audio.augment import DeviceResponses
from aum_compress.audio.config import InputSpec
from aum_compress.console import Reporter, log, progress
from aum_compress.data.datamodule import ClipsDataModule
from aum_compress.errors import AumError
from aum_compress.recipe_schema import DistillSection, TrainConfig
from aum_compress.train.module import TrainingModule


@dataclass(frozen=True)
class FitResult:
    """Of one run: the best epoch (from 1), its macro validation accuracy in percent, and the curve by epoch."""

    best_epoch: int
    validation_accuracy: float
    history: list[dict[str, float]]


def fit(
    model: nn.Module,
    data: ClipsDataModule,
    spec: InputSpec,
    config: TrainConfig,
    *,
    n_classes: int,
    seed: int,
    work_dir: Path,
    log_dir: Path,
    description: str,
    teacher_logits: Tensor | None = None,
    distill: DistillSection | None = None,
) -> FitResult:
    """Trains `model` in place and leaves the weights of the best validation epoch in it.

    Args:
        work_dir: checkpoints of this very run (the caller derives its name from all that decides the result); a run
            that finds its own checkpoint there goes on behind it.
        log_dir: where the logger named in `config` writes.
        teacher_logits: (n,C) for the training clips, in the data module's order; needs `distill`.

    Raises:
        AumError: training diverged (loss not finite), or a precision, device or strategy that this machine lacks.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    # its hints on hardware, workers and services are no concern of a recipe's user
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(seed, verbose=False)
    folder = config.augment.device_response_folder
    responses = None
    if folder is not None and config.augment.device_response_p:
        responses = DeviceResponses(folder, spec.front_end.sample_rate_hz)
    batches = math.ceil(data.train_clips / config.batch_size)
    module = TrainingModule(
        model,
        spec,
        config,
        n_classes=n_classes,
        steps_per_epoch=math.ceil(batches / config.accumulate_batches),
        seed=seed,
        responses=responses,
        teacher_logits=teacher_logits,
        distill=distill,
    )
    history = _History()
    best = ModelCheckpoint(
        work_dir, filename="best", monitor="val_accuracy", mode="max", save_top_k=1, enable_version_counter=False
    )
    # a checkpoint of its own: `save_last` would be written only when an epoch is the best so far
    newest = ModelCheckpoint(work_dir, filename="last", monitor=None, save_top_k=1, enable_version_counter=False)
    last = work_dir / "last.ckpt"
    with progress(description) as reporter, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        callbacks = [best, newest, history, _ProgressCallback(reporter, config.epochs, batches)]
        trainer = _trainer(config, callbacks, work_dir, log_dir)
        _run(trainer, module, data, last if _is_whole(last, description) else None)
    if not best.best_model_path:
        raise AumError(f"{description}: no epoch gave a finite validation accuracy. Lower learning_rate")
    weights = torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): t for name, t in weights.items() if name.startswith("model.")})
    model.cpu().to(memory_format=torch.contiguous_format).eval()
    score = 100 * float(best.best_model_score)
    rows = history.rows
    best_epoch = next((row["epoch"] for row in rows if math.isclose(row["val_accuracy"], score, abs_tol=1e-4)), 0)
    return FitResult(best_epoch, score, rows)


def _run(trainer: L.Trainer, module: TrainingModule, data: ClipsDataModule, checkpoint: Path | None) -> None:
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from None
    except OSError as error:
        # the second name is where a checkpoint was being moved to
        place = error.filename2 or error.filename or trainer.default_root_dir
        raise AumError(
            f"{place}: training cannot go on: {error.strerror or error}. Free space and run again: it goes on after "
            "the last whole epoch"
        ) from None
    except RuntimeError as error:
        if "PytorchStreamWriter" in str(error) or "file write failed" in str(error):
            raise AumError(
                f"{trainer.default_root_dir}: checkpoint cannot be written: {error}. Free space and run again"
            ) from None
        raise


def _is_whole(checkpoint: Path, description: str) -> bool:
    """Whether there is a checkpoint to go on from. One that was cut short is no reason to stop, only to start over."""
    if not checkpoint.is_file():
        return False
    try:
        epoch = torch.load(checkpoint, map_location="cpu", weights_only=True)["epoch"]
    except (RuntimeError, OSError, EOFError, KeyError, pickle.UnpicklingError):
        log(f"{description}: {checkpoint} was cut short; this training starts over")
        checkpoint.unlink()
        return False
    log(f"{description}: goes on after epoch {epoch + 1}")
    return True


def _trainer(config: TrainConfig, callbacks: list, work_dir: Path, log_dir: Path) -> L.Trainer:
    try:
        return L.Trainer(
            max_epochs=config.epochs,
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.nodes,
            strategy=config.strategy,
            precision={"32": "32-true"}.get(config.precision, config.precision),
            accumulate_grad_batches=config.accumulate_batches,
            gradient_clip_val=config.gradient_clip,
            logger=_logger(config.logger, log_dir),
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=work_dir,
        )
    except (
        RuntimeError,
        ValueError,
        ModuleNotFoundError,
        MisconfigurationException,
    ) as error:
        keys = ", ".join(f"{key}={getattr(config, key)}" for key in ("accelerator", "devices", "strategy", "logger"))
        raise AumError(f"train ({keys}): not possible here: {error}") from None


def _logger(name: str, log_dir: Path):
    from lightning.pytorch import loggers

    if name == "csv":
        return loggers.CSVLogger(log_dir, name="csv")
    if name == "tensorboard":
        return loggers.TensorBoardLogger(log_dir, name="tensorboard")
    if name == "wandb":
        return loggers.WandbLogger(save_dir=log_dir, project="aum-compress")
    return False


class _History(L.Callback):
    """The curve by epoch; part of the checkpoint, so that a resumed run has the whole of it.

    A loss that is not finite ends the run at once.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.losses: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        if not math.isfinite(self.losses[-1]):
            raise AumError(
                f"training diverged in epoch {trainer.current_epoch + 1}: the loss is {self.losses[-1]}. "
                "Lower learning_rate, raise warmup_epochs, or use precision 32"
            )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = trainer.callback_metrics
        self.rows.append(
            {
                "epoch": trainer.current_epoch + 1,
                # this process' share of the clips; the logged train_loss is known only after validation
                "train_loss": sum(self.losses) / len(self.losses),
                "val_loss": float(metrics["val_loss"]),
                "val_accuracy": 100 * float(metrics["val_accuracy"]),
            }
        )

    def state_dict(self) -> dict:
        return {"rows": copy.deepcopy(self.rows)}

    def load_state_dict(self, state: dict) -> None:
        self.rows = state["rows"]


class _ProgressCallback(L.Callback):
    """Batches of all epochs on one bar."""

    def __init__(self, reporter: Reporter, epochs: int, batches: int) -> None:
        self.reporter = reporter
        self.epochs = epochs
        self.batches = batches

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        self.reporter.advance(trainer.current_epoch * self.batches + batch_idx + 1, self.epochs * self.batches)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        accuracy = 100 * float(trainer.callback_metrics["val_accuracy"])
        self.reporter.note(f"epoch {trainer.current_epoch + 1}/{self.epochs}, validation {accuracy:.1f} %")
