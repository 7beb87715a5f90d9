"""The stages that make models: reference, teacher, student, distill, quantize (`pruning` has its own)."""

from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from aum_compress.bundle import Bundle, file_sha256
from aum_compress.compress.quantize import quantize, signal_to_noise_db
from aum_compress.console import log, progress
from aum_compress.models.checkpoints import load_published, read_published, state_for
from aum_compress.models.config import AudioMambaConfig, CPMobileConfig
from aum_compress.models.factory import Model, build_model
from aum_compress.recipe_schema import ModelSection, TrainConfig
from aum_compress.teaching import Teacher, teacher_targets
from aum_compress.train.fit import FitResult, fit
from aum_compress.train.predict import predict_logits
from aum_compress.workspace import Made, Workspace

BATCH = 32


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


def quantise(space: Workspace, parent: Bundle) -> Bundle:
    """Stage `quantize`: int8 layers, calibrated on training clips alone."""
    section = space.recipe.quantize

    def make(work_dir: Path) -> Made:
        model = parent.load_model()
        clips = torch.from_numpy(space.normalised("train", section.calibration_clips))
        with progress("quantize: calibration") as reporter:
            quantized = quantize(
                model,
                _batches(clips, reporter.advance),
                percentile=section.percentile,
                weight_bits=section.weight_bits,
                keep_float=section.keep_float,
            )
        part = "validation" if len(space.parts.validation) else "train"
        heard = getattr(space.parts, part)
        sqnr = signal_to_noise_db(
            predict_logits(model, heard, space.spec), predict_logits(quantized, heard, space.spec)
        )
        return Made(quantized, {f"{part}_sqnr_db": sqnr}, {"calibration_clips": len(clips)})

    return space.stage("quantize", parent, {"section": section.model_dump(mode="json")}, make)


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
    )


def made_by(model: Model, result: FitResult) -> Made:
    """What a training leaves, to be written."""
    metrics = {"validation_accuracy": result.validation_accuracy}
    return Made(model, metrics, {"kept_epoch": result.kept_epoch, "history": result.history})


def _batches(clips: Tensor, advance) -> Iterator[Tensor]:
    for start in range(0, len(clips), BATCH):
        yield clips[start : start + BATCH]
        advance(min(start + BATCH, len(clips)), len(clips))
