"""An estimate of the time for one clip on one x86 core, from configuration alone. Torch-free.

Linear in what an exported fp32 file makes onnxruntime do: so many microseconds for each term. Fitted and held against
configurations that it was not fitted on by `benchmarks/latency_model.py`, which also says how far off it is.
"""

from aum_compress.budget.analytic import analytic_macs
from aum_compress.models.config import AudioMambaConfig, BlockConfig, Mamba2BlockConfig

MICROSECONDS: dict[str, float] = {
    "run": 15.3,
    "conv_macs": 4.83e-06,
    "depthwise_macs": 6.87e-05,
    "stem_stages": 5.98,
    "linear_macs": 5.26e-06,
    "scan_steps": 1.17,
    "scan_states": 0.000569,
    "scan_activations": 0.00493,
    "scan_directions": 13.4,
    "ssd_macs": 1.3e-05,
    "ssd_decays": 0.000764,
    "ssd_blocks": 21.6,
    "conv_blocks": 4.77,
    "activations": 0.00151,
}
"""Term -> cost of one."""


def latency_terms(config: AudioMambaConfig) -> dict[str, int]:
    """Term -> how many of them one clip takes.

    `run`: one. `conv_macs`, `depthwise_macs`, `stem_stages`: of the stem. `linear_macs`: of all other matrices.
    `scan_steps`: of every block, both directions in one, each over all its sequences; `scan_states`: values of the
    state written by them; `scan_activations`: values of width d_inner that surround them, once where directions share
    projections. `ssd_macs`, `ssd_decays`: the
    products of Mamba-2 and its exponentials. `activations`: values of width d_inner, of any mixer and direction.
    `scan_directions`, `ssd_blocks`, `conv_blocks`: sets of nodes, whatever their size.
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
        values = sequences * length * block.d_inner
        if isinstance(block, BlockConfig):
            directions = len(block.scans)
            terms["scan_steps"] += length
            terms["scan_states"] += values * directions * block.d_state
            terms["scan_directions"] += directions
            values *= len(block.projections)
            terms["scan_activations"] += values
        elif isinstance(block, Mamba2BlockConfig):
            terms["ssd_decays"] += sequences * length * length * block.n_heads
            terms["ssd_blocks"] += 1
        else:
            terms["conv_blocks"] += 1
        terms["activations"] += values
    return terms


def estimated_ms(config: AudioMambaConfig) -> float:
    """Milliseconds for one clip."""
    return sum(MICROSECONDS[term] * count for term, count in latency_terms(config).items()) / 1000
