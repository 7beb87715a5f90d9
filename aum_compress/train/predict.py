"""Logits of a torch model over cached clips."""

import numpy as np
import torch

from aum_compress.audio.config import InputSpec
from aum_compress.console import Advance
from aum_compress.models.factory import Model
from aum_compress.train.distributed import ALONE, Ranks

BATCH = 64


def predict_logits(
    model: Model, features: np.ndarray, spec: InputSpec, advance: Advance | None = None, ranks: Ranks = ALONE
) -> np.ndarray:
    """(n,C) float32 logits of `model` in evaluation mode, on a GPU where there is one; the model comes back to the CPU.

    Args:
        features: (n,F,T) log-mel as the cache holds it, not normalised.
        ranks: processes that all call this with the same model and features. Each computes its share of the batches
            that one process would compute, so the logits, which all of them get, are the same.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    starts = range(0, len(features), BATCH)
    own = starts[ranks.rank :: ranks.size]
    logits = [np.empty((0, model.config.n_classes), dtype=np.float32)]
    with torch.inference_mode():
        for done, start in enumerate(own, start=1):
            x = torch.from_numpy(np.array(features[start : start + BATCH], dtype=np.float32)).to(device)
            logits.append(model((x[:, None] - spec.mean) / spec.std).float().cpu().numpy())
            if advance:
                advance(min(done * ranks.size * BATCH, len(features)), len(features))
    model.cpu()
    row = np.arange(len(features))
    places = [row[row // BATCH % ranks.size == rank] for rank in range(ranks.size)]
    return ranks.gather(np.concatenate(logits), places)
