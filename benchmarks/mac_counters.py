"""What MAC counters print for AuM-Small and for CP-Mobile, beside our own count.

    pip install thop ptflops      # neither is a dependency of aum-compress
    python benchmarks/mac_counters.py [--out benchmarks/mac_counters.json]

Each tool is used as its README says, on the model as it is: no handlers of ours. Figures are multiply-accumulates for
one input, as the tool prints them; torch's FlopCounterMode counts two operations for each, so it is halved.

Our mixer calls every projection as a module. The published one (`Mamba.forward` in AuM's vim-mamba_ssm, its fast path)
takes the weights out of the modules and hands them to one autograd function, `mamba_inner_fn_no_out_proj`; the case
"weights as published" computes the same logits in that way, with torch's own operators in place of the CUDA kernels.
"""

import argparse
import contextlib
import io
import json
import os
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import ptflops
import thop
import torch
import torch.nn.functional as F
import torchinfo
from fvcore.nn import FlopCountAnalysis
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from aum_compress.budget.analytic import analytic_macs, scan_macs
from aum_compress.models.config import AudioMambaConfig, CPMobileConfig
from aum_compress.models.factory import Model, build_model
from aum_compress.models.mamba import MambaMixer
from aum_compress.models.presets import PRESETS
from aum_compress.models.scan import selective_scan

PUBLISHED = "AuM-Small, 65 tokens, weights as published"
CASES = {
    "AuM-Small, 65 tokens": ("aum-small", 256, 65, 10),
    PUBLISHED: ("aum-small", 256, 65, 10),
    "AuM-Small, 513 tokens": ("aum-small", 128, 1024, 527),
    "CP-Mobile": ("cp-mobile", 256, 65, 10),
}
"""Title -> preset, mel bins, frames, classes. 513 tokens are AuM's own: ten seconds, AudioSet's labels."""


class InnerFunction(torch.autograd.Function):
    """Convolution, projections and scan of one direction, (B,2D,L) -> (B,D,L), out of every tool's sight."""

    @staticmethod
    def forward(ctx, xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D):
        x, z = xz.chunk(2, dim=1)
        d_inner, taps = D.numel(), conv_weight.shape[2]
        u = F.silu(F.conv1d(x, conv_weight, conv_bias, padding=taps - 1, groups=d_inner)[..., : x.shape[2]])
        dt, b, c = (u.transpose(1, 2) @ x_proj.T).split([dt_proj.shape[1], *[A_log.shape[1]] * 2], dim=2)
        delta = (dt @ dt_proj.T + dt_bias).transpose(1, 2)
        A = -torch.exp(A_log)
        return selective_scan(u, delta, A, b.transpose(1, 2), c.transpose(1, 2), D, z, delta_softplus=True)


def published_forward(self: MambaMixer, tokens: Tensor) -> Tensor:
    """`MambaMixer.forward` for block type v2, (B,L,M) -> (B,L,M), without a call of any module."""
    xz = (self.in_proj.weight @ tokens.transpose(1, 2)).contiguous()

    def direction(xz: Tensor, suffix: str) -> Tensor:
        conv, dt_proj = getattr(self, f"conv1d{suffix}"), getattr(self, f"dt_proj{suffix}")
        projections = (getattr(self, f"x_proj{suffix}").weight, dt_proj.weight, dt_proj.bias)
        states = (getattr(self, f"A{suffix}_log"), getattr(self, f"D{suffix}"))
        return InnerFunction.apply(xz, conv.weight, conv.bias, *projections, *states)

    y = (direction(xz, "") + direction(xz.flip(-1), "_b").flip(-1)) * 0.5
    return F.linear(y.transpose(1, 2), self.out_proj.weight)


