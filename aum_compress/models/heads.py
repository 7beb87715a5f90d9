"""From the pooled token to logits."""

from torch import Tensor, nn

from aum_compress.models.config import MLP_HEAD_WIDTH, AudioMambaConfig

DROPOUT = 0.3


class MlpHead(nn.Module):
    """(B,M) -> (B,C): LayerNorm, dropout, 512 units, ReLU, dropout, classes."""

    def __init__(self, d_model: int, n_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.hidden = nn.Linear(d_model, MLP_HEAD_WIDTH)
        self.classes = nn.Linear(MLP_HEAD_WIDTH, n_classes)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, pooled: Tensor) -> Tensor:
        hidden = self.hidden(self.dropout(self.norm(pooled))).relu()
        return self.classes(self.dropout(hidden))


def build_head(config: AudioMambaConfig) -> nn.Linear | MlpHead:
    """The head that the configuration names, its last layer near zero, as AuM starts it."""
    head = (
        MlpHead(config.d_model, config.n_classes)
        if config.head == "mlp"
        else nn.Linear(config.d_model, config.n_classes)
    )
    last = head.classes if isinstance(head, MlpHead) else head
    nn.init.trunc_normal_(last.weight, std=0.02)
    nn.init.zeros_(last.bias)
    return head
