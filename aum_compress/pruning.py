"""The stage `prune`: steps of leaving out and fine-tuning, by a ratio or to the budget (docs/pruning.md)."""

import copy
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aum_compress.bundle import Bundle
from aum_compress.compress.prune import Choice, apply_choice, choose_by_budget, choose_by_ratio, mean_loss
from aum_compress.compress.prune_dimensions import dimensions
from aum_compress.compress.prune_plan import (
    CHOICES,
    Cost,
    Costing,
    RatioPlan,
    Room,
    fewest_blocks,
    floors_behind,
    kinds_of,
    require_reachable,
    room,
    share_floors,
    step_target,
    target_limits,
)
from aum_compress.console import log, progress
from aum_compress.errors import RecipeError
from aum_compress.models.audio_mamba import AudioMamba
from aum_compress.models.config import AudioMambaConfig
from aum_compress.recipe_schema import PruneSection, Recipe, TrainConfig
from aum_compress.stages import fit_stage, made_by, resolve
from aum_compress.teaching import Teacher, teacher_targets
from aum_compress.train.distributed import Ranks
from aum_compress.train.losses import distillation_loss, label_loss, soften
from aum_compress.workspace import Made, Workspace

BATCH = 32
STEP_SHARE = 0.7
"""To what share of a cost that is over its limit one step comes down at most, where `prune.steps` is left out."""


def check_pruning(space: Workspace) -> None:
    """Whether the recipe's model can be pruned as its section says: from sizes alone, before any training.

    Raises:
        RecipeError: a dimension that the model does not have. AumError, BudgetExceeded: as `require_reachable`.
    """
    section = space.recipe.prune
    if section is None:
        return
    config = resolve(space, getattr(space.recipe, section.start))
    found = {dimension.kind for dimension in dimensions(config)}
    if absent := [name for name in section.dimensions if not found & set(CHOICES[name])]:
        if not section.to_budget:
            raise RecipeError(f"prune.dimensions: names {', '.join(absent)}, and the {section.start} has none")
        log(f"prune: the {section.start} has no {', '.join(absent)} that could give way")
    plan = _Plan(space, config)
    if section.to_budget:
        require_reachable(config, plan.room(config), plan.costing, plan.limits)
    else:
        _require_removable(config, plan.by_ratio, section)


def _require_removable(config: AudioMambaConfig, plan: RatioPlan, section: PruneSection) -> None:
    """Something of every dimension named; of a stem's two kinds, the one that stays as it is is told."""
    goes = plan.removable(config, section.steps)
    how = f"ratio {section.ratio:g} in multiples of {section.round_to}"
    for name in section.dimensions:
        kinds = [kind for kind in CHOICES[name] if kind in plan.kinds]
        places = [d for d in dimensions(config) if d.kind in kinds]
        if not goes & set(kinds):
            raise RecipeError(
                f"prune: {how} removes nothing from {name} {[d.size * d.width for d in places]}. "
                "Raise prune.ratio or prune.max_block_ratio, or lower prune.round_to"
            )
        for kind in kinds:
            if kind not in goes and (sizes := [d.size * d.width for d in places if d.kind == kind]):
                log(f"prune: {kind} {sizes} stay as they are: {how} removes nothing from them")


