"""How long an ONNX file takes on this machine, in onnxruntime. Torch-free.

Other programs make a machine slower now and then, so nothing is measured by itself: the files run in turn, round by
round, and two are compared by the ratio of each round.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime import InferenceSession

from aum_compress.errors import ModelFileError
from aum_compress.export.runtime import open_session
from aum_compress.processor import processor, processor_flags

Feeds = Mapping[str, np.ndarray]
_WARM_RUNS = 5
_TYPES = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class Spread:
    """What many measurements say."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        low, high = np.percentile(values, (10, 90))
        return cls(float(statistics.median(values)), float(low), float(high))


@dataclass(frozen=True)
class NodeTime:
    """All nodes of one operator in one run, what runs inside of them not included."""

    operator: str
    milliseconds: float
    calls: float


def random_feeds(
    session: InferenceSession, source: str, dims: Mapping[str, int] | None = None
) -> dict[str, np.ndarray]:
    """Standard normal values for every input; an open first axis is a batch of one.

    Args:
        source: file name for messages.
        dims: size of each other open dimension, by name.

    Raises:
        ModelFileError: an open dimension without a size, or an input that is not floating-point.
    """
    rng = np.random.default_rng(0)
    feeds = {}
    for value in session.get_inputs():
        if value.type not in _TYPES:
            raise ModelFileError(f"{source}: input {value.name} is {value.type}, floating-point numbers were wanted")
        shape = []
        for place, size in enumerate(value.shape):
            known = size if isinstance(size, int) else (dims or {}).get(str(size), None if place else 1)
            if known is None:
                raise ModelFileError(
                    f"{source}: input {value.name}: size {size!r} is open: give it, --dim {size}=COUNT"
                )
            shape.append(known)
        feeds[value.name] = rng.standard_normal(shape).astype(_TYPES[value.type])
    return feeds


def interleaved(
    sessions: Mapping[str, InferenceSession], feeds: Mapping[str, Feeds], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Name -> milliseconds of each round: by the clock, and of the calling thread's processor time.

    Processor time leaves out what other programs took; it is the whole work only where one thread does all of it.
    """
    wall: dict[str, list[float]] = {name: [] for name in sessions}
    processor: dict[str, list[float]] = {name: [] for name in sessions}
    for name, session in sessions.items():
        for _ in range(_WARM_RUNS):
            session.run(None, feeds[name])
    names = list(sessions)
    for turn in range(rounds):
        # each in turn begins, so that none always runs behind the same other
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started, worked = time.perf_counter(), time.thread_time()
            sessions[name].run(None, feeds[name])
            processor[name].append(1000 * (time.thread_time() - worked))
            wall[name].append(1000 * (time.perf_counter() - started))
    return wall, processor


def load_milliseconds(path: Path, times: int) -> list[float]:
    """How long it takes to open the file for inference, its graph optimised."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        open_session(path, intra_op_num_threads=1)
        found.append(1000 * (time.perf_counter() - started))
    return found


def node_times(path: Path, feeds: Feeds, runs: int) -> list[NodeTime]:
    """Time by operator in one run on one thread, dearest first: medians over `runs`, onnxruntime's profiler on.

    The profiler costs about a microsecond a node, so that graphs of many small nodes look slower than they are.
    """
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(path, intra_op_num_threads=1, profile=Path(folder) / "profile")
        for _ in range(runs):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    begins = sorted(e["ts"] for e in events if e.get("cat") == "Session" and e["name"] == "model_run")
    by_run: list[Counter[str]] = [Counter() for _ in begins]
    calls: Counter[str] = Counter()
    for event, own in _own_durations(nodes):
        operator = event["args"]["op_name"]
        by_run[max(0, int(np.searchsorted(begins, event["ts"], side="right")) - 1)][operator] += own
        calls[operator] += 1
    medians = {name: statistics.median(run[name] for run in by_run) / 1000 for name in calls}
    found = [NodeTime(name, medians[name], calls[name] / len(begins)) for name in calls]
    return sorted(found, key=lambda node: -node.milliseconds)


def _own_durations(nodes: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    """Each node with its time without that of the nodes in its bodies, which lie within it."""
    own = {id(node): float(node["dur"]) for node in nodes}
    around: list[dict[str, Any]] = []
    for node in sorted(nodes, key=lambda node: (node["ts"], -node["dur"])):
        while around and node["ts"] >= around[-1]["ts"] + around[-1]["dur"]:
            around.pop()
        if around:
            own[id(around[-1])] -= node["dur"]
        if node["args"]["op_name"] in ("Scan", "Loop", "If"):
            around.append(node)
    return [(node, own[id(node)]) for node in nodes]


# a process of its own, because memory that has been freed stays with the process that had it
_PROBE = """
import json, sys
import numpy as np, onnxruntime
def peak():
    try:
        with open("/proc/self/status") as status:
            return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 4
before = peak()
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feeds = {name: np.zeros(shape, dtype) for name, shape, dtype in json.loads(sys.argv[2])}
for _ in range(3):
    session.run(None, feeds)
print(json.dumps([before, peak()]))
"""


def peak_memory(path: Path, feeds: Feeds) -> tuple[int, int] | None:
    """Peak resident bytes of a process that opens the file and runs it on one thread: of the whole process, and beyond
    what it had with onnxruntime imported. None where the system does not tell."""
    given = json.dumps([[name, list(value.shape), value.dtype.str] for name, value in feeds.items()])
    command = [sys.executable, "-c", _PROBE, str(path), given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    before, after = json.loads(done.stdout)
    return after, after - before


def machine() -> dict[str, Any]:
    """What ran the files."""
    flags = processor_flags()
    return {
        "cpu": processor(),
        "simd": [name for name in ("avx2", "avx512f", "avx_vnni", "avx512_vnni") if name in flags],
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
        "onnxruntime": onnxruntime.__version__,
    }
