"""Training of AuM-Small and AuM-Base on one CUDA GPU: clips a second and peak memory, mamba-ssm against the loop.

    python benchmarks/gpu_training.py [--memory-gb 16] [--seconds 10] [--out benchmarks/gpu_training.json]

A step is what a recipe with `precision: bf16-mixed` does with 128 clips of features: forward and cross-entropy under
autocast and backward, a micro-batch at a time with gradients accumulated, then clipping and AdamW; no augmentation, no
data loading. The route `kernels` is mamba-ssm and causal-conv1d, `loop` the same model as under AUM_NO_KERNEL=1. For
each of them, with and without activation checkpointing, the largest micro-batch (a power of two) is found that stays
within `--memory-gb`; torch's allocator is held to that limit, so that a larger card stands for a smaller one. With it
steps are timed for `--seconds`, after one that is not counted; the fastest is kept.

The inputs are 1 s through the DCASE front-end and 10.24 s through AuM's own: 65 and 513 tokens. `--device cpu --tiny`
runs two tiny models on the CPU; it shows that the script works, nothing else.
"""

import argparse
import gc
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from unittest.mock import patch

import torch
import torch.nn.functional as F
from scan import machine, peak_bytes
from torch import Tensor

from aum_compress.kernels import build, cuda
from aum_compress.models.audio_mamba import AudioMamba
from aum_compress.models.config import AudioMambaConfig
from aum_compress.models.presets import PRESET_FRAMES, PRESET_MELS, PRESETS, aum
from aum_compress.train.module import parameter_groups

INPUTS = {"1 s": (PRESET_MELS, PRESET_FRAMES), "10 s": (128, 1024)}
"""Mel bins and frames."""
N_CLASSES = 527
MODELS = ("aum-small", "aum-base")
ROUTES = ("kernels", "loop")
CLIPS_A_STEP = 128
TINY_CLIPS_A_STEP = 4