def prune(space: Workspace, parent: Bundle, teachers: list[Teacher]) -> Bundle:
    """Stage `prune`: in each step members leave, then the model is fine-tuned, without distillation's feature term."""
    section, distillation = space.recipe.prune, space.recipe.distillation
    workers = space.workers(section.finetune)

    def make(work_dir: Path) -> Made:
        logits = teacher_targets(space, teachers, section.finetune, workers)[0] if teachers else None
        losses = training_losses(space, logits, section.importance_clips)
        model = parent.load_model()
        plan = _Plan(space, model.config)
        steps: list[dict[str, Any]] = []
        while not plan.is_done(model.config, len(steps)):
            step_dir = work_dir / f"step-{len(steps) + 1}"
            choose = partial(plan.choose, model, losses, len(steps))
            choice = _told(workers, partial(_kept_choice, step_dir, choose))
            model = apply_choice(model, choice)
            workers.from_first(model.state_dict().values())  # singular vectors are known but for their signs
            plan.follow(choice)
            last = plan.is_done(model.config, len(steps) + 1)
            log(f"prune: step {len(steps) + 1}/{plan.steps}: {_summary(choice)}")
            tuned = _epochs(section.finetune, section.last_epochs if last else None)
            cut = mean_loss(model, losses) if workers.is_first else math.nan
            result = fit_stage(space, model, tuned, step_dir, f"prune: fine-tuning {len(steps) + 1}", logits)
            after = {"cut": cut, "fine_tuned": mean_loss(model, losses)} if workers.is_first else {}
            accuracy = {"validation_accuracy": result.validation_accuracy, "epochs": tuned.epochs}
            steps.append({**choice.note, "loss_after": after, **accuracy})
        made = made_by(model, result)
        return Made(made.model, made.metrics, made.notes | {"steps": steps})

    reads = {
        "section": section.model_dump(mode="json"),
        "budget": [*target_limits(space.limits), costing(space.recipe, 1.0).to_dict()] if section.to_budget else None,
        "distill": distillation.model_dump(mode="json", exclude={"train"}) if distillation else None,
        "teachers": [t.sha256 for t in teachers],
        "responses": space.responses_sha256(section.finetune),
    }
    return space.stage("prune", parent, reads, make, workers)


def costing(recipe: Recipe, clip_seconds: float) -> Costing:
    """In the file that the recipe ships. What `quantize.search` will change of its layers is not known yet."""
    if section := recipe.quantize:
        return Costing(section.precision, clip_seconds, section)
    return Costing("fp16" if recipe.export and "fp16" in recipe.export.precisions else "fp32", clip_seconds)


class _Plan:
    """What the section wants of one model and of those that the steps make of it."""

    def __init__(self, space: Workspace, config: AudioMambaConfig) -> None:
        self.section = space.recipe.prune
        self.by_ratio = None if self.section.to_budget else RatioPlan(config, self.section)
        self.costing = costing(space.recipe, space.spec.clip_seconds)
        self.limits = target_limits(space.limits)
        self.floors = share_floors(config, self.section.max_block_ratio)
        self.fewest_blocks = fewest_blocks(config, self.section.max_block_ratio)
        self.steps = self.section.steps or steps_needed(self.costing(config), self.limits)

    def room(self, config: AudioMambaConfig) -> Room:
        section = self.section
        return room(config, kinds_of(section.dimensions), section.round_to, self.floors, self.fewest_blocks)

    def is_done(self, config: AudioMambaConfig, done: int) -> bool:
        if self.by_ratio is not None:
            return done >= self.steps or not self.by_ratio.removable(config, self.steps)
        return self.costing(config).within(self.limits)

    def follow(self, choice: Choice) -> None:
        if self.by_ratio is not None:
            self.by_ratio.follow(choice.kept)
        self.floors = floors_behind(self.floors, choice.kept)

    def choose(self, model: AudioMamba, losses: "TrainingLosses", done: int) -> Choice:
        """On a GPU where there is one that training may use."""
        section = self.section
        gpu = torch.cuda.is_available() and section.finetune.accelerator != "cpu"
        model = copy.deepcopy(model).to("cuda" if gpu else "cpu")
        if self.by_ratio is not None:
            steps = range(done + 1, self.steps + 1)  # one whose share is too small for a multiple is passed over
            step = next(step for step in steps if self.by_ratio.removable(model.config, step))
            return choose_by_ratio(
                *(model, losses), importance=section.importance, plan=self.by_ratio, step=step, costing=self.costing
            )
        now = self.costing(model.config)
        with progress(f"prune: what each dimension is worth, step {done + 1}") as reporter:
            return choose_by_budget(
                *(model, losses),
                importance=section.importance,
                room=self.room(model.config),
                costing=self.costing,
                target=step_target(now, self.limits, max(1, self.steps - done)),
                advance=reporter.advance,
            )


