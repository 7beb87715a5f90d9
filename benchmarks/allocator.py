"""What it gains, and costs, to keep freed memory in the process while a CPU trains.

    python benchmarks/allocator.py [--rounds 3] [--seconds 10] [--out benchmarks/allocator.json]

A step is forward, cross-entropy, backward and AdamW of a batch of 32 clips of 1 s (256 mel bins, 65 frames), on one
thread, without augmentation. Each measurement is a process of its own, since what malloc was told cannot be taken
back; in each round all ways are measured in turn, so that other work on the machine falls on all alike. Of each way the
median over rounds is reported: milliseconds of the median step, milliseconds of CPU time a step by user and system
(which other processes disturb less), page faults a step, and the largest memory of the process.

Ways: `malloc as it is`; `kept`, after `train.allocator.keep_freed_memory()`; `kept, denormals flushed`, with
`torch.set_flush_denormal(True)` too.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from scan import machine

BATCH, MELS, FRAMES, CLASSES = 32, 256, 65, 10
PRESETS = ("student", "cp-mobile")
WAYS = ("malloc as it is", "kept", "kept, denormals flushed")


def measure(preset: str, way: str, seconds: float) -> dict[str, float]:
    """In this process."""
    import torch
    import torch.nn.functional as F

    from aum_compress.models.factory import build_model
    from aum_compress.models.presets import PRESETS as CONFIGS
    from aum_compress.train.allocator import keep_freed_memory
    from aum_compress.train.module import parameter_groups

    torch.set_num_threads(1)
    if way != WAYS[0] and not keep_freed_memory():
        raise SystemExit("benchmarks/allocator.py needs glibc and no MALLOC_ variable in the environment")
    if way == WAYS[2]:
        torch.set_flush_denormal(True)
    torch.manual_seed(0)
    model = build_model(CONFIGS[preset](MELS, FRAMES, CLASSES)).train().to(memory_format=torch.channels_last)
    features, labels = torch.randn(BATCH, 1, MELS, FRAMES), torch.randint(CLASSES, (BATCH,))
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-3)

    def step() -> float:
        start = perf_counter()
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(features), labels).backward()
        optimizer.step()
        return perf_counter() - start

    for _ in range(3):
        step()
    before, steps = resource.getrusage(resource.RUSAGE_SELF), []
    while sum(steps) < seconds:
        steps.append(step())
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "step_ms": 1e3 * statistics.median(steps),
        "user_ms": 1e3 * (after.ru_utime - before.ru_utime) / len(steps),
        "system_ms": 1e3 * (after.ru_stime - before.ru_stime) / len(steps),
        "page_faults": (after.ru_minflt - before.ru_minflt) / len(steps),
        "peak_mb": after.ru_maxrss / 1e3,
    }


def in_a_process(preset: str, way: str, seconds: float) -> dict[str, float]:
    words = [sys.executable, __file__, "--seconds", str(seconds), "--measure", preset, way]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--measure", nargs=2, metavar=("PRESET", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure, arguments.seconds)))
        return
    found: dict[str, dict[str, list[dict[str, float]]]] = {p: {way: [] for way in WAYS} for p in PRESETS}
    load = [os.getloadavg()[0]]
    for number in range(arguments.rounds):
        for preset in PRESETS:
            for way in WAYS:
                row = in_a_process(preset, way, arguments.seconds)
                found[preset][way].append(row)
                print(f"{number} {preset:10} {way:24}", *(f"{key} {value:9.1f} " for key, value in row.items()))
        load.append(os.getloadavg()[0])
    medians = {
        preset: {
            way: {key: round(statistics.median(row[key] for row in rows), 1) for key in rows[0]}
            for way, rows in ways.items()
        }
        for preset, ways in found.items()
    }
    settings = {"threads": 1, "batch": BATCH, "mels": MELS, "frames": FRAMES}
    settings |= {"rounds": arguments.rounds, "seconds": arguments.seconds, "load_average": [round(x, 1) for x in load]}
    report = {"machine": machine(), **settings, "medians": medians, "rounds_in_turn": found}
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
