"""Logits of a torch model over cached clips."""

import numpy as np
import torch
from torch import nn

from aum_compress.audio.config import InputSpec
from aum_compress.console import Advance

BATCH = 64


def predict_logits(
    model: nn.Module, features: np.ndarray, spec: InputSpec, advance: Advance | None = None
) -> np.ndarray:
    """(n,C) float32 logits of `model` in evaluation mode, on a GPU where there is one; the model comes back to the CPU.

    Args:
        features: (n,F,T) log-mel as the cache holds it, not normalised.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    logits = []
    with torch.inference_mode():
        for start in range(0, len(features), BATCH):
            x = torch.from_numpy(np.array(features[start : start + BATCH], dtype=np.float32)).to(device)
            logits.append(model((x[:, None] - spec.mean) / spec.std).float().cpu().numpy())
            if advance:
                advance(min(start + BATCH, len(features)), len(features))
    model.cpu()
    return np.concatenate(logits)
