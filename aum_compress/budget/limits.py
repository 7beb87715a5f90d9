"""Limits by name, each with the rule that it stands for and where that rule is written. Torch-free."""

from dataclasses import dataclass, replace

from aum_compress.budget.records import Limits
from aum_compress.errors import AumError


@dataclass(frozen=True)
class Rule:
    """A published rule about the size of a model."""

    limits: Limits
    words: str
    """As its authors put it."""
    source: str


RULES: dict[str, Rule] = {
    "dcase2025": Rule(
        Limits(),
        "MAX_PARAMS_MEMORY = 128_000; MAX_MACS = 30_000_000 (for each device's model, of one second of audio)",
        "CPJKU/dcase2025_task1_baseline, helpers/complexity.py",
    ),
    "dcase2024": Rule(
        Limits(),
        "max memory for model parameters: 128 kB (Kilobyte); max number of MACs for inference of a 1-second audio "
        "snippet: 30 MMACs (million MACs)",
        "CPJKU/dcase2024_task1_baseline, README.md",
    ),
    # what int8 means for biases: the baseline of that year stores theirs in 4 bytes (its first layer, 784 values and
    # 16 biases, is listed with 848 bytes), so that vectors may be wider and all else may not
    "dcase2022": Rule(
        Limits(max_param_bytes=None, max_params=128_000, int8_weights=True),
        "Maximum number of parameters 128000, for ALL parameters, and the used variable type is fixed into INT8; "
        "maximum number of MACS per inference: 30 MMAC (million MACs); the analysis segment length is 1 s",
        "marmoi/dcase2022_task1_baseline, README.md",
    ),
}
"""Name -> rule. DCASE 2023's is absent: no wording of it was at hand that says what it limits."""

DEFAULT_RULE = "dcase2025"


def named_limits(name: str = DEFAULT_RULE, max_param_bytes: int | None = None, max_macs: int | None = None) -> Limits:
    """Limits of a rule, with those of its values replaced that are given here.

    Raises:
        AumError: no such rule.
    """
    if name not in RULES:
        raise AumError(
            f"no limit is named {name!r}; there are {', '.join(RULES)}; others are set by max_param_bytes and max_macs "
            "(--max-param-bytes, --max-macs)"
        )
    given = {"max_param_bytes": max_param_bytes, "max_macs": max_macs}
    return replace(RULES[name].limits, **{key: value for key, value in given.items() if value is not None})
