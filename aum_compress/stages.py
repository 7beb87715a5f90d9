"""The stages that make models: reference, teacher, student, distill, prune, quantize."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from aum_compress.bundle import Bundle, file_sha256, read_bundle
from aum_compress.compress.prune import PruneResult, prune_d_inner
from aum_compress.compress.quantize import quantize, signal_to_noise_db
from aum_compress.console import log, progress
from aum_compress.data.cache import CachedClips, CachedParts, cache_index
from aum_compress.errors import BundleError
from aum_compress.models.checkpoints import load_published, read_published, state_for
from aum_compress.models.config import AudioMambaConfig, CPMobileConfig
from aum_compress.models.factory import Model, build_model
from aum_compress.recipe_schema import ModelSection, TrainConfig
from aum_compress.train.distributed import ALONE, Ranks
from aum_compress.train.fit import FitResult, fit
from aum_compress.train.losses import distillation_loss, label_loss, soften
from aum_compress.train.predict import predict_logits
from aum_compress.train.teachers import average_logits, load_logits, save_logits
from aum_compress.workspace import Made, Workspace

IMPORTANCE_BATCHES = 8
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
        result = _fit(space, model, section.train, work_dir, name)
        made = _made(model, result)
        return Made(made.model, made.metrics, made.notes | notes)

    reads = {"section": section.model_dump(mode="json", exclude={"checkpoint"})}
    if checkpoint:
        reads["checkpoint"] = file_sha256(checkpoint.expanduser())
    return space.stage(name, None, reads, make, space.workers(section.train))


def distill(space: Workspace, start: Bundle | None, teachers: list[Bundle]) -> Bundle:
    """Stage `distill`: the student (fresh, or `start`) trained on labels and the teachers' averaged logits."""
    section, student = space.recipe.distill, space.recipe.student
    workers = space.workers(section.train)

    def make(work_dir: Path) -> Made:
        logits = teacher_logits(space, teachers, workers)
        model = start.load_model() if start else _fresh(space, student)
        result = _fit(space, model, section.train, work_dir, "distill", logits)
        return _made(model, result)

    architecture = student.model_dump(mode="json", exclude={"train"})
    reads = {
        "section": section.model_dump(mode="json"),
        "student": architecture,
        "teachers": [t.sha256 for t in teachers],
    }
    return space.stage("distill", start, reads, make, workers)


def prune(space: Workspace, parent: Bundle, teachers: list[Bundle]) -> Bundle:
    """Stage `prune`: channels removed in equal steps, the model fine-tuned after each."""
    section = space.recipe.prune
    workers = space.workers(section.finetune)
    step_ratio = 1 - (1 - section.ratio) ** (1 / section.steps)

    def make(work_dir: Path) -> Made:
        logits = teacher_logits(space, teachers, workers) if teachers else None
        model = parent.load_model()
        widths: list[PruneResult] = []
        result: FitResult | None = None
        for step in range(1, section.steps + 1):
            model, removed = prune_d_inner(
                model,
                step_ratio,
                importance=section.importance,
                round_to=section.round_to,
                max_block_ratio=section.max_block_ratio,
                backward=partial(_backward, space, logits, workers),
            )
            widths.append(removed)
            title = f"prune: step {step}/{section.steps}, d_inner {list(removed.d_inner_after)}"
            result = _fit(space, model, section.finetune, work_dir / f"step-{step}", title, logits)
        made = _made(model, result)
        notes = {"steps": [{"before": w.d_inner_before, "after": w.d_inner_after} for w in widths]}
        return Made(made.model, made.metrics, made.notes | notes)

    distillation = space.recipe.distill.model_dump(mode="json", exclude={"train"}) if space.recipe.distill else None
    reads = {
        "section": section.model_dump(mode="json"),
        "distill": distillation,
        "teachers": [t.sha256 for t in teachers],
    }
    return space.stage("prune", parent, reads, make, workers)


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