def steps_needed(now: Cost, limits: Cost) -> int:
    """So many that none leaves less than `STEP_SHARE` of a cost that is over its limit."""
    excess = max(cost / limit for cost, limit in zip(now, limits))
    return max(1, math.ceil(math.log(excess) / -math.log(STEP_SHARE) - 1e-9)) if excess > 1 else 1


@dataclass(frozen=True, eq=False)
class TrainingLosses:
    """The training loss of a model on each of some batches of clips, without augmentation."""

    x: Tensor
    """(n,1,F,T) normalised."""
    targets: Tensor
    """(n,)"""
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Of logits (B,C), targets (B,) and the clips' numbers (B,)."""

    def __call__(self, model: nn.Module) -> Iterator[Tensor]:
        device = next(model.parameters()).device
        for rows in torch.arange(len(self.x)).split(BATCH):
            yield self.loss(model(self.x[rows].to(device)).float(), self.targets[rows].to(device), rows)


def training_losses(space: Workspace, logits: Tensor | None, clips: int) -> TrainingLosses:
    """On clips evenly spread over the training part. Args: logits: (K,n,C) of the teachers, where there are any."""
    train, distillation = space.parts.train, space.recipe.distillation
    chosen = np.unique(np.linspace(0, len(train) - 1, min(clips, len(train))).astype(np.int64))
    number = {label: place for place, label in enumerate(space.labels)}
    targets = torch.tensor([number[train.clips[row].label] for row in chosen])
    soft = None if logits is None else soften(logits[0, chosen], distillation.temperature)

    def loss(found: Tensor, wanted: Tensor, rows: Tensor) -> Tensor:
        if soft is None:
            return label_loss(found, wanted)
        return distillation_loss(
            *(found, wanted, soft[rows].to(found.device)),
            label_weight=distillation.label_weight,
            temperature=distillation.temperature,
            kl_reduction=distillation.kl_reduction,
        )

    return TrainingLosses(torch.from_numpy(space.normalised("train", clips)), targets, loss)


def _epochs(config: TrainConfig, epochs: int | None) -> TrainConfig:
    return config if epochs is None else config.model_copy(update={"epochs": epochs})


def _told(workers: Ranks, work: Callable[[], Choice]) -> Choice:
    """The first process' choice, on all."""
    choice = workers.first(work)
    text = b"" if choice is None else json.dumps(vars(choice)).encode()
    size = torch.tensor([len(text)])
    workers.from_first([size])
    told = torch.zeros(int(size), dtype=torch.uint8)
    if choice is not None:
        told.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    workers.from_first([told])
    return choice or Choice(**json.loads(bytes(told.numpy())))


def _kept_choice(step_dir: Path, choose: Callable[[], Choice]) -> Choice:
    """The choice of an interrupted run of this very step, which its checkpoints belong to, or a new one."""
    path = step_dir / "choice.json"
    if path.is_file():
        return Choice(**json.loads(path.read_text(encoding="utf-8")))
    choice = choose()
    step_dir.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".writing")
    beside.write_text(json.dumps(vars(choice)), encoding="utf-8")
    os.replace(beside, path)
    return choice


def _summary(choice: Choice) -> str:
    """`d_inner 256 -> 192, blocks 4 -> 3; 61,204 bytes, 7,933,632 MACs`"""
    changed = ", ".join(f"{kind} {before} -> {after}" for kind, (before, after) in choice.note["kinds"].items())
    return f"{changed}; {choice.note['param_bytes'][1]:,} bytes, {choice.note['macs'][1]:,} MACs"
