"""What the teachers of a run say of its training clips: computed once, or read from files that somebody brings."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aum_compress.bundle import Bundle, file_sha256, json_sha256, read_bundle
from aum_compress.console import log, progress
from aum_compress.errors import BundleError, DataError
from aum_compress.recipe_schema import TrainConfig
from aum_compress.train.distributed import ALONE, Ranks
from aum_compress.train.predict import predict_logits, predict_with_embeddings
from aum_compress.train.teachers import TeacherFile, TeacherOutputs, average_logits, load_outputs, save_outputs
from aum_compress.workspace import Workspace

Teacher = Bundle | TeacherFile
STAGES_THAT_TEACH = ("reference", "teacher")
"""Of a recipe's own; every other name is a path."""


def find_teachers(space: Workspace, stages: dict[str, Bundle]) -> list[Teacher]:
    """The teachers that `distill.teachers` names: stages of this run, paths of bundles, or of logits (`.npz`)."""
    section = space.recipe.distillation
    names = section.teachers if section else ()
    return [stages[name] if name in stages else _from_outside(name) for name in names]


def _from_outside(name: str) -> Teacher:
    path = Path(name).expanduser()
    if path.suffix != ".npz":
        return read_bundle(path)
    if not path.is_file():
        raise DataError(f"distill.teachers: {path}: no such file of logits; docs/distillation.md says how to write one")
    return TeacherFile(path, file_sha256(path))


def check_teachers(space: Workspace) -> None:
    """Reads the bundles and logits that the recipe names: what is wrong with them is said before hours of training.

    Raises:
        BundleError: no bundle, or one for other labels or another clip length.
        DataError: as `load_outputs`.
    """
    section = space.recipe.distillation
    for name in section.teachers if section else ():
        if name in STAGES_THAT_TEACH:
            continue
        teacher = _from_outside(name)
        if isinstance(teacher, Bundle):
            _require_same_task(space, teacher)
            continue
        outputs = _read(space, teacher.path, space.rendering(section.train).names)
        if section.feature_weight and outputs.embeddings is None:
            log(f"distill: {name} has no embeddings and takes no part in the feature term")


def _require_same_task(space: Workspace, teacher: Bundle) -> None:
    if teacher.card.labels != space.labels:
        raise BundleError(
            f"{teacher.path}: is a teacher for labels {list(teacher.card.labels)}, wanted {list(space.labels)}"
        )
    if teacher.card.input.clip_seconds != space.spec.clip_seconds:
        raise BundleError(
            f"{teacher.path}: hears clips of {teacher.card.input.clip_seconds} s, wanted {space.spec.clip_seconds} s"
        )


def teacher_targets(
    space: Workspace, teachers: list[Teacher], config: TrainConfig, workers: Ranks = ALONE, *, embeddings: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Of each training clip in each view of `config`, (K,n,C) averaged logits and, where wanted, (K,n,E) embeddings.

    Embeddings are those of all teachers that have some, each of length 1, one behind the other: so each teacher weighs
    the same in their cosine. A teacher hears every view with its own front-end.

    Args:
        workers: the processes that call this; they share the computing, the first one keeps the files.
    """
    names = space.rendering(config).names
    paths = [
        teacher.path if isinstance(teacher, TeacherFile) else _computed(space, teacher, config, workers, embeddings)
        for teacher in teachers
    ]
    train = space.parts.train
    outputs = workers.first(lambda: _read_all(space, paths, names, embeddings))
    logits = torch.empty(len(names), len(train), len(space.labels))
    if outputs is not None:
        logits.copy_(torch.from_numpy(average_logits([one.logits for one in outputs])))
    workers.from_first([logits])
    return logits, _joined(outputs, logits.shape[:2], workers) if embeddings else None


def _computed(space: Workspace, teacher: Bundle, config: TrainConfig, workers: Ranks, embeddings: bool) -> Path:
    """The file of this teacher's answers, computed if it is not there yet."""
    names = space.rendering(config).names
    parts = [teacher.card.stage, teacher.sha256[:12], space.data_sha256[:12]]
    parts += [json_sha256(names)[:12]] if len(names) > 1 else []
    parts += ["embeddings"] if embeddings else []
    path = space.runs / "teacher-logits" / f"{'-'.join(parts)}.npz"
    if not workers.agree(path.is_file()):
        model, heard = teacher.load_model(), space.training_clips(config, teacher.card.input.front_end)
        with progress(f"distill: logits of {teacher.card.stage}") as reporter:
            predict = predict_with_embeddings if embeddings else predict_logits
            found = predict(model, heard, teacher.card.input, reporter.advance, workers)
        logits, vectors = found if embeddings else (found, None)
        by_view = (len(names), len(space.parts.train), -1)
        vectors = None if vectors is None else vectors.reshape(by_view)
        workers.first(partial(_save, path, space, names, logits.reshape(by_view), vectors))
    return path


def _save(path: Path, space: Workspace, names: tuple[str, ...], logits: np.ndarray, vectors: np.ndarray | None) -> None:
    train = space.parts.train
    ids = [clip.clip_id for clip in train.clips]
    save_outputs(path, ids, train.checksums, space.labels, logits, views=names, embeddings=vectors)


def _read_all(space: Workspace, paths: list[Path], names: tuple[str, ...], embeddings: bool) -> list[TeacherOutputs]:
    outputs = [_read(space, path, names) for path in paths]
    if embeddings and all(one.embeddings is None for one in outputs):
        raise DataError("distill.feature_weight: no teacher has embeddings; add them to the file, or set it to 0")
    return outputs


def _read(space: Workspace, path: Path, names: tuple[str, ...]) -> TeacherOutputs:
    train = space.parts.train
    return load_outputs(path, [clip.clip_id for clip in train.clips], train.checksums, space.labels, names)


def _joined(outputs: list[TeacherOutputs] | None, shape: tuple[int, int], workers: Ranks) -> Tensor:
    """(K,n,E) on all processes; `outputs` is what the first one has read."""
    width = torch.zeros(1, dtype=torch.int64)
    if outputs is not None:
        found = np.concatenate([one.embeddings for one in outputs if one.embeddings is not None], axis=2)
        width.fill_(found.shape[2])
    workers.from_first([width])
    joined = torch.empty(*shape, int(width))
    if outputs is not None:
        joined.copy_(torch.from_numpy(found))
    workers.from_first([joined])
    return joined
