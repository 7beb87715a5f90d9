"""A whole training step of the student on one CPU thread, split into stem, scan and what lies between.

    python benchmarks/train_step.py [--seconds 10] [--out benchmarks/train_step.json]

The preset `student` reads 32 clips of 1 s as features of 256 mel bins and 64 frames. It makes 64 tokens of them where
its stem keeps every frame, 256 where each cell of the stem's 8 x 32 map is a token. A step is forward, cross-entropy,
backward and AdamW, without augmentation. It is measured with the fused scan, with the loop that stands in where there
is no compiler, and, for scale, with mamba_ssm's published reference formulation. Of each the fastest step within
`--seconds` is kept, after one that is not counted; the reference's steps last seconds, so it has few.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from scan import machine, reference
from torch import Tensor

from aum_compress.kernels import build, cpu
from aum_compress.models import scan
from aum_compress.models.factory import Model, build_model
from aum_compress.models.presets import PRESETS
from aum_compress.models.scan_loop import scan_loop_backward, scan_loop_forward
from aum_compress.train.module import parameter_groups

BATCH, MELS, FRAMES, CLASSES = 32, 256, 64, 10
TOKENS = (64, 256)
OPERATOR = scan._scan
ROUTES = {"fused": (cpu.scan_forward, cpu.scan_backward), "loop": (scan_loop_forward, scan_loop_backward)}


class TimedScan(torch.autograd.Function):
    """`compute` with its seconds, forward and backward, added to `clock["scan"]`."""

    @staticmethod
    def forward(ctx, clock: dict[str, float], compute: Callable[..., Tensor], softplus: bool, *inputs: Tensor | None):
        ctx.leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
        start = perf_counter()
        with torch.enable_grad():
            ctx.y = compute(*ctx.leaves, softplus)
        clock["scan"] += perf_counter() - start
        ctx.clock = clock
        return ctx.y.detach()

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        start = perf_counter()
        gradients = iter(torch.autograd.grad(ctx.y, [x for x in ctx.leaves if x is not None], grad_y))
        ctx.clock["scan"] += perf_counter() - start
        return None, None, None, *(None if x is None else next(gradients) for x in ctx.leaves)


def reference_without_bias(*arguments: Tensor | bool | None) -> Tensor:
    """The reference formulation; our mixer has added the step size's bias before."""
    *inputs, bias, softplus = arguments
    assert bias is None
    return reference(*inputs, torch.zeros(inputs[0].shape[1]), softplus)


def time_stem(model: Model, clock: dict[str, float]) -> Callable[[], None]:
    """Adds the stem's seconds to `clock["stem"]`; the function given back is to be called after each backward."""
    marks = {}

    def begin(*_: object) -> None:
        marks["forward"] = perf_counter()

    def end(_module: object, _inputs: object, tokens: Tensor) -> None:
        clock["stem"] += perf_counter() - marks["forward"]
        tokens.register_hook(lambda gradient: marks.update(backward=perf_counter()))

    def after_backward() -> None:
        clock["stem"] += perf_counter() - marks["backward"]  # the stem comes last

    model.patch_embed.register_forward_pre_hook(begin)
    model.patch_embed.register_forward_hook(end)
    return after_backward


def student(tokens: int) -> Model:
    """The preset, with a stem that gives so many tokens."""
    config = PRESETS["student"](MELS, FRAMES, CLASSES)
    first, *others = config.stem.stages
    every_frame = {"stages": (first.model_copy(update={"stride_frames": 1}), *others)}
    stem = config.stem.model_copy(update=every_frame if tokens == FRAMES else {"token": "cell"})
    model = build_model(config.model_copy(update={"stem": stem}))
    assert model.config.n_tokens == tokens
    return model.train().to(memory_format=torch.channels_last)


def measure(tokens: int, name: str, at_least: float) -> dict[str, float]:
    """Milliseconds of the fastest step and of its parts."""
    torch.manual_seed(0)
    model = student(tokens)
    features, labels = torch.randn(BATCH, 1, MELS, FRAMES), torch.randint(CLASSES, (BATCH,))
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-3)
    clock = dict.fromkeys(("stem", "scan", "optimizer"), 0.0)
    after_backward = time_stem(model, clock)
    compute = reference_without_bias if name == "reference" else OPERATOR
    scan._implementation = lambda u, A: ROUTES[name]
    scan._scan = lambda *arguments: TimedScan.apply(clock, compute, arguments[-1], *arguments[:-1])

    def step() -> dict[str, float]:
        clock.update(dict.fromkeys(clock, 0.0))
        start = perf_counter()
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(features), labels).backward()
        after_backward()
        update = perf_counter()
        optimizer.step()
        end = perf_counter()
        clock["optimizer"] = end - update
        between = end - start - sum(clock.values())
        return {"step": end - start, **clock, "projections": between}

    found, began = [step()], perf_counter()
    while perf_counter() - began < at_least:
        found.append(step())
    best = min(found[1:], key=lambda parts: parts["step"])
    return {f"{part}_ms": 1e3 * seconds for part, seconds in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="time spent on each measurement, at the least")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if build.library() is None:
        raise SystemExit("benchmarks/train_step.py needs the fused kernel: install a C compiler, unset AUM_NO_KERNEL")
    steps = {}
    for tokens in TOKENS:
        rows = {name: measure(tokens, name, arguments.seconds) for name in (*ROUTES, "reference")}
        for name, parts in rows.items():
            print(f"{tokens:4} tokens  {name:10}", *(f"{part[:-3]} {ms:8.1f} ms  " for part, ms in parts.items()))
        faster = {f"times_faster_than_{name}": rows[name]["step_ms"] / rows["fused"]["step_ms"] for name in rows}
        del faster["times_faster_than_fused"]
        steps[f"{tokens} tokens"] = {"results": rows, **faster}
        print(
            f"{tokens:4} tokens  fused:", *(f"{key.replace('_', ' ')} {ratio:.1f}  " for key, ratio in faster.items())
        )
    settings = {"threads": 1, "batch": BATCH, "mels": MELS, "preset": "student", "seconds": arguments.seconds}
    report = {
        "machine": machine(),
        **settings,
        "projections": "all between stem and scan: linear layers, convolutions, gates, norms, head and loss",
        "steps": steps,
    }
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