class Training:
    """A model with its optimiser and one micro-batch's worth of random clips, on `device`."""

    def __init__(self, config: AudioMambaConfig, device: torch.device, *, checkpointing: bool) -> None:
        torch.manual_seed(0)
        self.device = device
        # the format that training brings models into
        self.model = AudioMamba(config).train().to(device, memory_format=torch.channels_last)
        self.model.activation_checkpointing = checkpointing
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, 0.05), lr=1e-4)

    def step(self, micro_batch: int, accumulate: int) -> None:
        """One update of the weights from `micro_batch * accumulate` clips."""
        config = self.model.config
        features = torch.randn(micro_batch, 1, config.n_mels, config.n_frames, device=self.device)
        labels = torch.randint(config.n_classes, (micro_batch,), device=self.device)
        for _ in range(accumulate):
            with torch.autocast(self.device.type, torch.bfloat16):
                logits = self.model(features)
            (F.cross_entropy(logits.float(), labels) / accumulate).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def peak(self, micro_batch: int) -> int:
        """Most bytes that torch's tensors took during an accumulated step, the model's own among them."""
        if self.device.type == "cpu":
            return self._state_bytes() + peak_bytes(lambda: self.step(micro_batch, 2))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.step(micro_batch, 2)
        return torch.cuda.max_memory_allocated()

    def _state_bytes(self) -> int:
        moments = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return sum(t.nbytes for t in [*self.model.parameters(), *moments])

    def clips_per_second(self, micro_batch: int, clips: int, at_least: float) -> float:
        """Of the fastest step within `at_least` seconds, after one that is not counted."""
        times: list[float] = []
        began = perf_counter()
        while len(times) < 2 or perf_counter() - began < at_least:
            start = perf_counter()
            self.step(micro_batch, clips // micro_batch)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(perf_counter() - start)
        return clips / min(times[1:])


def largest_micro_batch(peak: Callable[[int], int], limit_bytes: int, most: int) -> tuple[int, int]:
    """The largest power of two up to `most` whose `peak` stays within `limit_bytes`, and that peak; 0, 0 without one.

    Too much is a peak over the limit or torch's own out-of-memory error.
    """
    found = (0, 0)
    for exponent in range(int(math.log2(most)) + 1):
        try:
            bytes_taken = peak(2**exponent)
        except torch.OutOfMemoryError:
            break
        if bytes_taken > limit_bytes:
            break
        found = (2**exponent, bytes_taken)
    return found


@contextmanager
def route(name: str) -> Iterator[None]:
    """Within it, `loop` keeps all kernels out, as AUM_NO_KERNEL=1 does for a process."""
    with ExitStack() as stack:
        if name == "loop":
            stack.enter_context(patch.object(cuda, "scans", lambda u, A: False))
            stack.enter_context(patch.object(cuda, "convolves", lambda x, n_taps: False))
            stack.enter_context(patch.object(build, "library", lambda: None))
        yield


def measure(
    config: AudioMambaConfig, device: torch.device, *, checkpointing: bool, clips: int, limit_bytes: int, seconds: float
) -> dict[str, float | None]:
    """Largest micro-batch within the limit, its peak and the throughput with it (None where one clip is too much)."""
    gc.collect()  # a model that still hangs in a cycle would be counted
    training = Training(config, device, checkpointing=checkpointing)
    micro_batch, taken = largest_micro_batch(training.peak, limit_bytes, clips)
    speed = None
    if micro_batch:
        training.optimizer.zero_grad(set_to_none=True)  # what an attempt that ran out of memory has left
        speed = training.clips_per_second(micro_batch, clips, seconds)
    return {"micro_batch": micro_batch, "peak_bytes": taken, "clips_per_second": speed}


def times_faster(rows: list[dict]) -> list[dict]:
    """Clips a second by kernels, divided by those of the loop, for each model, input and checkpointing."""
    keys = ("model", "input", "checkpointing")
    loop = {tuple(r[k] for k in keys): r["clips_per_second"] for r in rows if r["route"] == "loop"}
    found = []
    for row in (r for r in rows if r["route"] == "kernels"):
        slow = loop.get(place := tuple(row[key] for key in keys))
        if slow and row["clips_per_second"]:
            found.append(dict(zip(keys, place, strict=True)) | {"times_faster": row["clips_per_second"] / slow})
    return found


def gpu() -> dict[str, object]:
    found = torch.cuda.get_device_properties(0)
    packages: dict[str, str | None] = {}
    for package in ("mamba-ssm", "causal-conv1d", "triton"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    capability = f"{found.major}.{found.minor}"
    return {
        "gpu": found.name,
        "gpu_bytes": found.total_memory,
        "capability": capability,
        "cuda": torch.version.cuda,
    } | {"packages": packages}


def checked(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Arguments that this machine can serve; ends with exit code 2 and the reason otherwise."""
    found = parser.parse_args(arguments)
    if found.device == "cpu":
        if not found.tiny:
            parser.error("--device cpu: the real models would take hours there; add --tiny to try the script itself")
        return found
    if not torch.cuda.is_available():
        parser.error(
            "no CUDA device found: this benchmark measures a GPU. --device cpu --tiny tries the script itself; "
            "benchmarks/training_memory.py computes a step's memory without a GPU"
        )
    rows, states = torch.empty(1, 1, 1, device="cuda"), torch.empty(1, 1, device="cuda")
    if "kernels" in found.routes and not cuda.scans(rows, states):
        parser.error("mamba-ssm cannot be imported: install it (docs/gpu.md), or measure the loop alone: --routes loop")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory-gb", type=float, default=16.0, help="memory that torch may take, in 1e9 bytes")
    parser.add_argument("--seconds", type=float, default=10.0, help="time spent on each measurement, at the least")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=ROUTES)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="two tiny models in place of the real ones")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = checked(parser, arguments)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler greets on stderr otherwise

    limit_bytes, device = int(options.memory_gb * 1e9), torch.device(options.device)
    described = machine()
    if device.type == "cuda":
        described |= gpu()
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / described["gpu_bytes"]))
    if options.tiny:
        clips = TINY_CLIPS_A_STEP
        configs = {(f"tiny {kind}", "32 x 32"): aum(16, 32, 32, 3, kind, depth=2) for kind in ("v1", "v2")}
    else:
        clips = CLIPS_A_STEP
        configs = {(m, i): PRESETS[m](*size, N_CLASSES) for m in options.models for i, size in INPUTS.items()}
    rows = []
    for (model, clip), config in configs.items():
        for name in options.routes:
            for checkpointing in (False, True):
                with route(name):
                    found = measure(
                        config,
                        device,
                        checkpointing=checkpointing,
                        clips=clips,
                        limit_bytes=limit_bytes,
                        seconds=options.seconds,
                    )
                place = {"model": model, "input": clip, "tokens": config.n_tokens, "route": name}
                rows.append(place | {"checkpointing": checkpointing} | found)
                print(*(f"{key} {value}" for key, value in rows[-1].items()), sep=", ")
    settings = {"precision": "bf16-mixed", "memory_gb": options.memory_gb, "clips_a_step": clips}
    report = {"machine": described, **settings, "rows": rows, "kernels_against_loop": times_faster(rows)}
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
