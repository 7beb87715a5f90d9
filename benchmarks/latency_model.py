"""The linear latency model behind `aum-compress budget plan --max-ms`: fitted, and held against files not fitted on.

    python benchmarks/latency_model.py [--files 90] [--rounds 30] [--out benchmarks/latency_model.json]

Random students of the planner's own space are exported as fp32 ONNX and run in onnxruntime with one thread, in rounds:
every file once a round, so that whatever else the machine does falls on all of them alike. Measured is the processor
time of the one thread, and a file's figure is the least of its rounds: both leave out what others do on the machine.
Two thirds of the files give the coefficients, by non-negative least squares on relative errors; the error is stated on
the last third. The coefficients go to `aum_compress/budget/latency.py` by hand, as this script prints them.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from scipy.optimize import nnls

from aum_compress.audio.config import InputSpec, LogMelConfig
from aum_compress.budget.latency import MICROSECONDS, latency_terms
from aum_compress.budget.plan import Student, Wanted, make_plan
from aum_compress.export.metadata import OnnxMetadata
from aum_compress.export.onnx_writer import export_onnx
from aum_compress.export.timing import machine
from aum_compress.models.factory import build_model

MIXERS = ("mamba", "mamba2", "conv")
LABELS = tuple(f"class {number}" for number in range(10))
SPEC = InputSpec(front_end=LogMelConfig(), clip_seconds=1.0)


def sample(number: int, seed: int) -> list[Student]:
    """Students that fit the DCASE limits, as many of each mixer, of few tokens and of many."""
    draw = random.Random(seed)
    found = []
    for fewest in (16, 33, 64, 128, 250):
        for mixer in MIXERS:
            plan = make_plan(Wanted(fewest_tokens=fewest, most_tokens=2 * fewest, mixers=(mixer,)))
            found += draw.sample(plan.students, -(-number // 15))
    draw.shuffle(found)
    return found[:number]


def session(student: Student, folder: Path, number: int) -> onnxruntime.InferenceSession:
    torch.manual_seed(number)
    path = folder / f"{number}.onnx"
    metadata = OnnxMetadata(labels=LABELS, input=SPEC.model_dump(mode="json"), precision="fp32", recipe="latency")
    export_onnx(build_model(student.config).eval(), path, metadata)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def least_ms(sessions: list[onnxruntime.InferenceSession], rounds: int) -> list[float]:
    features = np.random.default_rng(0).standard_normal((1, 1, 256, 65)).astype(np.float32)
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(rounds):
        for own, found in zip(sessions, times):
            own.run(None, {"features": features})  # warm: the one before has filled the caches with its own weights
            start = time.thread_time()
            own.run(None, {"features": features})
            found.append(1000 * (time.thread_time() - start))
    return [min(found) for found in times]


def fit(students: list[Student], ms: list[float]) -> dict[str, float]:
    """Term -> microseconds for one, none below zero; every file weighs the same, whether it is fast or slow."""
    rows = np.array([[latency_terms(s.config)[term] for term in MICROSECONDS] for s in students], dtype=float)
    measured = 1000 * np.array(ms)
    scale = rows.max(0)
    scale[scale == 0] = 1
    found, _ = nnls(rows / scale / measured[:, None], np.ones(len(ms)))
    return dict(zip(MICROSECONDS, (float(value) for value in found / scale)))


def estimate(coefficients: dict[str, float], student: Student) -> float:
    return sum(coefficients[term] * count for term, count in latency_terms(student.config).items()) / 1000


def errors(coefficients: dict[str, float], students: list[Student], ms: list[float]) -> dict[str, float]:
    """Of the estimates, relative to what was measured."""
    found = sorted(abs(estimate(coefficients, s) / measured - 1) for s, measured in zip(students, ms))
    return {
        "files": len(found),
        "median": statistics.median(found),
        "worst": found[-1],
        "90 % below": found[int(0.9 * (len(found) - 1))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=90)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    students = sample(arguments.files, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        sessions = [session(student, Path(folder), number) for number, student in enumerate(students)]
        ms = least_ms(sessions, arguments.rounds)
    fitted = len(students) * 2 // 3
    coefficients = fit(students[:fitted], ms[:fitted])
    found = {
        "machine": machine(),
        "command": f"python benchmarks/latency_model.py --files {arguments.files} --rounds {arguments.rounds} "
        f"--seed {arguments.seed}",
        "microseconds": coefficients,
        "relative error": {
            "fitted on": errors(coefficients, students[:fitted], ms[:fitted]),
            "held out": errors(coefficients, students[fitted:], ms[fitted:]),
        },
        "files": [
            {
                "mixer": s.block.mixer,
                "tokens": s.n_tokens,
                "macs": s.macs,
                "terms": latency_terms(s.config),
                "ms": round(measured, 4),
                "estimated_ms": round(estimate(coefficients, s), 4),
                "held_out": place >= fitted,
            }
            for place, (s, measured) in enumerate(zip(students, ms))
        ],
    }
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    for term, value in coefficients.items():
        print(f'    "{term}": {value:.3g},')
    for name, figures in found["relative error"].items():
        print(name, {key: round(value, 3) for key, value in figures.items()})


if __name__ == "__main__":
    main()
