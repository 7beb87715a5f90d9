"""Selective scan on one CPU thread: forward and backward with discretisation, time and peak memory.

    python benchmarks/scan.py [--seconds 2] [--out benchmarks/scan.json]

Compares the published reference formulation, two loops in plain torch and the fused kernel, after each has agreed with
the float64 oracle. Time is the fastest run within `--seconds` (slower ones measure what else the machine does); peak
memory is what torch allocates beyond the inputs (the kernel's scratch comes from torch too). For scale stands what one
core needs for parts of the work: torch's own vectorised exp on as many numbers (the fused kernel takes three
exponentials for each of B*L*D*N states: one forward, two backward), and all inputs and outputs through memory once.
"""

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from aum_compress.kernels import build, cpu
from aum_compress.models.scan import selective_scan_oracle
from aum_compress.models.scan_loop import scan_loop_backward, scan_loop_forward

SHAPES = {"B16 L256 D96 N16": (16, 256, 96, 16), "B16 L64 D64 N8": (16, 64, 64, 8)}
LOOPS = ("loop, unbind", "loop, own backward")


def reference(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor, softplus: bool
) -> Tensor:
    """mamba_ssm 2.2's `selective_scan_ref`, A real, B and C variable: (B,D,L,N) tensors, indexed step by step."""
    delta = delta + bias[..., None]
    delta = F.softplus(delta) if softplus else delta
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    drive = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    state, outputs = A.new_zeros(u.shape[0], *A.shape), []
    for i in range(u.shape[2]):
        state = decay[:, :, i] * state + drive[:, :, i]
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, :, i]))
    y = torch.stack(outputs, dim=2)
    return (y + u * D[:, None]) * F.silu(z)


def loop_unbind(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor, softplus: bool
) -> Tensor:
    """The same with one `unbind` in place of an index a step: its backward is one stack, linear in L."""
    delta = delta + bias[..., None]
    delta = F.softplus(delta) if softplus else delta
    decay = torch.exp(torch.einsum("bdl,dn->bldn", delta, A))
    drive = torch.einsum("bdl,bnl->bldn", delta * u, B)
    state, states = A.new_zeros(u.shape[0], *A.shape), []
    for decay_t, drive_t in zip(decay.unbind(1), drive.unbind(1), strict=True):
        state = torch.addcmul(drive_t, decay_t, state)
        states.append(state)
    y = torch.einsum("bldn,bnl->bdl", torch.stack(states, dim=1), C)
    return (y + u * D[:, None]) * F.silu(z)


def by_autograd(scan: Callable[..., Tensor], inputs: list[Tensor], grad_y: Tensor) -> tuple[Tensor, ...]:
    """y and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = scan(*leaves, True)
    return y.detach(), *torch.autograd.grad(y, leaves, grad_y)


def runs(inputs: list[Tensor], grad_y: Tensor) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """What is measured; each call returns y and the eight gradients."""
    return {
        "selective_scan_ref": lambda: by_autograd(reference, inputs, grad_y),
        LOOPS[0]: lambda: by_autograd(loop_unbind, inputs, grad_y),
        LOOPS[1]: lambda: (scan_loop_forward(*inputs, True), *scan_loop_backward(grad_y, *inputs, True)),
        "fused": lambda: (cpu.scan_forward(*inputs, True), *cpu.scan_backward(grad_y, *inputs, True)),
    }


def random_inputs(batch: int, length: int, channels: int, state: int) -> list[Tensor]:
    """u, delta, A, B, C, D, z, delta_bias as a Mamba block has them at the start of training."""
    torch.manual_seed(0)
    rows, per_state = (batch, channels, length), (batch, state, length)
    A = -torch.arange(1.0, state + 1).repeat(channels, 1)
    tensors = (torch.randn(rows), torch.randn(rows) * 0.1, A, torch.randn(per_state), torch.randn(per_state))
    return [*tensors, torch.ones(channels), torch.randn(rows), torch.empty(channels).uniform_(-6.9, -2.3)]


def worst_error(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """Largest deviation of any result, relative to that result's largest element."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True))


def seconds(run: Callable[[], object], at_least: float) -> float:
    return min(Timer("run()", globals={"run": run}, num_threads=1).blocked_autorange(min_run_time=at_least).times)


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes that torch's allocator held at one time during `run`, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def for_scale(shape: tuple[int, int, int, int], tensor_bytes: int, at_least: float) -> dict[str, float]:
    """Milliseconds that one core needs for torch.exp on the same states, and to move every input and output once."""
    block, out = torch.full((1 << 16,), -0.5), torch.empty(1 << 16)  # 256 kB: no memory traffic beyond the L2 cache
    exp_seconds = seconds(lambda: torch.exp(block, out=out), at_least) / block.numel()
    large, copy = torch.empty(1 << 24), torch.empty(1 << 24)
    copy_seconds = seconds(lambda: copy.copy_(large), at_least) / (2 * large.nbytes)
    states = shape[0] * shape[1] * shape[2] * shape[3]
    return {"torch_exp_ms": 3e3 * states * exp_seconds, "traffic_ms": 1e3 * tensor_bytes * copy_seconds}


def machine() -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo")
    models = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")] if cpuinfo.is_file() else []
    return {
        "cpu": models[0].split(":", 1)[1].strip() if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch_simd": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def measure(name: str, at_least: float) -> dict[str, object]:
    inputs = random_inputs(*SHAPES[name])
    grad_y = torch.randn_like(inputs[0])
    exact = by_autograd(selective_scan_oracle, [x.double() for x in inputs], grad_y.double())
    rows = {}
    for label, run in runs(inputs, grad_y).items():
        results = run()
        rows[label] = {
            "ms": 1e3 * seconds(run, at_least),
            "peak_bytes": peak_bytes(run),
            "worst_error": worst_error(results, exact),
        }
        print(
            f"{name:18} {label:20} {rows[label]['ms']:9.2f} ms {rows[label]['peak_bytes'] / 1e6:8.1f} MB peak", end=""
        )
        print(f"   error {rows[label]['worst_error']:.0e}")
    fused, loops = rows["fused"], [rows[label] for label in LOOPS]
    parts = for_scale(SHAPES[name], sum(2 * x.nbytes for x in inputs) + 2 * grad_y.nbytes, at_least / 4)
    summary = {
        "times_faster_than_ref": rows["selective_scan_ref"]["ms"] / fused["ms"],
        "times_faster_than_best_loop": min(row["ms"] for row in loops) / fused["ms"],
        "share_of_leanest_loop_memory": fused["peak_bytes"] / min(row["peak_bytes"] for row in loops),
        "for_scale": parts,
    }
    print(
        f"{name:18} fused is {summary['times_faster_than_ref']:.0f} times faster than selective_scan_ref and "
        f"{summary['times_faster_than_best_loop']:.1f} times than the best loop, in "
        f"{100 * summary['share_of_leanest_loop_memory']:.0f} % of the leanest loop's memory; for scale: torch.exp "
        f"alone {parts['torch_exp_ms']:.2f} ms, memory traffic alone {parts['traffic_ms']:.2f} ms"
    )
    return {"results": rows, **summary}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each measurement, at the least")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler greets on stderr otherwise
    if build.library() is None:
        raise SystemExit("benchmarks/scan.py needs the fused kernel: install a C compiler, unset AUM_NO_KERNEL")
    report = {"machine": machine(), "threads": 1, "shapes": {name: measure(name, arguments.seconds) for name in SHAPES}}
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
