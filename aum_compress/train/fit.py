"""One training run: Lightning called from code, resumed where it was killed, the best epoch's weights kept."""

import copy
import math
import shutil
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
    description: str,
    teacher_logits: Tensor | None = None,
    distill: DistillSection | None = None,
) -> FitResult:
    """Trains `model` in place and leaves the weights of the best validation epoch in it.

    Args:
        work_dir: checkpoints of this very run (the caller derives its name from all that decides the result); a run
            that finds its own checkpoint there goes on behind it.
        teacher_logits: (n,C) for the training clips, in the data module's order; needs `distill`.

    Raises:
        AumError: training diverged (loss not finite), or a precision, device or strategy that this machine lacks.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
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
    history = _History(config.epochs)
    best = ModelCheckpoint(
        work_dir,
        filename="best",
        monitor="val_accuracy",
        mode="max",
        save_top_k=1,
        save_last=True,
        enable_version_counter=False,
    )
    last = work_dir / "last.ckpt"
    with progress(description) as reporter, warnings.catch_warnings():
        # Lightning's advice on workers and its notes on empty loggers are no concern of a recipe's user
        warnings.filterwarnings("ignore", module="lightning")
        trainer = _trainer(config, [best, history, _ProgressCallback(reporter, config.epochs, batches)], work_dir)
        if last.is_file():
            log(f"{description}: goes on from {last}")
        trainer.fit(module, datamodule=data, ckpt_path=last if last.is_file() else None, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if not best.best_model_path:
        raise AumError(f"{description}: no epoch gave a finite validation accuracy. Lower learning_rate")
    weights = torch.load(best.best_model_path, map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): t for name, t in weights.items() if name.startswith("model.")})
    model.cpu().eval()
    score = 100 * float(best.best_model_score)
    rows = history.rows
    best_epoch = next((row["epoch"] for row in rows if math.isclose(row["val_accuracy"], score, abs_tol=1e-4)), 0)
    return FitResult(best_epoch, score, rows)


def discard(work_dir: Path) -> None:
    """Removes the checkpoints of a run whose result is safe in a bundle."""
    shutil.rmtree(work_dir, ignore_errors=True)


def _trainer(config: TrainConfig, callbacks: list, work_dir: Path) -> L.Trainer:
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
            logger=_logger(config.logger, work_dir),
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=work_dir,
            barebones=False,
        )
    except (
        RuntimeError,
        ValueError,
        ModuleNotFoundError,
        MisconfigurationException,
    ) as error:
        keys = ", ".join(f"{key}={getattr(config, key)}" for key in ("accelerator", "devices", "strategy", "logger"))
        raise AumError(f"train ({keys}): not possible here: {error}") from None


def _logger(name: str, work_dir: Path):
    from lightning.pytorch import loggers

    if name == "csv":
        return loggers.CSVLogger(work_dir, name="log")
    if name == "tensorboard":
        return loggers.TensorBoardLogger(work_dir, name="log")
    if name == "wandb":
        return loggers.WandbLogger(save_dir=work_dir, project="aum-compress")
    return False


class _History(L.Callback):
    """The curve by epoch; part of the checkpoint, so that a resumed run has the whole of it."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.rows: list[dict[str, float]] = []

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics = trainer.callback_metrics
        self.rows.append(
            {
                "epoch": trainer.current_epoch + 1,
                "train_loss": float(metrics.get("train_loss", float("nan"))),
                "val_loss": float(metrics["val_loss"]),
                "val_accuracy": 100 * float(metrics["val_accuracy"]),
            }
        )

    def state_dict(self) -> dict:
        return {"rows": copy.deepcopy(self.rows)}

    def load_state_dict(self, state: dict) -> None:
        self.rows = state["rows"]


class _ProgressCallback(L.Callback):
    """Batches of all epochs on one bar; a loss that is not finite ends the run at once."""

    def __init__(self, reporter: Reporter, epochs: int, batches: int) -> None:
        self.reporter = reporter
        self.epochs = epochs
        self.batches = batches

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        self.reporter.advance(trainer.current_epoch * self.batches + batch_idx + 1, self.epochs * self.batches)
        if batch_idx % 16 == 0 and not torch.isfinite(outputs["loss"]):
            raise AumError(
                f"training diverged in epoch {trainer.current_epoch + 1}: loss is {float(outputs['loss'])}. "
                "Lower learning_rate, raise warmup_epochs, or use precision 32"
            )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        accuracy = 100 * float(trainer.callback_metrics["val_accuracy"])
        self.reporter.note(f"epoch {trainer.current_epoch + 1}/{self.epochs}, validation {accuracy:.1f} %")
