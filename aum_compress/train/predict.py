"""Logits and embeddings of a torch model over cached clips."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from aum_compress.audio.config import InputSpec
from aum_compress.console import Advance
from aum_compress.data.cache import CachedClips
from aum_compress.data.views import ViewedClips
from aum_compress.models.factory import Model
from aum_compress.train.distributed import ALONE, Ranks
from aum_compress.train.embedding import HeadInput, embedding_width

BATCH = 64
Features = np.ndarray | CachedClips | ViewedClips
"""(n,F,T) log-mel, not normalised: as the cache holds it, of all views one behind the other."""


def predict_logits(
    model: Model, features: Features, spec: InputSpec, advance: Advance | None = None, ranks: Ranks = ALONE
) -> np.ndarray:
    """(n,C) float32 logits of `model` in evaluation mode, on a GPU where there is one; the model comes back to the CPU.

    Args:
        ranks: processes that all call this with the same model and features. Each computes its share of the batches
            that one process would compute, so the logits, which all of them get, are the same.
    """
    return _predict(model, model, model.config.n_classes, features, spec, advance, ranks)


def predict_with_embeddings(
    model: Model, features: Features, spec: InputSpec, advance: Advance | None = None, ranks: Ranks = ALONE
) -> tuple[np.ndarray, np.ndarray]:
    """The same logits and, from the same pass, the (n,E) float32 embeddings that the head makes them of."""
    classes, width = model.config.n_classes, embedding_width(model)
    seen = HeadInput(model)
    try:
        both = _predict(
            *(model, lambda x: torch.cat([model(x).float(), seen.value.float()], dim=1)),
            *(classes + width, features, spec, advance, ranks),
        )
    finally:
        seen.remove()
    return both[:, :classes].copy(), both[:, classes:].copy()


def _predict(
    model: Model,
    forward: Callable[[Tensor], Tensor],
    width: int,
    features: Features,
    spec: InputSpec,
    advance: Advance | None,
    ranks: Ranks,
) -> np.ndarray:
    """(n,width) of what `forward` makes of normalised features (B,1,F,T)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    starts = range(0, len(features), BATCH)
    own = starts[ranks.rank :: ranks.size]
    found = [np.empty((0, width), dtype=np.float32)]
    with torch.inference_mode():
        for done, start in enumerate(own, start=1):
            x = torch.from_numpy(np.array(features[start : start + BATCH], dtype=np.float32)).to(device)
            found.append(forward((x[:, None] - spec.mean) / spec.std).float().cpu().numpy())
            if advance:
                advance(min(done * ranks.size * BATCH, len(features)), len(features))
    model.cpu()
    row = np.arange(len(features))
    places = [row[row // BATCH % ranks.size == rank] for rank in range(ranks.size)]
    return ranks.gather(np.concatenate(found), places)
