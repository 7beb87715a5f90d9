"""One training run: Lightning called from code, resumed where it was killed, the best or the last epoch kept."""

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
from aum_compress.errors import AumError, TrainingDiverged
from aum_compress.recipe_schema import DistillSection, TrainConfig
from aum_compress.train.allocator import keep_freed_memory
from aum_compress.train.distributed import ALONE, FirstProcessFailed, Ranks, lost_process
from aum_compress.train.module import TrainingModule


@dataclass(frozen=True)
class FitResult:
    """Of one run: the epoch kept (from 1), its macro validation accuracy in percent, and the curve by epoch.

    What is measured on validation clips is None where there are none.
    """

    kept_epoch: int
    validation_accuracy: float | None
    history: list[dict[str, float | None]]


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
    teacher_embeddings: Tensor | None = None,
    distill: DistillSection | None = None,
    ranks: Ranks = ALONE,
    frozen_epochs: int | None = None,
) -> FitResult:
    """Trains `model` in place and leaves in it the weights, or their average, of the epoch that `config.keep` names.

    Args:
        data: this process' share of the batches.
        work_dir: checkpoints of this very run (the caller derives its name from all that decides the result); a run
            that finds its own checkpoint there goes on behind it.
        log_dir: where the logger named in `config` writes.
        teacher_logits: (n,C) for the training clips, in the data module's order, or (K,n,C) for their views; needs
            `distill`.
        teacher_embeddings: (n,E) or (K,n,E), for the feature term.
        ranks: processes that all call this, and all get the same weights and figures. A step averages their gradients:
            it is the step of one process with `ranks.size` times the batch. Batch normalisation sees the whole batch on
            GPUs; on CPUs each process' own, as torch has no other there.
        frozen_epochs: for a fake-quantised model (`models.fake_quantized`), how many epochs at the end leave its ranges
            alone. What is validated is then the model with integer weights that it would be converted to.

    Raises:
        AumError: training diverged (loss not finite), a precision, device or strategy that this machine lacks, too few
            validation clips, or a process that has ended.
        FirstProcessFailed: on the other processes, when the first one reports one of these.
    """
    ranks.first(lambda: _prepare(work_dir, data, config, ranks))
    # its hints on hardware, workers and services are no concern of a recipe's user
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    L.seed_everything(seed, verbose=False)
    if config.accelerator == "cpu" or not torch.cuda.is_available():
        keep_freed_memory()
    augment, responses = config.augment, None
    if augment.device_response_p and config.views == 1:
        rate = spec.front_end.sample_rate_hz
        responses = DeviceResponses(augment.device_response_folder, rate, augment.device_response_exclude)
    batches = data.train_batches
    module = TrainingModule(
        # a copy: synchronised batch normalisation replaces modules, and training wants another memory format
        copy.deepcopy(model),
        spec,
        config,
        n_classes=n_classes,
        steps_per_epoch=math.ceil(batches / config.accumulate_batches),
        seed=seed,
        responses=responses,
        teacher_logits=teacher_logits,
        teacher_embeddings=teacher_embeddings,
        distill=distill,
        frozen_epochs=frozen_epochs,
    )
    history = _History(ranks)
    best = _Checkpoint(
        work_dir, filename="best", monitor="val_accuracy", mode="max", save_top_k=1, enable_version_counter=False
    )
    # a checkpoint of its own: `save_last` would be written only when an epoch is the best so far
    newest = _Checkpoint(work_dir, filename="last", monitor=None, save_top_k=1, enable_version_counter=False)
    best_or_not = [best] if config.keep == "best" else []
    last = work_dir / "last.ckpt"
    with progress(description) as reporter, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        callbacks = [*best_or_not, newest, history, _ProgressCallback(reporter, config.epochs, batches)]
        trainer = _trainer(config, callbacks, work_dir, log_dir, ranks, validates=bool(len(data.parts.validation)))
        goes_on = ranks.agree(ranks.is_first and _is_whole(last, description))
        _run(trainer, module, data, last if goes_on else None)
    kept = best.best_model_path if config.keep == "best" else str(last)
    ranks.first(lambda: _load(model, kept, "averaged." if config.weight_average else "model.", description))
    ranks.from_first(model.state_dict().values())
    model.eval()
    rows = history.rows
    if config.keep == "last":
        return FitResult(rows[-1]["epoch"], rows[-1]["val_accuracy"], rows)
    score = 100 * float(best.best_model_score)
    kept_epoch = next((row["epoch"] for row in rows if math.isclose(row["val_accuracy"], score, abs_tol=1e-4)), 0)
    return FitResult(kept_epoch, score, rows)


