"""What all stages of one run share: folders, prepared data, and the rule by which a stage is run or skipped."""

import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from aum_compress import __version__
from aum_compress.audio.augment import responses_sha256
from aum_compress.audio.config import FrontEnd, InputSpec
from aum_compress.budget.check import check_model
from aum_compress.budget.records import BudgetReport, Limits
from aum_compress.bundle import (
    RECIPE,
    Bundle,
    BundleCard,
    ParentRef,
    find_bundle,
    golden_inputs,
    json_sha256,
    model_files,
    now,
    tool_versions,
    write_bundle,
)
from aum_compress.console import log, progress
from aum_compress.data.cache import CachedClips, CachedParts, cache_index, feature_statistics
from aum_compress.data.datamodule import ClipsDataModule
from aum_compress.data.index import load_index
from aum_compress.data.views import Rendering, ViewedClips, render_views
from aum_compress.errors import BundleError, DataError
from aum_compress.models.factory import Model
from aum_compress.models.quantized import quantized_layers, stored_tensors
from aum_compress.recipe import dump_recipe
from aum_compress.recipe_schema import Recipe, TrainConfig
from aum_compress.train.distributed import ALONE, Ranks, is_shared
from aum_compress.train.metrics import classification_metrics, macro_accuracy
from aum_compress.train.predict import predict_logits

FOLDERS = {
    "reference": "01-reference",
    "teacher": "02-teacher",
    "student": "03-student",
    "distill": "04-distill",
    "prune": "05-prune",
    "quantize": "06-quantize",
    "export": "07-export",
    "devices": "08-devices",
}
"""Stage -> folder of its bundle below runs/<recipe>/; that of `devices` has a folder for each device."""
DEVICE_FOLDERS = {"devices": "01-finetune", "quantize": "02-quantize"}
"""Stage -> folder of its bundle below a device's folder."""

LATEST_SIGHT_SECONDS = 60


