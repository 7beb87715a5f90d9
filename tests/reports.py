"""The content of a report with every part, made by hand."""

from pathlib import Path

from aum_compress.audio.config import InputSpec, LogMelConfig
from aum_compress.budget.records import BudgetReport, LayerCost, Limits
from aum_compress.export.verification import TOLERANCES, Check, Verification

LABELS = ["airport", "bus", "metro", "metro_station", "park"]
SEEN, UNSEEN = ["a", "b", "s1"], ["s4", "s5"]
HOSTILE = "<script>alert('x')</script> & \"quoted\" | *bold* [link](http://example.org) `code` _under_ \\"


def scores(accuracy: float) -> dict:
    return {
        "clips": 600,
        "accuracy": accuracy,
        "overall_accuracy": accuracy + 0.25,
        "log_loss": 2.345 - accuracy / 50,
        "by_class": {label: accuracy - 6.2 + 3.1 * n for n, label in enumerate(LABELS)},
        "by_device": {device: accuracy + 6.3 - 3.3 * n for n, device in enumerate(SEEN + UNSEEN)},
        "seen": accuracy + 3.21,
        "unseen": accuracy - 4.87,
    }


def step(
    stage: str, title: str, accuracy: float, cost: tuple[int, int, int], file: tuple[str, int] | None = None
) -> dict:
    params, param_bytes, macs = cost
    return {
        "stage": stage,
        "title": title,
        "measured_with": "onnxruntime" if file else "torch",
        "file": file and file[0],
        "file_bytes": file and file[1],
        "precision": "int8" if stage in ("quantize", "int8") else "fp16" if stage == "fp16" else "fp32",
        "params": params,
        "param_bytes": param_bytes,
        "macs": macs,
        "within_budget": param_bytes <= 128_000 and macs <= 30_000_000,
        "validation_accuracy": None if file else accuracy + 1.5,
        "test": scores(accuracy),
    }


def budget() -> BudgetReport:
    layers = [LayerCost("patch_embed.stages.0.0", "Conv2d", 1_024, 256, 2_400_000, {"relu": 40_000})]
    for block in range(5):
        name = f"layers.{block}.mixer"
        layers += [
            LayerCost(name, "MambaMixer", 2_400 + block, 600, 1_300_000, {"exp": 52_000, "silu": 8_000}),
            LayerCost(f"{name}.in_proj", "Linear", 8_192, 8_192, 1_600_000, {}),
            LayerCost(f"{name}.out_proj", "Linear", 4_096, 4_096, 800_000, {}),
        ]
    layers.append(LayerCost("head", "Linear", 645, 640, 640, {}))
    return BudgetReport(
        tuple(layers),
        Limits(),
        1.0,
        ("traced graph", "configuration", "ONNX graph"),
        76_543,
        4_321_000,
        7_654_321,
        ("int8",),
    )


def verification(precision: str) -> Verification:
    tolerance = TOLERANCES[precision, True]
    checks = (
        Check("names", True, ""),
        Check("random", True, "", False, 4, 1.25e-6, 131.25, 1.0, tolerance),
        Check("random", True, "", True, 4, 2.5e-6, 127.5, 0.9875, tolerance),
    )
    warnings = ("random: int8 kernels saturate here",) if precision == "int8" else ()
    return Verification(Path("somewhere") / f"model-{precision}.onnx", precision, "the torch model", checks, warnings)


def made_report() -> dict:
    small = budget()
    student = (64_000, 256_000, small.macs)
    epochs = [
        {
            "epoch": n,
            "train_loss": 2.3 * 0.93**n,
            "val_loss": 2.4 * 0.95**n + 0.004 * n,
            "val_accuracy": 70 - 60 * 0.9**n,
        }
        for n in range(1, 31)
    ]
    return {
        "schema_version": 1,
        "recipe": "quickstart",
        "created": "2026-11-22T13:00:00Z",
        "seed": 7,
        "versions": {"aum-compress": "0.1.0", "torch": "2.13.0"},
        "data": {
            "kind": "synth",
            "labels": LABELS,
            "clip_seconds": 1.0,
            "train": 1200,
            "validation": 200,
            "test": 600,
            "seen_devices": SEEN,
            "unseen_devices": UNSEEN,
        },
        "input": InputSpec(front_end=LogMelConfig(), clip_seconds=1.0, mean=-4.25, std=4.5).model_dump(),
        "road": [
            step("teacher", "teacher (aum-tiny)", 72.37, (5_678_901, 22_715_604, 1_234_567_890)),
            step("distill", "distill (student)", 66.02, student),
            step("prune", "prune", 64.91, (48_000, 192_000, small.macs)),
            step("quantize", "quantize", 64.55, (48_000, small.param_bytes, small.macs)),
            step("fp32", "model-fp32.onnx", 64.91, (48_000, 192_000, small.macs), ("model-fp32.onnx", 231_007)),
            step(
                "int8", "model-int8.onnx", 64.48, (48_000, small.param_bytes, small.macs), ("model-int8.onnx", 98_765)
            ),
        ],
        "budget": small.to_dict(),
        "gated": "model-int8.onnx",
        "verification": {
            f"model-{precision}.onnx": verification(precision).to_dict() for precision in ("fp32", "int8")
        },
        "training": {"teacher": epochs, "distill": epochs[:20]},
        "pruning": [{"before": [128, 128], "after": [96, 96]}],
        "quantisation": {
            "layers": {
                "head": "int8",
                "layers.0.mixer.out_proj": "int8-smooth",
                "layers.0.mixer.in_proj": "int4-weight",
            },
            "weight_bits": 7,
            "saturating_pairs": 0,
            "sqnr_db": 31.25,
            "search": {
                "param_bytes": 76_543,
                "accuracy_drop": 0.4,
                "rolled_back": ["patch_embed.stages.0.0"],
                "part": "validation",
                "clips": 512,
            },
        },
        "next": "aum-compress predict exports/quickstart/model-int8.onnx YOUR.wav",
    }
