"""An estimate of the time for one clip on one core of a desktop CPU, from configuration alone. Torch-free.

Linear in what an exported fp32 file makes onnxruntime do: so many microseconds for each term. Fitted and held against
configurations that it was not fitted on by `benchmarks/latency_model.py`, which also says how far off it is.
"""

from aum_compress.budget.analytic import analytic_macs
from aum_compress.models.config import AudioMambaConfig, BlockConfig, Mamba2BlockConfig

MICROSECONDS: dict[str, float] = {
    "run": 1.0,
    "conv_macs": 1e-4,
    "depthwise_macs": 1e-4,
    "stem_stages": 1.0,
    "linear_macs": 1e-4,
    "scan_steps": 1.0,
    "scan_states": 1e-3,
    "ssd_macs": 1e-4,
    "ssd_decays": 1e-3,
    "activations": 1e-3,
    "directions": 1.0,
}
"""Term -> cost of one."""


def latency_terms(config: AudioMambaConfig) -> dict[str, int]:
    """Term -> how many of them one clip takes.

    `run`: one. `conv_macs`, `depthwise_macs`, `stem_stages`: of the stem. `linear_macs`: of all other matrices.
    `scan_steps`: of every scan, one after the other, each over all its sequences; `scan_states`: values of the state
    written by them. `ssd_macs`, `ssd_decays`: the products of Mamba-2 and its exponentials. `activations`: values of
    width d_inner, of each direction. `directions`: sets of nodes for one direction of one block.
    """
    terms = dict.fromkeys(MICROSECONDS, 0)
    terms["run"] = 1
    mixers = {f"layers.{number}.mixer" for number in range(len(config.blocks))}
    for name, macs in analytic_macs(config).items():
        if name.endswith("layers.1.0"):
            terms["depthwise_macs"] += macs
        elif name.startswith("patch_embed"):
            terms["conv_macs"] += macs
        elif name not in mixers:
            terms["linear_macs"] += macs
        elif isinstance(config.blocks[int(name.split(".")[1])], Mamba2BlockConfig):
            terms["ssd_macs"] += macs
    terms["stem_stages"] = len(config.stem.stages) if config.stem.kind == "conv" else 1
    for block in config.blocks:
        sequences, length = config.sequence(block)
        directions = 1
        if isinstance(block, BlockConfig):
            directions = len(block.scans)
            terms["scan_steps"] += directions * length
            terms["scan_states"] += directions * sequences * length * block.d_inner * block.d_state
        elif isinstance(block, Mamba2BlockConfig):
            terms["ssd_decays"] += sequences * length * length * block.n_heads
        terms["directions"] += directions
        terms["activations"] += directions * sequences * length * block.d_inner
    return terms


def estimated_ms(config: AudioMambaConfig) -> float:
    """Milliseconds for one clip."""
    return sum(MICROSECONDS[term] * count for term, count in latency_terms(config).items()) / 1000