@dataclass
class Workspace:
    """One recipe at work below `out`."""

    recipe: Recipe
    out: Path
    ranks: Ranks = ALONE
    """The processes that walk the stages together."""
    general: "Workspace | None" = None
    """Of a device's workspace, the one that it is a part of."""
    device: str = ""

    def for_device(self, device: str) -> "Workspace":
        """The same recipe on the clips of one device alone, in a folder of its own. Their features are normalised as
        those of all devices, as the model that it starts from is used to."""
        return Workspace(self.recipe, self.out, self.ranks, self, device)

    @property
    def runs(self) -> Path:
        if self.general is not None:
            return self.general.runs / FOLDERS["devices"] / self.device
        return self.out / "runs" / self.recipe.name

    def folder(self, stage: str) -> Path:
        """Where the bundle of a stage lies."""
        return self.runs / (FOLDERS if self.general is None else DEVICE_FOLDERS)[stage]

    @property
    def exports(self) -> Path:
        name = self.recipe.export.name if self.recipe.export and self.recipe.export.name else self.recipe.name
        return self.out / "exports" / name

    @property
    def limits(self) -> Limits:
        section = self.recipe.budget
        return Limits(section.max_param_bytes, section.max_macs) if section else Limits()

    @cached_property
    def parts(self) -> CachedParts:
        """The data set as log-mel features; every file has been read, and bad ones have been named."""
        return self._cache("logmel") if self.general is None else _of_device(self.general.parts, self.device)

    @cached_property
    def waveforms(self) -> CachedParts:
        """The same clips as waveforms, for augmentation that needs them."""
        return self._cache("waveform") if self.general is None else _of_device(self.general.waveforms, self.device)

    def _cache(self, what: str) -> CachedParts:
        recipe = self.recipe
        with progress("data: soundscapes and lists") as reporter:
            index = load_index(recipe.data, recipe.seed, reporter.advance)
        with progress(f"data: {what}") as reporter:
            return cache_index(
                index, recipe.features, what=what, on_bad_files=recipe.data.on_bad_files, progress=reporter.advance
            )

    @property
    def labels(self) -> tuple[str, ...]:
        return self.parts.index.labels

    @cached_property
    def spec(self) -> InputSpec:
        """Front-end, clip length and the training part's normalisation."""
        if self.general is not None:
            return self.general.spec
        mean, std = feature_statistics(self.parts.train)
        return InputSpec(
            front_end=self.recipe.features,
            clip_seconds=self.parts.index.clip_seconds,
            mean=round(mean, 6),
            std=round(max(std, 1e-6), 6),
        )

    @cached_property
    def data_sha256(self) -> str:
        """Of all clips with their labels, devices and audio, by part."""
        parts = (self.parts.train, self.parts.validation, self.parts.test)
        return json_sha256(
            [
                [(c.clip_id, c.label, c.device, s) for c, s in zip(part.clips, part.checksums, strict=True)]
                for part in parts
            ]
        )

    def prepare(self) -> None:
        """Reads the data, the first process before the others: they find in the cache what they share with it.

        Raises:
            DataError: a process that has other data than the first one.
        """
        self.ranks.first(lambda: self.inputs_sha256("data", {}))
        if not self.ranks.same(self.inputs_sha256("data", {})):
            raise DataError(
                f"{socket.gethostname()}: hears other audio, or has another version of aum-compress, than the first "
                "process. All machines need the same files at data.root"
            )

    def workers(self, config: TrainConfig) -> Ranks:
        """Who takes part in this training."""
        return self.ranks if is_shared(config) else ALONE

    def data_module(self, config: TrainConfig) -> ClipsDataModule:
        """This process' share of the batches."""
        ranks = self.workers(config)
        parts, views = self.parts, None
        if config.views > 1:
            views = self.training_clips(config, self.recipe.features)
        elif config.augment.device_response_p:
            parts = self.waveforms
        return ClipsDataModule(
            parts, config.batch_size, self.recipe.seed, views=views, rank=ranks.rank, world_size=ranks.size
        )

    def rendering(self, config: TrainConfig) -> Rendering:
        """How the views of this training are made."""
        augment = config.augment
        return Rendering(
            count=config.views,
            seed=self.recipe.seed,
            time_roll_seconds=augment.time_roll_seconds,
            window_shift_seconds=augment.window_shift_seconds,
            speed_factor=augment.speed_factor,
            device_response_p=augment.device_response_p,
            device_response_folder=augment.device_response_folder,
            device_response_exclude=augment.device_response_exclude,
        )

    def training_clips(self, config: TrainConfig, front_end: FrontEnd) -> CachedClips | ViewedClips:
        """Features of the training clips, in all views where `config` has several; `front_end` may be a teacher's."""
        own = front_end == self.recipe.features
        clean = self.parts.train if own else cache_index(self.parts.index, front_end).train
        if config.views == 1:
            return clean

        def waveforms() -> CachedClips:
            return (self.waveforms if own else cache_index(self.parts.index, front_end, what="waveform")).train

        with progress(f"data: {config.views} views of each training clip") as reporter:
            return render_views(self.rendering(config), clean, waveforms, progress=reporter.advance)

    def responses_sha256(self, config: TrainConfig) -> str | None:
        """SHA-256 of the impulse responses that this training reads; None where it reads none."""
        augment = config.augment
        if not augment.device_response_p:
            return None
        return responses_sha256(augment.device_response_folder, augment.device_response_exclude)

    def normalised(self, part: str, count: int) -> np.ndarray:
        """(count,1,F,T) normalised features of clips evenly spread over a part (`train`, `validation`, `test`)."""
        cached = getattr(self.parts, part)
        rows = self.spread(len(cached), count)
        return ((cached[rows] - self.spec.mean) / self.spec.std).astype(np.float32)[:, None]

    @staticmethod
    def spread(length: int, count: int) -> np.ndarray:
        """`count` places among `length`, or all there are, evenly spread."""
        return np.unique(np.linspace(0, length - 1, min(count, length)).astype(np.int64))

    def measure(self, logits: np.ndarray) -> dict[str, Any]:
        """Metrics of (n,C) logits of the test part, which has chosen nothing."""
        test, clips = self.parts.test, self.parts.test.clips
        number = {label: place for place, label in enumerate(self.labels)}
        targets = np.array([number[clip.label] for clip in clips])
        devices = [clip.device for clip in clips]
        metrics = classification_metrics(logits, targets, self.labels, devices, self.parts.index.seen_devices)
        heard = [[clip.clip_id, clip.label, audio] for clip, audio in zip(clips, test.checksums, strict=True)]
        return metrics | {"clips_sha256": json_sha256(sorted(heard))}

    def validation_accuracy(self, logits: np.ndarray) -> float | None:
        """Of (n,C) logits of the validation part, mean over its classes, in percent; None where it has no clips."""
        clips = self.parts.validation.clips
        if not clips:
            return None
        targets = np.array([self.labels.index(clip.label) for clip in clips])
        return macro_accuracy(logits.argmax(1) == targets, targets)

    def stage(
        self,
        name: str,
        parent: Bundle | None,
        reads: dict[str, Any],
        make: Callable[[Path], "Made"],
        workers: Ranks = ALONE,
    ) -> Bundle:
        """The bundle of stage `name`: the one on disk if it was made from the same inputs, else `make`'s result.

        Args:
            reads: everything besides data, parent, seed and version that decides the result.
            make: called with a folder for checkpoints that belongs to exactly these inputs.
            workers: who calls `make`: all processes, or the first one while the others wait. It alone writes.
        """
        inputs_sha256 = self.inputs_sha256(name, reads | {"parent": parent.sha256 if parent else None})
        path = self.folder(name)
        bundle = self.ranks.first(lambda: find_bundle(path, inputs_sha256))
        if self.ranks.agree(bundle is not None):
            log(f"{name}: nothing has changed, kept {path}")
            return bundle or self._written_by_first(path, inputs_sha256)
        work_dir = self.runs / ".work" / f"{name}-{inputs_sha256[:16]}"

        def make_and_write() -> Bundle | None:
            made = make(work_dir)
            with progress(f"{name}: test") as reporter:
                logits = predict_logits(made.model, self.parts.test, self.spec, reporter.advance, workers)
            written = workers.first(lambda: self._write(name, path, parent, inputs_sha256, made, logits))
            if workers.is_first:
                # of this stage, those of recipes that were changed after a kill included
                for checkpoints in work_dir.parent.glob(f"{name}-*"):
                    shutil.rmtree(checkpoints, ignore_errors=True)
            return written

        bundle = make_and_write() if workers is self.ranks else self.ranks.first(make_and_write)
        return bundle or self._written_by_first(path, inputs_sha256)

    def _written_by_first(self, path: Path, inputs_sha256: str) -> Bundle:
        """The bundle that the first process has: a network file system may show it to other machines only later."""
        for _ in range(LATEST_SIGHT_SECONDS):
            if bundle := find_bundle(path, inputs_sha256):
                return bundle
            time.sleep(1)
        raise BundleError(
            f"{path}: {socket.gethostname()} does not see there what the first process has written. All machines need "
            "the same folder: name one on a shared file system with --out"
        )

    def inputs_sha256(self, stage: str, reads: dict[str, Any]) -> str:
        """What decides the result of a stage: equal means that it need not run again."""
        common = {
            "stage": stage,
            "seed": self.recipe.seed,
            "data": self.data_sha256,
            "input": self.spec.model_dump(),
            "version": __version__,
        }
        return json_sha256(common | {"reads": reads})

    def _write(
        self, name: str, path: Path, parent: Bundle | None, inputs_sha256: str, made: "Made", logits: np.ndarray
    ) -> Bundle:
        model = made.model
        metrics = {"test": self.measure(logits) if len(logits) else {"clips": 0}, **made.metrics}
        files = model_files(model, golden_inputs(self.spec), half=made.precision != "fp32")
        card = BundleCard(
            kind="model",
            stage=name,
            recipe=self.recipe.name,
            inputs_sha256=inputs_sha256,
            parent=ParentRef(path=os.path.relpath(parent.path, path), sha256=parent.sha256) if parent else None,
            model=model.config,
            input=self.spec,
            labels=self.labels,
            precision=made.precision,
            quantized_layers=quantized_layers(model),
            seed=self.recipe.seed,
            versions=tool_versions(),
            created=now(),
            metrics=metrics,
            budget=self.budget(model, half=made.precision != "fp32").to_dict(),
            notes=made.notes,
        )
        bundle = write_bundle(path, card, files | {RECIPE: dump_recipe(self.recipe).encode()})
        log(f"{name}: wrote {path}")
        return bundle

    def budget(self, model: Model, *, half: bool) -> BudgetReport:
        """Cost of the model as it would be stored, against this recipe's limits."""
        return check_model(model, self.spec, stored_tensors(model, half=half), self.limits)


def _of_device(parts: CachedParts, device: str) -> CachedParts:
    """A device's clips of each part; some classes, or a whole part, may be without one."""
    chosen = {
        name: tuple(clip for clip in getattr(parts.index, name) if clip.device == device)
        for name in ("train", "validation", "test")
    }
    cached = {name: getattr(parts, name).only(clips) for name, clips in chosen.items()}
    return CachedParts(replace(parts.index, **chosen), **cached)


@dataclass(frozen=True)
class Made:
    """What a stage hands over to be written."""

    model: Model
    metrics: dict[str, Any]
    notes: dict[str, Any]
    precision: str = "fp32"