def _prepare(work_dir: Path, data: ClipsDataModule, config: TrainConfig, ranks: Ranks) -> None:
    clips = len(data.parts.validation)
    if config.keep == "best" and not clips:
        raise AumError(
            "train.keep: best is chosen on validation clips, and there are none. Set keep: last, or a "
            "data.validation_fraction that leaves some"
        )
    if 0 < clips < ranks.size:
        raise AumError(
            f"train.devices, train.nodes: {ranks.size} processes cannot share {clips} validation clips; wanted at most "
            "as many processes as clips"
        )
    work_dir.mkdir(parents=True, exist_ok=True)


def _load(model: nn.Module, checkpoint: str, prefix: str, description: str) -> None:
    """Args: prefix: of the tensors to take, `model.` or `averaged.`."""
    if not checkpoint:
        raise AumError(f"{description}: no epoch gave a finite validation accuracy. Lower learning_rate")
    weights = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)})
    if bad := [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]:
        raise AumError(f"{description}: weights that are not finite: {', '.join(bad[:3])}. Lower learning_rate")


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
        if lost := lost_process(error):
            raise lost from None
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


def _trainer(
    config: TrainConfig, callbacks: list, work_dir: Path, log_dir: Path, ranks: Ranks, *, validates: bool
) -> L.Trainer:
    # one process among waiting others must not train with them
    alone_among_others = ranks.size == 1 and torch.distributed.is_initialized()
    try:
        return L.Trainer(
            max_epochs=config.epochs,
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.nodes,
            strategy="auto" if alone_among_others else config.strategy,
            use_distributed_sampler=False,  # the data module gives each process its share
            # torch synchronises it on GPUs alone
            sync_batchnorm=ranks.size > 1 and torch.cuda.is_available() and config.accelerator != "cpu",
            precision={"32": "32-true"}.get(config.precision, config.precision),
            accumulate_grad_batches=config.accumulate_batches,
            gradient_clip_val=config.gradient_clip,
            logger=_logger(config.logger, log_dir),
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=None if validates else 0,
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


class _Checkpoint(ModelCheckpoint):
    """One whose folder may have been moved since it was written: the best epoch so far is still the best one."""

    def load_state_dict(self, state: dict) -> None:
        def here(path: str) -> str:
            return str(Path(self.dirpath) / Path(path).name) if path else path

        paths = ("best_model_path", "kth_best_model_path", "last_model_path")
        moved = {key: here(state[key]) for key in paths}
        best = {here(path): score for path, score in state["best_k_models"].items()}
        super().load_state_dict(state | moved | {"best_k_models": best, "dirpath": self.dirpath})


class _History(L.Callback):
    """The curve by epoch; part of the checkpoint, so that a resumed run has the whole of it.

    A loss that is not finite ends a process alone at once, and several at the end of the epoch: all together, so that
    none waits for one that has gone.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.rows: list[dict[str, float | None]] = []
        self.losses: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        if self.ranks.size == 1:
            self._require_finite(self.losses[-1], trainer)

    def _require_finite(self, loss: float, trainer: L.Trainer) -> None:
        if math.isfinite(loss):
            return
        if not self.ranks.is_first:
            raise FirstProcessFailed
        raise TrainingDiverged(
            f"training diverged in epoch {trainer.current_epoch + 1}: the loss is {loss}. "
            "Lower learning_rate, raise warmup_epochs, or use precision 32"
        )

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # not at the end of the training epoch: the checkpoint is written before that
        metrics = trainer.callback_metrics
        self._add(trainer, float(metrics["val_loss"]), 100 * float(metrics["val_accuracy"]))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if len(self.rows) <= trainer.current_epoch:  # nothing was validated
            self._add(trainer, None, None)

    def _add(self, trainer: L.Trainer, val_loss: float | None, val_accuracy: float | None) -> None:
        # the logged train_loss is known only after validation
        train_loss = self.ranks.mean(sum(self.losses) / len(self.losses))
        self._require_finite(train_loss, trainer)
        epoch = trainer.current_epoch + 1
        self.rows.append({"epoch": epoch, "train_loss": train_loss, "val_loss": val_loss, "val_accuracy": val_accuracy})

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
