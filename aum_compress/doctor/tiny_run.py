"""The road in small, with its times: a student trained for some steps, exported, proved, and run in onnxruntime."""

import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.nn import functional as F

from aum_compress.audio.config import InputSpec, LogMelConfig
from aum_compress.doctor.findings import Finding
from aum_compress.export.metadata import OnnxMetadata
from aum_compress.export.onnx_writer import export_onnx
from aum_compress.export.runtime import Classifier
from aum_compress.models.config import AudioMambaConfig, ConvStage, ConvStem, uniform_blocks
from aum_compress.models.factory import build_model

BATCH, STEPS, CLIPS = 16, 5, 20
TOLERANCE = 1e-3
LABELS = ("one", "two", "three")
SPEC = InputSpec(
    front_end=LogMelConfig(sample_rate_hz=16_000, n_fft=512, window_samples=400, hop_samples=320, n_mels=64),
    clip_seconds=1.0,
    mean=0.0,
    std=1.0,
)


def tiny_run() -> list[Finding]:
    """Times by a wall clock on a machine that may be busy: they tell seconds from minutes."""
    started = time.perf_counter()
    _, n_mels, n_frames = SPEC.feature_shape
    config = AudioMambaConfig(
        n_mels=n_mels,
        n_frames=n_frames,
        n_classes=len(LABELS),
        d_model=32,
        blocks=uniform_blocks(2, 32, d_state=8),
        stem=ConvStem(stages=tuple(ConvStage(channels=16, expansion=2.0 if n else 0.0) for n in range(4))),
    )
    torch.manual_seed(0)
    model = build_model(config)
    x = torch.randn(BATCH, 1, n_mels, n_frames)
    targets = torch.arange(BATCH) % len(LABELS)
    optimizer = torch.optim.AdamW(model.parameters())
    times, losses = [], []
    for _ in range(STEPS):
        begun = time.perf_counter()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), targets)
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - begun)
        losses.append(float(loss.detach()))
    learnt = losses[-1] < losses[0]
    note = (
        f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, {STEPS} steps of {BATCH} clips, {torch.get_num_threads()} threads"
    )
    speed = f"{BATCH / median(times):.0f} clips/s"
    training = Finding("tiny run", "training", "ok" if learnt else "problem", speed, note)
    return [training, *_exported(model.eval(), x), _took(started)]


def _exported(model, x: torch.Tensor) -> list[Finding]:
    with torch.inference_mode():
        wanted = model(x[:CLIPS]).numpy()
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        path = Path(folder) / "tiny.onnx"
        export_onnx(model, path, OnnxMetadata(labels=LABELS, input=SPEC.model_dump(), precision="fp32"))
        seconds = time.perf_counter() - begun
        classifier = Classifier(path, intra_op_num_threads=1)
        found, times = [], []
        for clip in x[:CLIPS].numpy():
            begun = time.perf_counter()
            found.append(classifier.logits(clip[None]))
            times.append(time.perf_counter() - begun)
    error = float(np.abs(np.concatenate(found) - wanted).max())
    good = error <= TOLERANCE
    note = f"largest difference of logits to torch {error:.1e}" + ("" if good else f", wanted at most {TOLERANCE:g}")
    return [
        Finding("tiny run", "export", "ok", f"{seconds:.1f} s"),
        Finding("tiny run", "onnxruntime", "ok" if good else "problem", f"{1000 * median(times):.2f} ms/clip", note),
    ]


def _took(started: float) -> Finding:
    return Finding("tiny run", "in all", "ok", f"{time.perf_counter() - started:.1f} s")