def teacher_logits(space: Workspace, teachers: list[Bundle], workers: Ranks = ALONE) -> Tensor:
    """(n,C) averaged logits for the training clips, computed once for each teacher and kept by clip and checksum.

    Args:
        workers: the processes that call this; they share the computing, the first one keeps the file.
    """
    paths = []
    for teacher in teachers:
        if teacher.card.labels != space.labels:
            raise BundleError(
                f"{teacher.path}: is a teacher for labels {list(teacher.card.labels)}, wanted {list(space.labels)}"
            )
        path = (
            space.runs / "teacher-logits" / f"{teacher.card.stage}-{teacher.sha256[:12]}-{space.data_sha256[:12]}.npz"
        )
        paths.append(path)
        if not workers.agree(path.is_file()):
            model, heard = teacher.load_model(), _parts_for(space, teacher).train
            with progress(f"distill: logits of {teacher.card.stage}") as reporter:
                logits = predict_logits(model, heard, teacher.card.input, reporter.advance, workers)
            workers.first(partial(_save_logits, path, heard, logits, space.labels))
    logits = torch.empty(len(space.parts.train), len(space.labels))
    workers.first(lambda: logits.copy_(torch.from_numpy(_average(paths, space.parts.train, space.labels))))
    workers.from_first([logits])
    return logits


def _save_logits(path: Path, heard: CachedClips, logits: np.ndarray, labels: tuple[str, ...]) -> None:
    save_logits(path, [clip.clip_id for clip in heard.clips], heard.checksums, logits, labels)


def _average(paths: list[Path], train: CachedClips, labels: tuple[str, ...]) -> np.ndarray:
    ids = [clip.clip_id for clip in train.clips]
    return average_logits([load_logits(path, ids, train.checksums, labels) for path in paths])


def find_teachers(space: Workspace, stages: dict[str, Bundle]) -> list[Bundle]:
    """The bundles that `distill.teachers` names: stages of this run, or paths."""
    section = space.recipe.distill
    if section is None:
        return []
    return [stages[name] if name in stages else read_bundle(Path(name).expanduser()) for name in section.teachers]


def _parts_for(space: Workspace, teacher: Bundle) -> CachedParts:
    """The clips as the teacher's own front-end hears them."""
    if teacher.card.input.front_end == space.recipe.features:
        return space.parts
    if teacher.card.input.clip_seconds != space.spec.clip_seconds:
        raise BundleError(
            f"{teacher.path}: hears clips of {teacher.card.input.clip_seconds} s, wanted {space.spec.clip_seconds} s"
        )
    return cache_index(space.parts.index, teacher.card.input.front_end)


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


def _fit(
    space: Workspace, model: Model, config: TrainConfig, work_dir: Path, title: str, logits: Tensor | None = None
) -> FitResult:
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
        distill=space.recipe.distill,
        ranks=space.workers(config),
    )


def _made(model: Model, result: FitResult) -> Made:
    metrics = {"validation_accuracy": result.validation_accuracy}
    return Made(model, metrics, {"kept_epoch": result.kept_epoch, "history": result.history})


def _backward(space: Workspace, logits: Tensor | None, workers: Ranks, model: nn.Module) -> None:
    """Gradients of the training loss over some training clips, for the importance of channels.

    All of `workers` get those of the first: another machine's rounding must not choose another channel.
    """
    train = space.parts.train
    number = {label: place for place, label in enumerate(space.labels)}
    rows = np.unique(np.linspace(0, len(train) - 1, IMPORTANCE_BATCHES * BATCH).astype(np.int64))
    model.eval()
    for chosen in np.array_split(rows, IMPORTANCE_BATCHES):
        x = (torch.from_numpy(train[chosen])[:, None] - space.spec.mean) / space.spec.std
        targets = torch.tensor([number[train.clips[row].label] for row in chosen])
        if logits is None:
            loss = label_loss(model(x), targets)
        else:
            section = space.recipe.distill
            loss = distillation_loss(
                model(x),
                targets,
                soften(logits[chosen], section.temperature),
                label_weight=section.label_weight,
                temperature=section.temperature,
                kl_reduction=section.kl_reduction,
            )
        loss.backward()
    workers.from_first(parameter.grad for parameter in model.parameters() if parameter.grad is not None)


def _batches(clips: Tensor, advance) -> Iterator[Tensor]:
    for start in range(0, len(clips), BATCH):
        yield clips[start : start + BATCH]
        advance(min(start + BATCH, len(clips)), len(clips))
