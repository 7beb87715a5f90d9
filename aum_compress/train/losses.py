"""Cross-entropy for hard or mixed labels, and the distillation loss."""

import torch.nn.functional as F
from torch import Tensor


def label_loss(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy, mean over the batch. Args: logits (B,C); targets (B,) indices, or (B,C) probabilities (mixup)."""
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)


def soften(logits: Tensor, temperature: float) -> Tensor:
    """softmax(logits / T): a teacher's targets, which may be blended as labels are. Args: logits (B,C)."""
    return F.softmax(logits / temperature, dim=-1)


def feature_loss(projected: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine, mean over the batch: 0 where both point the same way. Args: (B,E) each."""
    return 1 - F.cosine_similarity(projected, teacher, dim=-1).mean()


def distillation_loss(
    logits: Tensor,
    targets: Tensor,
    teacher: Tensor,
    *,
    label_weight: float,
    temperature: float,
    kl_reduction: str = "batchmean",
) -> Tensor:
    """lambda * CE + (1 - lambda) * T^2 * KL(teacher || student), both softened by T (Hinton et al. 2015).

    Args:
        logits: (B,C). targets: as in `label_loss`.
        teacher: (B,C) probabilities from `soften`. Those of a mixture of clips are the mixture of their probabilities,
            as in EfficientAT; a mixture of logits would be the targets of no clip at all.
        label_weight: lambda. kl_reduction: `batchmean`, the KL divergence proper; `mean` divides it by C as well, which
            is what `.mean()` does in CP-JKU's DCASE 2023 code.
    """
    student = F.log_softmax(logits / temperature, dim=-1)
    divergence = F.kl_div(student, teacher, reduction="batchmean") * temperature**2
    if kl_reduction == "mean":
        divergence = divergence / logits.shape[1]
    return label_weight * F.cross_entropy(logits, targets) + (1 - label_weight) * divergence
