"""What a student takes in onnxruntime beside CP-Mobile: by block, by stem, and as a whole.

    python benchmarks/student_latency.py [--rounds 400] [--files FOLDER] [--baseline FOLDER]
    python benchmarks/student_latency.py --markdown          tables of benchmarks/student_latency.json

Random weights, fp32 ONNX (and int8 of whole students), one thread, features to logits. All files take their turn in
every round, so that whatever else the machine does falls on all of them alike. Measured is the processor's time; the
figure of a file is what a tenth of its rounds stay below, which leaves out caches that others have filled; for whole
students the rounds' ratios to CP-Mobile stand beside. A block's own time is half the difference of a student with three
of it and one with one.

`--files` keeps what is exported, so that a run that was stopped goes on. `--baseline` adds the .onnx files in a folder
to the same rounds: the same students by an earlier version.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from onnxruntime import InferenceSession

from aum_compress.audio.config import InputSpec, LogMelConfig
from aum_compress.budget.analytic import analytic_macs
from aum_compress.budget.analytic_bytes import analytic_stored
from aum_compress.compress.quantize import quantize
from aum_compress.export.metadata import OnnxMetadata
from aum_compress.export.onnx_writer import export_onnx
from aum_compress.export.runtime import open_session
from aum_compress.export.timing import Spread, interleaved, machine, random_feeds
from aum_compress.models.config import AudioMambaConfig, CPMobileConfig
from aum_compress.models.factory import build_model
from aum_compress.models.presets import EDGE, PRESETS, front_end_of
from aum_compress.recipe_schema import QuantizeSection

RIVAL = "CP-Mobile"
CLASSES = 10


def stem(*stages: tuple[int, int, int, float]) -> dict[str, Any]:
    """Of (channels, mel stride, frame stride, expansion) each."""
    keys = ("channels", "stride_mels", "stride_frames", "expansion")
    return {"kind": "conv", "token": "cell", "stages": [dict(zip(keys, stage)) for stage in stages]}


def mamba(along: str, d_inner: int = 64, d_state: int = 8, block_type: str = "v1") -> dict[str, Any]:
    return {"d_inner": d_inner, "d_state": d_state, "dt_rank": 4, "block_type": block_type, "along": along}


def mamba2(along: str) -> dict[str, Any]:
    return {"mixer": "mamba2", "d_inner": 64, "d_state": 8, "head_dim": 16, "along": along}


def conv(along: str, d_inner: int, d_conv: int) -> dict[str, Any]:
    return {"mixer": "conv", "d_inner": d_inner, "d_conv": d_conv, "along": along}


STEM = stem((16, 2, 2, 0), (24, 2, 2, 3), (24, 1, 1, 2), (48, 2, 2, 3), (48, 1, 1, 2), (64, 2, 1, 2))
"""Of the students whose blocks are timed."""
BLOCKS = {
    "mamba v1, D 64, N 8": mamba("time"),
    "mamba v1, D 64, N 4": mamba("time", d_state=4),
    "mamba v1, D 32, N 8": mamba("time", 32),
    "mamba one way, D 64, N 8": mamba("time", block_type="none"),
    "mamba v2, D 64, N 8": mamba("time", block_type="v2"),
    "mamba v1, D 64, N 8, along mel": mamba("mel"),
    "mamba v1, D 64, N 4, along mel": mamba("mel", d_state=4),
    "mamba one way, D 64, N 8, along mel": mamba("mel", block_type="none"),
    "mamba2 two ways, D 64, N 8, heads of 16": mamba2("time"),
    "mamba2 two ways, D 64, N 8, heads of 16, along mel": mamba2("mel"),
    "conv, D 76, 3 taps": conv("time", 76, 3),
    "conv, D 76, 17 taps": conv("time", 76, 17),
    "conv, D 76, 31 taps, along mel": conv("mel", 76, 31),
}
"""16 x 9 tokens of width 64; along time where nothing else is said."""

SMALL = conv("time", 64, 3)
STEMS = {
    "16, 24, 24, 48, 48, 64": STEM,
    "16, 16, 16, 32, 32, 64": stem(
        (16, 2, 2, 0), (16, 2, 2, 3), (16, 1, 1, 2), (32, 2, 2, 3), (32, 1, 1, 2), (64, 2, 1, 2)
    ),
    "16, 32, 32, 48, 48, 64": stem(
        (16, 2, 2, 0), (32, 2, 2, 2), (32, 1, 1, 2), (48, 2, 2, 2), (48, 1, 1, 2), (64, 2, 1, 2)
    ),
    "16, 32, 64, 64": stem((16, 2, 2, 0), (32, 2, 2, 2), (64, 2, 2, 2), (64, 2, 1, 2)),
    "8, 32 plain, 64, 64": stem((8, 2, 2, 0), (32, 2, 2, 0), (64, 2, 2, 2), (64, 2, 1, 2)),
    "8, 16 plain, 32, 64": stem((8, 2, 2, 0), (16, 2, 2, 0), (32, 2, 2, 3), (64, 2, 1, 3)),
    "16 (mel stride 4), 32, 64, 64": stem((16, 4, 2, 0), (32, 2, 2, 2), (64, 2, 2, 2), (64, 1, 1, 2)),
    "8, 32 plain, 48, 64, 64 (8 x 9 cells)": stem(
        (8, 2, 2, 0), (32, 2, 2, 0), (48, 2, 2, 2), (64, 2, 1, 2), (64, 2, 1, 2)
    ),
}
"""Channels of the stages; a plain one is a 3x3 convolution, the others inverted residuals. 16 x 9 cells where nothing
else is said. Measured with one convolution block of 3 taps, whose time is taken off."""
INT8: dict[str, dict[str, Any]] = {", int8": {}, ", every weight int8": {"layers": {"layers": "int8"}}}
"""Behind the name of a student: its int8 file, by a recipe's `quantize`; by default small layers stay float16."""
STUDENTS = ("student-int8", "student-fp16", "student-edge")
"""Presets."""


