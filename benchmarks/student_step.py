"""A training step of the students beside CP-Mobile's, interleaved on one CPU thread, and where its time goes.

    python benchmarks/student_step.py [--rounds 30] [--out benchmarks/student_step.json]

32 clips of one second as features (256, 65). A step is forward, cross-entropy, backward, clipping of the gradient and
AdamW, on channels-last weights with freed memory kept, as in a training of the package. Rounds take the networks in
turn; the median over rounds counts. Where the time goes is torch's profiler, by kind of operator.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from scan import machine

from aum_compress.models.factory import build_model
from aum_compress.models.presets import PRESETS, front_end_of
from aum_compress.train.allocator import keep_freed_memory
from aum_compress.train.module import parameter_groups

BATCH, CLASSES = 32, 10
RIVAL = "cp-mobile"
NETWORKS = (RIVAL, "student-int8", "student-fp16", "student-edge")
PROFILED = 5
KINDS = {
    "convolution": ("convolution", "mkldnn"),
    "batch normalisation": ("batch_norm",),
    "ReLU": ("clamp_min", "threshold", "relu"),
    "scan": ("selective_scan", "two_way_scan"),
    "linear": ("mm", "linear"),
    "copies and flips": ("copy_", "flip", "contiguous", "clone"),
    "optimiser": ("adam", "foreach", "_norm"),
}
"""Kind -> parts of the names of torch's operators, the first that fits."""


def step_of(name: str) -> Callable[[], None]:
    torch.manual_seed(0)
    front_end = front_end_of(name)
    shape = (front_end.n_mels, front_end.n_frames(1.0))
    model = build_model(PRESETS[name](*shape, CLASSES)).train()
    model = model.to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(parameter_groups(model, 1e-3), lr=1e-4)
    features, labels = torch.randn(BATCH, 1, *shape), torch.randint(CLASSES, (BATCH,))

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(model(features), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()

    return step


def shares(step: Callable[[], None]) -> dict[str, float]:
    """Percent of a step's processor time by kind of operator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(PROFILED):
            step()
    found = dict.fromkeys((*KINDS, "everything else"), 0.0)
    for event in profile.key_averages():
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.key.lower() for part in parts)), None)
        found[kind or "everything else"] += event.self_cpu_time_total
    whole = sum(found.values())
    return {kind: round(100 * time / whole, 1) for kind, time in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    steps = {name: step_of(name) for name in NETWORKS}
    times: dict[str, list[float]] = {name: [] for name in NETWORKS}
    for number in range(arguments.rounds + 2):
        for name, step in steps.items():
            begin = perf_counter()
            step()
            if number >= 2:  # the first ones plan convolutions and fetch memory
                times[name].append(perf_counter() - begin)
    results = {}
    for name in NETWORKS:
        seconds = median(times[name])
        ratio = median(own / rival for own, rival in zip(times[name], times[RIVAL], strict=True))
        results[name] = {
            "step_ms": 1e3 * seconds,
            "clips_per_second": BATCH / seconds,
            "clips_against_cp_mobile": 1 / ratio,
            "share_percent": shares(steps[name]),
        }
        print(f"{name:13} {1e3 * seconds:7.1f} ms  {BATCH / seconds:6.0f} clips/s  {1 / ratio:.2f} of CP-Mobile's")
        print("   ", ", ".join(f"{kind} {share}" for kind, share in results[name]["share_percent"].items()))
    report = {"machine": machine(), "threads": 1, "batch": BATCH, "rounds": arguments.rounds, "results": results}
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