def built(title: str, config: AudioMambaConfig | CPMobileConfig) -> Model:
    torch.manual_seed(0)
    model = build_model(config).eval()
    if title == PUBLISHED:
        example = torch.randn(1, 1, config.n_mels, config.n_frames)
        with torch.no_grad():
            before = model(example)
            for block in model.layers:
                block.mixer.forward = published_forward.__get__(block.mixer)
            torch.testing.assert_close(model(example), before)
    return model


def by_torchinfo(model: Model, shape: tuple[int, ...]) -> int:
    return torchinfo.summary(model, input_size=shape, verbose=0).total_mult_adds


def by_thop(model: Model, shape: tuple[int, ...]) -> int:
    return int(thop.profile(model, inputs=(torch.zeros(shape),), verbose=False)[0])


def by_ptflops(backend: str) -> Callable[[Model, tuple[int, ...]], int]:
    def count(model: Model, shape: tuple[int, ...]) -> int:
        found, _ = ptflops.get_model_complexity_info(
            model, shape[1:], as_strings=False, print_per_layer_stat=False, backend=backend
        )
        return int(found)

    return count


def _fvcore(model: Model, shape: tuple[int, ...]) -> FlopCountAnalysis:
    analysis = FlopCountAnalysis(model, torch.zeros(shape))
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")


def by_fvcore(model: Model, shape: tuple[int, ...]) -> int:
    return int(_fvcore(model, shape).total())


def by_flop_counter(model: Model, shape: tuple[int, ...]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(shape))
    return counter.get_total_flops() // 2


def ours(model: Model, shape: tuple[int, ...]) -> int:
    return sum(analytic_macs(model.config).values())


COUNTERS: dict[str, Callable[[Model, tuple[int, ...]], int]] = {
    "aum-compress": ours,
    "torchinfo": by_torchinfo,
    "thop": by_thop,
    "ptflops, pytorch": by_ptflops("pytorch"),
    "ptflops, aten": by_ptflops("aten"),
    "fvcore": by_fvcore,
    "FlopCounterMode / 2": by_flop_counter,
}


def parts(config: object) -> dict[str, int]:
    """Of our own count: what the scans cost, and all else."""
    macs = sum(analytic_macs(config).values())
    scans = 0
    if isinstance(config, AudioMambaConfig):
        scans = sum(
            len(block.scans) * scan_macs(block.d_inner, block.d_state, config.n_tokens) for block in config.blocks
        )
    return {"scans": scans, "linear and convolution": macs - scans}


def measure(title: str, preset: str, n_mels: int, n_frames: int, n_classes: int) -> dict[str, object]:
    config = PRESETS[preset](n_mels, n_frames, n_classes)
    found: dict[str, int | str] = {}
    for name, count in COUNTERS.items():
        model = built(title, config)  # afresh: thop and ptflops leave hooks and buffers behind
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found[name] = count(model, (1, 1, n_mels, n_frames))
        except Exception as error:  # what a tool prints when it cannot count is its answer
            found[name] = f"{type(error).__name__}: {error}"
    analysis = _fvcore(built(title, config), (1, 1, n_mels, n_frames))
    analysis.total()
    parameters = sum(p.numel() for p in build_model(config).parameters())
    return {
        "input": [1, 1, n_mels, n_frames],
        "tokens": config.n_tokens if isinstance(config, AudioMambaConfig) else None,
        "parameters": parameters,
        "macs": found,
        "ours by part": parts(config),
        "fvcore leaves out": dict(analysis.unsupported_ops()),
    }


def machine() -> dict[str, str]:
    names = ("torch", "torchinfo", "thop", "ptflops", "fvcore", "numpy")
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cases = {title: measure(title, *case) for title, case in CASES.items()}
    for title, found in cases.items():
        print(title)
        reference = found["macs"]["aum-compress"]
        for name, macs in found["macs"].items():
            share = "" if isinstance(macs, str) else f"{macs / reference:8.1%}"
            print(f"  {name:22} {macs if isinstance(macs, str) else f'{macs:,}':>18} {share}")
    arguments.out.write_text(json.dumps({"machine": machine(), "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