def student(stem: dict[str, Any], blocks: list[dict[str, Any]]) -> AudioMambaConfig:
    return AudioMambaConfig(
        n_mels=256,
        n_frames=65,
        n_classes=CLASSES,
        d_model=64,
        blocks=tuple(blocks),
        stem=stem,
        position="factorised",
    )


def configurations() -> dict[str, AudioMambaConfig | CPMobileConfig]:
    found: dict[str, AudioMambaConfig | CPMobileConfig] = {
        RIVAL: CPMobileConfig(n_mels=256, n_frames=65, n_classes=CLASSES)
    }
    for name, block in BLOCKS.items():
        found |= {f"block {depth} {name}": student(STEM, [block] * depth) for depth in (1, 3)}
    found |= {f"stem {name}": student(stages, [SMALL]) for name, stages in STEMS.items()}
    presets = {name: PRESETS[name](front_end_of(name).n_mels, 65, CLASSES) for name in STUDENTS}
    return found | {f"student {name}{kind}": config for name, config in presets.items() for kind in ("", *INT8)}


def export(config: AudioMambaConfig | CPMobileConfig, path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = build_model(config).eval()
    section = next((section for kind, section in INT8.items() if name.endswith(kind)), None)
    if section is not None:
        clips = torch.randn(64, 1, config.n_mels, config.n_frames)
        model = quantize(model, [clips], QuantizeSection.model_validate(section))
    labels = tuple(f"class {number}" for number in range(CLASSES))
    front_end = EDGE if config.n_mels == EDGE.n_mels else LogMelConfig()
    record = InputSpec(front_end=front_end, clip_seconds=1.0).model_dump(mode="json")
    metadata = OnnxMetadata(
        labels=labels, input=record, precision="fp32" if section is None else "int8", recipe="latency"
    )
    export_onnx(model, path, metadata)


def measure(files: dict[str, Path], rounds: int) -> dict[str, tuple[Spread, Spread]]:
    """Name -> (milliseconds, ratio to CP-Mobile), of processor time: one thread does all the work."""
    sessions: dict[str, InferenceSession] = {
        name: open_session(path, intra_op_num_threads=1) for name, path in files.items()
    }
    feeds = {name: random_feeds(session, name) for name, session in sessions.items()}
    _, processor = interleaved(sessions, feeds, rounds)
    rival = processor[RIVAL]
    return {
        name: (Spread.of(times), Spread.of([one / other for one, other in zip(times, rival)]))
        for name, times in processor.items()
    }


def results(found: dict[str, tuple[Spread, Spread]], configs: dict[str, Any]) -> dict[str, Any]:
    ms = {name: spread.p10 for name, (spread, _) in found.items()}
    kinds = {"ms": ms, "ratio": {name: time / ms[RIVAL] for name, time in ms.items()}}
    blocks = {
        name: {key: (of[f"block 3 {name}"] - of[f"block 1 {name}"]) / 2 for key, of in kinds.items()} for name in BLOCKS
    }
    small = blocks["conv, D 76, 3 taps"]
    stems = {}
    for name in STEMS:
        config = configs[f"stem {name}"]
        costs, stored = analytic_macs(config), analytic_stored(config, "int8")
        stems[name] = {key: of[f"stem {name}"] - small[key] for key, of in kinds.items()} | {
            "macs": sum(count for layer, count in costs.items() if layer.startswith("patch_embed")),
            "int8_bytes": sum(own.param_bytes for layer, own in stored.items() if layer.startswith("patch_embed")),
        }
    students = {}
    for name, (time, spread) in found.items():
        if name.startswith(("student ", "before")):
            undisturbed = {"ratio": time.p10 / ms[RIVAL]}
            students[name.removeprefix("student ")] = undisturbed | {"ms": vars(time), "by_round": vars(spread)}
    return {"CP-Mobile_ms": vars(found[RIVAL][0]), "blocks": blocks, "stems": stems, "students": students}


def markdown(found: dict[str, Any]) -> str:
    lines = ["| block | of CP-Mobile's time | microseconds |", "|---|---|---|"]
    lines += [f"| {name} | {r['ratio']:.2f} | {1000 * r['ms']:.0f} |" for name, r in found["blocks"].items()]
    lines += ["", "| stem and head | of CP-Mobile's time | MMAC | int8 bytes |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {r['ratio']:.2f} | {r['macs'] / 1e6:.1f} | {r['int8_bytes']:,} |"
        for name, r in found["stems"].items()
    ]
    heading = "| student | of CP-Mobile's time | median of the rounds' ratios | 10 % to 90 % of them |"
    lines += ["", heading, "|---|---|---|---|"]
    for name, record in found["students"].items():
        each = record["by_round"]
        spread = f"{each['median']:.2f} | {each['p10']:.2f} to {each['p90']:.2f}"
        lines.append(f"| {name} | {record['ratio']:.2f} | {spread} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--files", type=Path, help="folder that keeps the exported files")
    parser.add_argument("--baseline", type=Path, help="folder of .onnx files of an earlier version")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown(json.loads(arguments.out.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(1)
    chosen = configurations()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.files or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        files = {name: folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.onnx" for name in chosen}
        for name, path in files.items():
            if not path.exists():
                export(chosen[name], path, name)
        if arguments.baseline:
            files |= {f"before: {path.stem}": path for path in sorted(arguments.baseline.glob("*.onnx"))}
        found = results(measure(files, arguments.rounds), chosen)
    record = {"command": f"python benchmarks/student_latency.py --rounds {arguments.rounds}", "machine": machine()}
    arguments.out.write_text(json.dumps(record | found, indent=1) + "\n", encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()
