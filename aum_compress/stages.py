"""The stages that make models: reference, teacher, student, distill, quantize, devices (`pruning` has its own)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from aum_compress.bundle import Bundle, file_sha256
from aum_compress.compress.quantize import (
    layer_storages,
    prepare,
    signal_to_noise_db,
    with_layers,
    without_absent,
)
from aum_compress.compress.saturation import saturating_pairs
from aum_compress.console import log, progress
from aum_compress.models.checkpoints import load_published, read_published, state_for
from aum_compress.models.config import AudioMambaConfig, CPMobileConfig
from aum_compress.models.factory import Model, build_model, folded_config
from aum_compress.models.fake_quantized import converted
from aum_compress.quantising import calibration, judging_clips, require_judging_clips, searched
from aum_compress.recipe_schema import ModelSection, TrainConfig
from aum_compress.teaching import Teacher, teacher_targets
from aum_compress.train.distributed import ALONE
from aum_compress.train.fit import FitResult, fit
from aum_compress.train.predict import predict_logits
from aum_compress.workspace import Made, Workspace

JUDGED_CLIPS = 512
"""For the signal-to-noise ratio of a quantised model."""


def train_on_labels(space: Workspace, name: str) -> Bundle:
    """Stage `reference`, `teacher` or `student`: a fresh model trained on the labels alone."""
    section = getattr(space.recipe, name)
    checkpoint = getattr(section, "checkpoint", None)  # the student has none

    def make(work_dir: Path) -> Made:
        model = _fresh(space, section)
        notes = {}
        if checkpoint:
            notes["checkpoint"] = [str(checkpoint), *load_published(model, checkpoint.expanduser())]
            log(f"{name}: starts from {'; '.join(notes['checkpoint'])}")
        result = fit_stage(space, model, section.train, work_dir, name)
        made = made_by(model, result)
        return Made(made.model, made.metrics, made.notes | notes)

    reads = {
        "section": section.model_dump(mode="json", exclude={"checkpoint"}),
        "responses": space.responses_sha256(section.train),
    }
    if checkpoint:
        reads["checkpoint"] = file_sha256(checkpoint.expanduser())
    return space.stage(name, None, reads, make, space.workers(section.train))


def distill(space: Workspace, start: Bundle | None, teachers: list[Teacher]) -> Bundle:
    """Stage `distill`: the student (fresh, or `start`) trained on labels and on what the teachers say."""
    section, student = space.recipe.distill, space.recipe.student
    workers = space.workers(section.train)

    def make(work_dir: Path) -> Made:
        outputs = teacher_targets(space, teachers, section.train, workers, embeddings=section.feature_weight > 0)
        model = start.load_model() if start else _fresh(space, student)
        result = fit_stage(space, model, section.train, work_dir, "distill", *outputs)
        return made_by(model, result)

    architecture = student.model_dump(mode="json", exclude={"train"})
    reads = {
        "section": section.model_dump(mode="json"),
        "student": architecture,
        "teachers": [t.sha256 for t in teachers],
        "responses": space.responses_sha256(section.train),
    }
    return space.stage("distill", start, reads, make, workers)


def quantise(space: Workspace, parent: Bundle, teachers: list[Teacher]) -> Bundle:
    """Stage `quantize`: integer weights and ranges, calibrated on training clips alone and, where wanted, searched for
    and trained, without the feature term."""
    section, taught = space.recipe.quantize, space.recipe.distillation
    workers = space.workers(section.train) if section.train else ALONE

    def make(work_dir: Path) -> Made:
        model = parent.load_model()
        notes: dict[str, Any] = {}
        chosen, gone = without_absent(model, section) if space.recipe.prune else (section, [])
        if gone:  # `check_quantisation` has found them in the model before pruning
            log(f"quantize: {', '.join(gone)}: left with pruning")
        if section.search:
            notes["search"] = searched(space, model, chosen, work_dir, workers)
            chosen = with_layers(chosen, notes["search"]["layers"])
        clips = calibration(space, section)
        with progress("quantize: calibration"):
            fake = prepare(model, clips, chosen)
        metrics = {}
        if section.train:
            logits = teacher_targets(space, teachers, section.train, workers)[0] if teachers else None
            result = fit_stage(
                space, fake, section.train, work_dir, "quantize", logits, frozen_epochs=section.last_epochs
            )
            metrics["validation_accuracy"] = result.validation_accuracy
            notes |= {"kept_epoch": result.kept_epoch, "history": result.history}
        quantized = converted(fake)
        judge = judging_clips(space, section, JUDGED_CLIPS, calibrating=True)
        metrics[f"{judge.part}_sqnr_db"] = signal_to_noise_db(judge.logits(model), judge.logits(quantized))
        notes |= {"calibration_clips": sum(map(len, clips)), "saturating_pairs": saturating_pairs(quantized)}
        return Made(quantized, metrics, notes, section.precision)

    reads: dict[str, Any] = {"section": section.model_dump(mode="json")}
    if section.train:
        reads |= {
            "distill": taught.model_dump(mode="json", exclude={"train"}) if taught else None,
            "teachers": [t.sha256 for t in teachers],
            "responses": space.responses_sha256(section.train),
        }
    return space.stage("quantize", parent, reads, make, workers)


def check_quantisation(space: Workspace) -> None:
    """Whether the names in the recipe's `quantize` are layers of the model that it trains, and whether its search has
    clips to judge on: before any training.

    Raises:
        AumError: a name that is no layer. DataError: no clips.
    """
    recipe = space.recipe
    if recipe.quantize is None:
        return
    config = resolve(space, getattr(recipe, recipe.prune.start if recipe.prune else "student"))
    with torch.random.fork_rng(devices=[]):
        layer_storages(build_model(folded_config(config)), recipe.quantize)
    if recipe.quantize.search:
        require_judging_clips(space, recipe.quantize)


def fine_tune(space: Workspace, parent: Bundle, teachers: list[Teacher], logits: Callable[[], Tensor]) -> Bundle:
    """Stage `devices`, the training: the general student goes on with the clips of one device, whose `space` this is.

    Args:
        logits: gives those of the teachers (K,n,C) for the training clips of all devices; asked only where there are
            teachers and something is to be trained.
    """
    section = space.recipe.devices
    workers = space.workers(section.finetune)

    def make(work_dir: Path) -> Made:
        model = parent.load_model()
        before = space.validation_accuracy(predict_logits(model, space.parts.validation, space.spec))
        own = None
        if teachers:
            place = {clip.clip_id: row for row, clip in enumerate(space.general.parts.train.clips)}
            own = logits()[:, [place[clip.clip_id] for clip in space.parts.train.clips]]
        made = made_by(model, fit_stage(space, model, section.finetune, work_dir, f"devices: {space.device}", own))
        return Made(made.model, made.metrics | {"general_validation_accuracy": before}, made.notes)

    distillation = space.recipe.distillation
    reads = {
        "section": section.model_dump(mode="json", exclude={"names"}),
        "device": space.device,
        "distill": distillation.model_dump(mode="json", exclude={"train"}) if distillation else None,
        "teachers": [t.sha256 for t in teachers],
        "responses": space.responses_sha256(section.finetune),
    }
    return space.stage("devices", parent, reads, make, workers)


def resolve(space: Workspace, section: ModelSection) -> AudioMambaConfig | CPMobileConfig:
    """The section's model for the data at hand; a checkpoint that it names has been read and fits.

    Raises:
        RecipeError: a stem that does not fit the features.
        ModelFileError: a checkpoint that cannot be read or does not fit.
    """
    _, n_mels, n_frames = space.spec.feature_shape
    config = section.resolve(n_mels, n_frames, len(space.labels))
    if checkpoint := getattr(section, "checkpoint", None):
        published = read_published(checkpoint.expanduser())
        if section.block_type is None:
            blocks = tuple(block.model_copy(update={"block_type": published.block_type}) for block in config.blocks)
            config = config.model_copy(update={"blocks": blocks})
        state_for(published, config)
    return config


def _fresh(space: Workspace, section: ModelSection) -> Model:
    L.seed_everything(space.recipe.seed, verbose=False)
    return build_model(resolve(space, section))


def fit_stage(
    space: Workspace,
    model: Model,
    config: TrainConfig,
    work_dir: Path,
    title: str,
    logits: Tensor | None = None,
    embeddings: Tensor | None = None,
    frozen_epochs: int | None = None,
) -> FitResult:
    """One training of a stage, on the recipe's data. Args: title: what it is, the stage's name before a colon."""
    return fit(
        model,
        space.data_module(config),
        space.spec,
        config,
        n_classes=len(space.labels),
        seed=space.recipe.seed,
        work_dir=work_dir,
        log_dir=space.runs / "logs" / title.partition(":")[0],
        description=title,
        teacher_logits=logits,
        teacher_embeddings=embeddings,
        distill=space.recipe.distillation,
        ranks=space.workers(config),
        frozen_epochs=frozen_epochs,
    )


def made_by(model: Model, result: FitResult) -> Made:
    """What a training leaves, to be written."""
    metrics = {"validation_accuracy": result.validation_accuracy}
    return Made(model, metrics, {"kept_epoch": result.kept_epoch, "history": result.history})
