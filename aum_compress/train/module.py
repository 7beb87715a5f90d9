"""The Lightning module: augmentation, loss, optimiser and schedule of one training run."""

import copy
import math
import re

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from aum_compress.audio import augment
from aum_compress.audio.config import InputSpec
from aum_compress.audio.frontend import front_end_module
from aum_compress.models.audio_mamba import AudioMamba
from aum_compress.models.fake_quantized import converted, set_observing
from aum_compress.recipe_schema import DistillSection, TrainConfig
from aum_compress.train.averaging import average_into, decay_at
from aum_compress.train.embedding import HeadInput, embedding_width
from aum_compress.train.losses import distillation_loss, feature_loss, label_loss, soften

SCAN_PARAMETERS = re.compile(r"\b(A(_b)?_log|D(_b)?|dt_bias|dt_proj(_b)?\.bias)$")
"""What the selective scan of either mixer learns besides the projections that make its inputs."""


class MacroAccuracy(MulticlassConfusionMatrix):
    """Mean over the classes that have clips, as `metrics.macro_accuracy`; torchmetrics' own counts the others as 0."""

    def compute(self) -> Tensor:
        confusion = super().compute()
        clips = confusion.sum(1)
        return (confusion.diagonal() / clips)[clips > 0].mean()


class TrainingModule(L.LightningModule):
    """Trains `model` on batches `(x, y, index)`: x (B,S) waveforms or (B,1,F,T) features, y and index of the clip (B,).

    All random choices of a step are seeded by (seed, epoch, batch, process): a resumed run draws what the unbroken one
    would have drawn, and each process draws its own.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: InputSpec,
        config: TrainConfig,
        *,
        n_classes: int,
        steps_per_epoch: int,
        seed: int,
        responses: augment.DeviceResponses | None = None,
        teacher_logits: Tensor | None = None,
        teacher_embeddings: Tensor | None = None,
        distill: DistillSection | None = None,
        frozen_epochs: int | None = None,
    ) -> None:
        """Args:
        teacher_logits, teacher_embeddings: (n,C) and (n,E), or (K,n,C) and (K,n,E) of K views; a batch's `index` counts
            through all of them.
        responses: for waveforms only.
        frozen_epochs: of a fake-quantised model, for how many epochs at the end its ranges stay as they are.
        """
        super().__init__()
        self.frozen_epochs = frozen_epochs
        # Lightning leaves a model in the mode it comes in; pruning and bundles give it in evaluation
        model.train()
        # a step on the CPU is 5 to 27 % shorter with channels last
        self.model = model.to(memory_format=torch.channels_last)
        if isinstance(model, AudioMamba):
            model.activation_checkpointing = config.activation_checkpointing
        # a module, so that it is part of the checkpoint
        self.averaged = copy.deepcopy(self.model).requires_grad_(False) if config.weight_average else None
        self.spec = spec
        self.config = config
        self.n_classes = n_classes
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed
        self.responses = responses
        self.distill = distill
        self.front_end = front_end_module(spec.front_end)
        # not a buffer: the checkpoint must not carry it
        self.teacher_logits = None if teacher_logits is None else teacher_logits.flatten(0, -2)
        self.teacher_embeddings = None if teacher_embeddings is None else teacher_embeddings.flatten(0, -2)
        if teacher_embeddings is not None:
            self.projector = nn.Linear(embedding_width(self.model), teacher_embeddings.shape[-1])
            self.head_input = HeadInput(self.model)
        # by itself it would wait for all processes that are there, also in a training that the first one does alone
        self.validation_accuracy = MacroAccuracy(
            n_classes, distributed_available_fn=lambda: self.trainer.world_size > 1
        )

    def on_train_epoch_start(self) -> None:
        if self.frozen_epochs is not None:
            set_observing(self.model, self.current_epoch < self.config.epochs - self.frozen_epochs)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y, index = batch
        place = (self.seed * 10_007 + self.current_epoch) * 1_000_003 + batch_idx * 1_009 + self.global_rank
        generator = torch.Generator().manual_seed(place % 2**63)
        torch.manual_seed(place % 2**63)  # dropout
        features = self._augmented(x, generator)
        teacher = embedding = None
        if self.teacher_logits is not None:
            teacher = soften(self.teacher_logits[index.cpu()].to(features.device), self.distill.temperature)
        if self.teacher_embeddings is not None:
            embedding = self.teacher_embeddings[index.cpu()].to(features.device)
        targets = y
        if self.config.augment.mixup_alpha:
            features, order, share = augment.mixup(features, self.config.augment.mixup_alpha, generator)
            targets = augment.blend(F.one_hot(y, self.n_classes).float(), order, share)
            teacher, embedding = (None if t is None else augment.blend(t, order, share) for t in (teacher, embedding))
        logits = self.model(features).float()
        if teacher is None:
            loss = label_loss(logits, targets, self.config.label_smoothing)
        else:
            loss = distillation_loss(
                logits,
                targets,
                teacher,
                label_weight=self.distill.label_weight,
                temperature=self.distill.temperature,
                kl_reduction=self.distill.kl_reduction,
            )
        if embedding is not None:
            projected = self.projector(self.head_input.value).float()
            loss = loss + self.feature_weight() * feature_loss(projected, embedding)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(y), sync_dist=True)
        return loss

    def feature_weight(self) -> float:
        """Of the feature term in this epoch: from `distill.feature_weight` in the first one linearly down to 0."""
        annealed = self.current_epoch / (self.distill.feature_anneal * self.config.epochs)
        return self.distill.feature_weight * max(0.0, 1 - annealed)

    def _augmented(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Normalised, augmented features (B,1,F,T)."""
        config = self.config.augment
        front_end = self.spec.front_end
        if x.dim() == 2:
            x = augment.time_roll(x, round(config.time_roll_seconds * front_end.sample_rate_hz), generator)
            if self.responses is not None:
                x = self.responses(x, config.device_response_p, generator)
            x = self.front_end(x)
        else:
            frames = round(config.time_roll_seconds * front_end.sample_rate_hz / front_end.hop_samples)
            # views have been rolled, and teachers heard them as they are
            x = augment.time_roll(x, frames, generator) if self.config.views == 1 else x
        x = (x - self.spec.mean) / self.spec.std
        if config.mixstyle_p:
            x = augment.freq_mixstyle(x, config.mixstyle_p, config.mixstyle_alpha, generator)
        if config.frequency_mask_mels:
            x = augment.frequency_mask(x, config.frequency_mask_mels, generator)
        if config.time_mask_frames:
            x = augment.time_mask(x, config.time_mask_frames, generator)
        return x

    @property
    def kept(self) -> nn.Module:
        """What is validated and shipped: the averaged weights where there are such."""
        return self.model if self.averaged is None else self.averaged

    def optimizer_step(self, *args, **kwargs) -> None:
        step = self.trainer.global_step
        super().optimizer_step(*args, **kwargs)
        if self.averaged is not None:
            average_into(self.averaged, self.model, decay_at(step, self.config.weight_average))

    def on_validation_epoch_start(self) -> None:
        """What is validated is what the first process saves, its batch statistics too."""
        if self.trainer.world_size > 1:
            for buffer in self.kept.buffers():
                torch.distributed.broadcast(buffer, 0)
        # of a fake-quantised model, what will ship; in a tuple, so that it is no part of the checkpoint
        self._validated = (self.kept if self.frozen_epochs is None else converted(self.kept).to(self.device),)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        x, y, _ = batch
        features = self.front_end(x) if x.dim() == 2 else x
        logits = self._validated[0]((features - self.spec.mean) / self.spec.std).float()
        self.validation_accuracy(logits, y)
        self.log("val_accuracy", self.validation_accuracy, on_epoch=True, batch_size=len(y))
        self.log("val_loss", F.cross_entropy(logits, y), on_epoch=True, batch_size=len(y), sync_dist=True)

    def configure_optimizers(self):
        rate = self.config.learning_rate
        groups = parameter_groups(self.model, self.config.weight_decay, rate * self.config.scan_learning_rate)
        if self.teacher_embeddings is not None:
            groups.append({"params": list(self.projector.parameters()), "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, lr=rate)
        steps = self.steps_per_epoch
        warmup, total = self.config.warmup_epochs * steps, self.config.epochs * steps

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, total - warmup))))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def parameter_groups(model: nn.Module, weight_decay: float, scan_learning_rate: float | None = None) -> list[dict]:
    """Decay for matrices and convolutions only: not for norms, biases, positions, the class token, A and D.

    Decided by name and shape, because pruning replaces parameters and loses attributes on them.

    Args: scan_learning_rate: of A, D and the step sizes' biases; that of all others when left out.
    """
    decayed, plain, scan = [], [], []
    for name, parameter in model.named_parameters():
        if SCAN_PARAMETERS.search(name):
            scan.append(parameter)
        elif parameter.dim() < 2 or "pos_embed" in name or name.endswith("cls_token"):
            plain.append(parameter)
        else:
            decayed.append(parameter)
    own_rate = {} if scan_learning_rate is None else {"lr": scan_learning_rate}
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
        {"params": scan, "weight_decay": 0.0} | own_rate,
    ]
