"""What a model would lose with each of its dimensions smaller: `aum-compress prune --sensitivity`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from aum_compress.bundle import Bundle
from aum_compress.compress.prune import mean_loss, try_ratios
from aum_compress.compress.prune_dimensions import dimensions
from aum_compress.compress.prune_importance import Importance
from aum_compress.compress.prune_plan import CHOICES, kinds_of, multiple_of, room, share_floors
from aum_compress.console import log, progress
from aum_compress.errors import AumError
from aum_compress.models.config import AudioMambaConfig
from aum_compress.pruning import TrainingLosses, costing
from aum_compress.report.prune_sensitivity import sensitivity_html
from aum_compress.same_data import require_same_data
from aum_compress.train.losses import label_loss
from aum_compress.workspace import Workspace

RATIOS = (0.125, 0.25, 0.5)
NAME = "prune-sensitivity"


def prune_sensitivity(
    space: Workspace,
    bundle: Bundle,
    *,
    ratios: Sequence[float] = RATIOS,
    importance: Importance = "taylor",
    clips: int = 256,
    round_to: int = 8,
) -> tuple[dict[str, Any], list[Path]]:
    """Each dimension of each block and stage by itself, left smaller by each of `ratios`, without training after it.

    Loss is cross-entropy against labels, on validation clips, or on training clips where there are none.

    Returns:
        What was found, as JSON, and the files with it: `runs/<recipe>/prune-sensitivity.json` and `.html`.

    Raises:
        AumError: a bundle that holds no Audio Mamba in float32, or one of other labels or features than the recipe's;
            ratios that are none.
    """
    if space.recipe.threads:
        torch.set_num_threads(space.recipe.threads)
    space.prepare()
    card = bundle.card
    if not isinstance(card.model, AudioMambaConfig) or card.kind != "model" or card.quantized_layers:
        raise AumError(
            f"{bundle.path}: holds {card.kind} {card.precision} of a {card.model.family}; wanted a bundle of an Audio "
            "Mamba before quantisation, such as 03-student, 04-distill or 05-prune"
        )
    require_same_data(space, bundle)
    if bad := [ratio for ratio in ratios if not 0 < ratio < 1]:
        raise AumError(f"ratios: found {', '.join(map(str, bad))}, wanted shares above 0 and below 1")
    part = "validation" if len(space.parts.validation) else "train"
    model, cost = bundle.load_model(), costing(space.recipe, card.input.clip_seconds)
    # everything down to its last multiple, so that every ratio has a size near to it
    share = 1 - 1e-6
    left = room(model.config, kinds_of(CHOICES), round_to, share_floors(model.config, share), fewest_blocks=0)
    losses = _label_losses(space, part, clips)
    base = mean_loss(model, losses)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    with progress(f"prune: sensitivity of {bundle.path.name}") as reporter:
        tried = list(
            try_ratios(
                model,
                losses,
                importance=importance,
                room=left,
                ratios=ratios,
                costing=cost,
                advance=reporter.advance,
            )
        )
    before = cost(card.model)
    found = {
        "bundle": str(bundle.path),
        "recipe": space.recipe.name,
        "part": part,
        "clips": len(losses.x),
        "importance": importance,
        "loss": base,
        "precision": cost.precision,
        "param_bytes": before.param_bytes,
        "macs": before.macs,
        "dimensions": [
            {
                "place": one.place,
                "kind": one.kind,
                "size": one.size,
                "new_size": one.new_size,
                "ratio": round(one.ratio, 4),
                "loss_increase": one.loss_increase,
                "param_bytes": one.cost.param_bytes,
                "macs": one.cost.macs,
            }
            for one in tried
        ],
        "not_tried": [  # no smaller multiple is left
            {"place": d.place, "kind": d.kind, "size": d.size * d.width, "multiple": multiple_of(d, round_to) * d.width}
            for d in dimensions(card.model)
            if d.place not in left.sizes
        ],
    }
    files = {".json": json.dumps(found, indent=1) + "\n", ".html": sensitivity_html(found)}
    written = []
    for ending, text in files.items():
        path = space.runs / f"{NAME}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    log(f"prune: wrote {written[0]} and {written[1].name}")
    return found, written


def _label_losses(space: Workspace, part: str, clips: int) -> TrainingLosses:
    cached = getattr(space.parts, part)
    rows = space.spread(len(cached), clips)
    number = {label: place for place, label in enumerate(space.labels)}
    targets = torch.tensor([number[cached.clips[row].label] for row in rows])
    features = torch.from_numpy(space.normalised(part, clips))
    return TrainingLosses(features, targets, lambda found, wanted, rows: label_loss(found, wanted))
