"""Teachers as ONNX files: AuM-Small and AuM-Base over 10 seconds (513 tokens), with blocks v1 and v2.

    python benchmarks/teacher_export.py [--models small-v2 ...] [--runs 5] [--out benchmarks/teacher_export.json]

Random weights of the published sizes. Each file is held against its torch model and the oracle scan, onnxruntime's
graph optimisation off and on, on one clip of noise (`--whole`: by all that `aum-compress verify` does, which takes many
minutes), then timed: opened, run on one thread and on all, its memory taken in a process of its own. The JSON file is
written as soon as a model is done; a model that is there already is not done again.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from aum_compress.audio.config import InputSpec, KaldiConfig
from aum_compress.export.metadata import OnnxMetadata
from aum_compress.export.onnx_writer import export_onnx
from aum_compress.export.runtime import open_session, run_session
from aum_compress.export.timing import Spread, interleaved, load_milliseconds, machine, peak_memory, random_feeds
from aum_compress.export.verification import TOLERANCES, Check, compare
from aum_compress.export.verify import Reference, oracle_scan, verify_onnx
from aum_compress.models.factory import Model, build_model
from aum_compress.models.presets import aum

MODELS = {"small-v2": (384, "v2"), "small-v1": (384, "v1"), "base-v1": (768, "v1"), "base-v2": (768, "v2")}
"""d_model and block type; AuM-Small is published with v2, AuM-Base with v1."""
CLASSES = 527
SPEC = InputSpec(front_end=KaldiConfig(fixed_frames=1024), clip_seconds=10.24, mean=-4.27, std=9.14)


def checks(path: Path, model: Model, labels: tuple[str, ...], whole: bool) -> list[Check]:
    if whole:
        return list(verify_onnx(path, Reference(model, labels, SPEC)).checks)
    tolerance = TOLERANCES["fp32", True]
    features = np.random.default_rng(0).standard_normal((1, *SPEC.feature_shape), dtype=np.float32)
    found = {
        optimised: run_session(open_session(path, optimise=optimised, intra_op_num_threads=1), features)
        for optimised in (False, True)
    }
    with torch.inference_mode():
        expected = model(torch.from_numpy(features)).numpy()
        with oracle_scan():
            opinion = model(torch.from_numpy(features)).numpy()
    against_torch = [compare("torch", found[o], expected, tolerance, optimised=o) for o in (False, True)]
    return [*against_torch, compare("oracle", found[False], opinion, tolerance, optimised=False)]


def measure(d_model: int, block_type: str, runs: int, whole: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = build_model(aum(d_model, 128, 1024, CLASSES, block_type)).eval()
    labels = tuple(f"class {number}" for number in range(CLASSES))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "teacher.onnx"
        started = time.perf_counter()
        export_onnx(model, path, OnnxMetadata(labels=labels, input=SPEC.model_dump(mode="json"), precision="fp32"))
        seconds = time.perf_counter() - started
        proto = onnx.load(path)
        done = checks(path, model, labels, whole)
        sessions = {
            threads: open_session(path, intra_op_num_threads=count) for threads, count in (("1", 1), ("all", 0))
        }
        feeds = {threads: random_feeds(session, "teacher") for threads, session in sessions.items()}
        wall, _ = interleaved(sessions, feeds, runs)
        memory = peak_memory(path, feeds["1"])
        return {
            "d_model": d_model,
            "block_type": block_type,
            "tokens": model.config.n_tokens,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "file_bytes": path.stat().st_size,
            "nodes": len(proto.graph.node),
            "nodes_of_functions": {function.name: len(function.node) for function in proto.functions},
            "export_seconds": seconds,
            "load_ms": vars(Spread.of(load_milliseconds(path, 3))),
            "ms": {threads: vars(Spread.of(times)) for threads, times in wall.items()},
            "peak_memory_bytes": None if memory is None else memory[0],
            "verified": all(check.passed for check in done),
            "checks": [check.name for check in done],
            "lowest_sqnr_db": min(check.sqnr_db for check in done if check.sqnr_db is not None),
            "largest_error": max(check.max_abs_error for check in done if check.max_abs_error is not None),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--whole", action="store_true", help="verify as aum-compress verify does")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    found = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.is_file() else {}
    for name in arguments.models:
        if name not in found:
            found[name] = {"machine": machine(), **measure(*MODELS[name], arguments.runs, arguments.whole)}
            arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps({key: value for key, value in found[name].items() if key != "machine"}))


if __name__ == "__main__":
    main()
