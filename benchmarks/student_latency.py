"""What a student takes in onnxruntime beside CP-Mobile: by block, by stem, and as a whole.

    python benchmarks/student_latency.py [--rounds 200] [--only TEXT] [--out benchmarks/student_latency.json]
    python benchmarks/student_latency.py --markdown                  tables of the JSON file

Random weights, fp32 ONNX, one thread, features to logits. All files take their turn in every round, so that whatever
else the machine does falls on all of them alike; the figure of a file is the median of the rounds' ratios to CP-Mobile.
A block's own time is half the difference of a student with three of it and one with one.

`--baseline FILE` adds the whole students of another version of the package, exported by `--export FOLDER` there, to the
same rounds: what the version at hand has gained.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from esc10_mobile import CONVOLUTION, MAMBA, STEM
from onnxruntime import InferenceSession

from aum_compress.audio.config import InputSpec, LogMelConfig
from aum_compress.budget.analytic import analytic_macs
from aum_compress.budget.analytic_bytes import analytic_stored
from aum_compress.export.metadata import OnnxMetadata
from aum_compress.export.onnx_writer import export_onnx
from aum_compress.export.runtime import open_session
from aum_compress.export.timing import Spread, interleaved, machine, random_feeds
from aum_compress.models.config import AudioMambaConfig, CPMobileConfig
from aum_compress.models.factory import build_model

RIVAL = "CP-Mobile"
CLASSES = 10
SPEC = InputSpec(front_end=LogMelConfig(), clip_seconds=1.0)


def stem(*stages: tuple[int, int, int, float]) -> dict[str, Any]:
    """Of (channels, mel stride, frame stride, expansion) each."""
    keys = ("channels", "stride_mels", "stride_frames", "expansion")
    return {"kind": "conv", "token": "cell", "stages": [dict(zip(keys, stage)) for stage in stages]}


def mamba(along: str, d_inner: int = 64, d_state: int = 8, block_type: str = "v1") -> dict[str, Any]:
    return {"d_inner": d_inner, "d_state": d_state, "dt_rank": 4, "block_type": block_type, "along": along}


def mamba2(along: str, d_inner: int = 64, head_dim: int = 16) -> dict[str, Any]:
    return {"mixer": "mamba2", "d_inner": d_inner, "d_state": 8, "head_dim": head_dim, "along": along}


def conv(along: str, d_inner: int, d_conv: int) -> dict[str, Any]:
    return {"mixer": "conv", "d_inner": d_inner, "d_conv": d_conv, "along": along}


BLOCKS = {
    "mamba v1, D 64, N 8": mamba("time"),
    "mamba v1, D 64, N 4": mamba("time", d_state=4),
    "mamba v1, D 64, N 2": mamba("time", d_state=2),
    "mamba v1, D 48, N 4": mamba("time", 48, 4),
    "mamba v1, D 32, N 8": mamba("time", 32),
    "mamba v1, D 32, N 4": mamba("time", 32, 4),
    "mamba one way, D 64, N 8": mamba("time", block_type="none"),
    "mamba v2, D 64, N 8": mamba("time", block_type="v2"),
    "mamba v1, D 64, N 8, along mel": mamba("mel"),
    "mamba v1, D 64, N 4, along mel": mamba("mel", d_state=4),
    "mamba v1, D 64, N 8, along all tokens": mamba("tokens"),
    "mamba2 two ways, D 64, N 8, heads of 16": mamba2("time"),
    "mamba2 two ways, D 64, N 8, heads of 32": mamba2("time", head_dim=32),
    "mamba2 two ways, D 64, N 8, heads of 16, along mel": mamba2("mel"),
    "conv, D 64, 3 taps": conv("time", 64, 3),
    "conv, D 76, 17 taps": conv("time", 76, 17),
    "conv, D 76, 31 taps, along mel": conv("mel", 76, 31),
}
"""16 x 9 tokens of width 64; along time where nothing else is said."""

STEMS = {
    "esc10_mobile.py's": STEM,
    "16, 32, 64, 64": stem((16, 2, 2, 0), (32, 2, 2, 2), (64, 2, 2, 2), (64, 2, 1, 2)),
    "8, 32 plain, 48, 48, 64": stem((8, 2, 2, 0), (32, 2, 2, 0), (48, 2, 2, 2), (48, 1, 1, 2), (64, 2, 1, 2)),
    "8, 32 plain, 64, 64": stem((8, 2, 2, 0), (32, 2, 2, 0), (64, 2, 2, 2), (64, 2, 1, 2)),
    "8, 16 plain, 32, 64": stem((8, 2, 2, 0), (16, 2, 2, 0), (32, 2, 2, 3), (64, 2, 1, 3)),
    "16 (mel 4), 32, 64, 64": stem((16, 4, 2, 0), (32, 2, 2, 2), (64, 2, 2, 2), (64, 1, 1, 2)),
    "8, 32 plain, 48, 64, 64 (8 x 9)": stem((8, 2, 2, 0), (32, 2, 2, 0), (48, 2, 2, 2), (64, 2, 1, 2), (64, 2, 1, 2)),
}
"""Channels of the stages; a plain one is a 3x3 convolution, the others inverted residuals. 16 x 9 cells where nothing
else is said. Measured with one convolution block, whose time is taken off."""
LIGHT, SMALL_GRID = STEMS["8, 32 plain, 64, 64"], STEMS["8, 32 plain, 48, 64, 64 (8 x 9)"]

STUDENTS = {
    "esc10_mobile.py's student, 4 blocks": (STEM, MAMBA, 4),
    "the same, 2 blocks": (STEM, MAMBA, 2),
    "esc10_mobile.py's convolution, 4 blocks": (STEM, CONVOLUTION, 4),
    "light stem, 2 blocks, N 8": (LIGHT, [mamba("time"), mamba("mel")], 2),
    "light stem, 2 blocks, N 4": (LIGHT, [mamba("time", d_state=4), mamba("mel", d_state=4)], 2),
    "light stem, 1 block, N 8": (LIGHT, [mamba("time")], 1),
    "8 x 9 cells, 2 blocks, N 8": (SMALL_GRID, [mamba("time"), mamba("mel")], 2),
    "8 x 9 cells, 2 blocks, N 4": (SMALL_GRID, [mamba("time", d_state=4), mamba("mel", d_state=4)], 2),
    "light stem, 2 blocks, mamba2": (LIGHT, [mamba2("time"), mamba2("mel")], 2),
    "light stem, 3 blocks, conv": (LIGHT, [conv("time", 64, 9), conv("mel", 64, 15)], 3),
}


def student(stem: dict[str, Any], blocks: list[dict[str, Any]], depth: int) -> AudioMambaConfig:
    whole = tuple((blocks * depth)[:depth])
    return AudioMambaConfig(
        n_mels=256,
        n_frames=65,
        n_classes=CLASSES,
        d_model=64,
        blocks=whole,
        stem=stem,
        position="factorised",
        pool="mean",
    )


def configurations() -> dict[str, AudioMambaConfig | CPMobileConfig]:
    found: dict[str, AudioMambaConfig | CPMobileConfig] = {
        RIVAL: CPMobileConfig(n_mels=256, n_frames=65, n_classes=CLASSES)
    }
    for name, block in BLOCKS.items():
        found |= {f"block {depth} {name}": student(STEM, [block], depth) for depth in (1, 3)}
    found |= {f"stem {name}": student(stages, [conv("time", 64, 3)], 1) for name, stages in STEMS.items()}
    return found | {f"student {name}": student(*parts) for name, parts in STUDENTS.items()}


def export(config: AudioMambaConfig | CPMobileConfig, path: Path) -> None:
    torch.manual_seed(0)
    labels = tuple(f"class {number}" for number in range(CLASSES))
    metadata = OnnxMetadata(labels=labels, input=SPEC.model_dump(mode="json"), precision="fp32", recipe="latency")
    export_onnx(build_model(config).eval(), path, metadata)


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
    ratio = {name: spread.median for name, (_, spread) in found.items()}
    ms = {name: spread.median for name, (spread, _) in found.items()}

    def block(name: str) -> dict[str, Any]:
        one, three = f"block 1 {name}", f"block 3 {name}"
        return {"ms": (ms[three] - ms[one]) / 2, "ratio": (ratio[three] - ratio[one]) / 2}

    blocks = {name: block(name) for name in BLOCKS if f"block 1 {name}" in found}
    light = blocks.get("conv, D 64, 3 taps")
    stems = {}
    for name in STEMS:
        if f"stem {name}" in found and light:
            costs = analytic_macs(configs[f"stem {name}"])
            stored = analytic_stored(configs[f"stem {name}"], "int8")
            stems[name] = {
                "ms": ms[f"stem {name}"] - light["ms"],
                "ratio": ratio[f"stem {name}"] - light["ratio"],
                "macs": sum(count for layer, count in costs.items() if layer.startswith("patch_embed")),
                "int8_bytes": sum(own.param_bytes for layer, own in stored.items() if layer.startswith("patch_embed")),
            }
    students = {}
    for name, (time, spread) in found.items():
        if name.startswith(("student ", "before")):
            students[name.removeprefix("student ")] = {"ms": vars(time), "ratio": vars(spread)}
    return {"CP-Mobile_ms": vars(found[RIVAL][0]), "blocks": blocks, "stems": stems, "students": students}


def markdown(found: dict[str, Any]) -> str:
    lines = ["| block | of CP-Mobile's time | microseconds |", "|---|---|---|"]
    lines += [f"| {name} | {r['ratio']:.2f} | {1000 * r['ms']:.0f} |" for name, r in found["blocks"].items()]
    lines += ["", "| stem and head | of CP-Mobile's time | MMAC | int8 bytes |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {r['ratio']:.2f} | {r['macs'] / 1e6:.1f} | {r['int8_bytes']:,} |"
        for name, r in found["stems"].items()
    ]
    lines += ["", "| student | of CP-Mobile's time | from 10 % to 90 % of rounds |", "|---|---|---|"]
    for name, record in found["students"].items():
        ratio = record["ratio"]
        lines.append(f"| {name} | {ratio['median']:.2f} | {ratio['p10']:.2f} to {ratio['p90']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--only", default="", help="only files whose name holds this")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--export", type=Path, help="only write the whole students to this folder")
    parser.add_argument("--baseline", type=Path, help="a folder that --export wrote with another version")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(markdown(json.loads(arguments.out.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(1)
    chosen = {n: c for n, c in configurations().items() if n == RIVAL or arguments.only in n}
    if arguments.export:
        arguments.export.mkdir(parents=True, exist_ok=True)
        for name in STUDENTS:
            export(chosen[f"student {name}"], arguments.export / f"{name}.onnx")
        return
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for number, (name, config) in enumerate(chosen.items()):
            files[name] = Path(folder) / f"{number}.onnx"
            export(config, files[name])
        if arguments.baseline:
            files |= {f"before: {path.stem}": path for path in sorted(arguments.baseline.glob("*.onnx"))}
        found = results(measure(files, arguments.rounds), chosen)
    record = {"command": f"python benchmarks/student_latency.py --rounds {arguments.rounds}", "machine": machine()}
    arguments.out.write_text(json.dumps(record | found, indent=1) + "\n", encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()
