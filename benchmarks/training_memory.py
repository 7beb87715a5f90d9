"""Memory of one training step of AuM, counted without a GPU.

    python benchmarks/training_memory.py [--memory-gb 16] [--out benchmarks/training_memory.json]

*Computed*: forward and backward run on tensors without storage, under bf16 autocast (by its CPU lists) and with the
operators that a GPU with mamba-ssm and causal-conv1d would take; the bytes of all tensors alive at one time are
counted. Not in it: scratch inside the packages' kernels, the optimiser's, the allocator's rounding and fragmentation,
CUDA's context. To these bytes come 16 for each parameter: weight, gradient and AdamW's two moments in float32,
whatever the precision.

*Measured*: one step of AuM-Base in float32 on one CPU thread, by torch's own allocator, beside the same step computed.
"""

import argparse
import json
import os
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from gpu_training import CLIPS_A_STEP, INPUTS, MODELS, N_CLASSES, largest_micro_batch
from scan import machine, peak_bytes
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aum_compress.kernels import cuda
from aum_compress.models.audio_mamba import AudioMamba
from aum_compress.models.config import AudioMambaConfig
from aum_compress.models.presets import PRESETS

STATE_BYTES = 16
"""A parameter's weight, gradient and AdamW moments."""
MEASURED = ("aum-base", "10 s")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made within it: `held` now and at the most, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        arguments = {t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), arguments)
        return result

    def _count(self, storage: torch.UntypedStorage, arguments: set[torch.UntypedStorage]) -> None:
        if storage in self._known or storage in arguments:  # a view, or what was there before
            return
        self._known.add(storage)
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, n_bytes: int) -> None:
        self.held -= n_bytes


class CausalConvolution(torch.autograd.Function):
    """What causal-conv1d's function keeps (x, weight and bias) and gives, without values."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight, bias)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors)


def computed_step(config: AudioMambaConfig, batch: int, *, checkpointing: bool, as_on_gpu: bool) -> dict[str, int]:
    """Bytes that one micro-batch's forward and backward take.

    Args:
        as_on_gpu: bf16 autocast and the operators of the CUDA route; float32 and the CPU's otherwise.

    Returns:
        `state_bytes` of parameters, gradients and optimiser; beyond these, `kept_bytes` are alive between forward and
        backward, and `peak_bytes` are the most at one time.
    """
    with ExitStack() as stack:
        if as_on_gpu:
            stack.enter_context(patch.object(cuda, "scans", lambda u, A: True))
            stack.enter_context(patch.object(cuda, "convolves", lambda x, n_taps: True))
            stack.enter_context(patch.object(cuda, "causal_convolution", CausalConvolution.apply))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(patch.object(torch.nn.init, "trunc_normal_", lambda tensor, std: tensor))  # reads values
        model = AudioMamba(config).train()
        model.activation_checkpointing = checkpointing
        for parameter in model.parameters():  # as in all but the first micro-batch of an accumulated step
            parameter.grad = torch.empty_like(parameter)
        features = torch.empty(batch, 1, config.n_mels, config.n_frames)
        labels = torch.empty(batch, dtype=torch.long)
        live = stack.enter_context(LiveBytes())
        with torch.autocast("cpu", torch.bfloat16) if as_on_gpu else nullcontext():
            loss = F.cross_entropy(model(features).float(), labels)
        kept = live.held
        loss.backward()
    state = STATE_BYTES * sum(p.numel() for p in model.parameters())
    return {"state_bytes": state, "kept_bytes": kept, "peak_bytes": live.peak}


def measured_step(config: AudioMambaConfig, *, checkpointing: bool) -> int:
    """Most bytes that torch's allocator held during forward and backward of one clip, beyond what was there before."""
    model = AudioMamba(config).train()
    model.activation_checkpointing = checkpointing
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    features = torch.randn(1, 1, config.n_mels, config.n_frames)
    return peak_bytes(lambda: F.cross_entropy(model(features), torch.zeros(1, dtype=torch.long)).backward())


def computed_row(config: AudioMambaConfig, limit_bytes: int, most: int, *, checkpointing: bool) -> dict[str, Any]:
    """All bytes by micro-batch, powers of two up to `most`, and the largest of these within the limit; 0 for none."""
    steps = {
        2**exponent: computed_step(config, 2**exponent, checkpointing=checkpointing, as_on_gpu=True)
        for exponent in range(most.bit_length())
    }
    total = {n: step["state_bytes"] + step["peak_bytes"] for n, step in steps.items()}
    largest, _ = largest_micro_batch(total.__getitem__, limit_bytes, most)
    return {"state_bytes": steps[1]["state_bytes"], "bytes_by_micro_batch": total, "largest_micro_batch": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory-gb", type=float, default=16.0, help="memory that has to be enough, in 1e9 bytes")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler greets on stderr otherwise
    limit_bytes = int(arguments.memory_gb * 1e9)
    rows, measured = [], []
    for name in MODELS:
        for clip, (n_mels, n_frames) in INPUTS.items():
            config = PRESETS[name](n_mels, n_frames, N_CLASSES)
            for checkpointing in (False, True):
                place = {"model": name, "input": clip, "tokens": config.n_tokens, "checkpointing": checkpointing}
                row = computed_row(config, limit_bytes, CLIPS_A_STEP, checkpointing=checkpointing)
                rows.append(place | row)
                print("computed, bf16-mixed, CUDA:", *(f"{key} {value}" for key, value in rows[-1].items()), sep="  ")
                if (name, clip) == MEASURED:
                    step = computed_step(config, 1, checkpointing=checkpointing, as_on_gpu=False)
                    step |= {"measured_peak_bytes": measured_step(config, checkpointing=checkpointing)}
                    measured.append(place | step)
                    print("float32, CPU, one clip:", *(f"{key} {value}" for key, value in step.items()), sep="  ")
    report = {"machine": machine(), "memory_gb": arguments.memory_gb}
    report |= {"computed_bf16_mixed_cuda": rows, "float32_cpu_one_clip": measured}
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
