"""SIGKILL at random moments of a run: does the rerun always end with the same models?

    python benchmarks/kill_runs.py [--kills 50] [--each 5] [--recipe quickstart | --tiny] [--seed 0] [--out FILE.json]

One run to the end says which models are wanted. Then fresh runs are killed, each at `--each` random moments of the time
that the whole one took, started again behind every kill and at last left to end: what comes out must be the same
tensors, byte by byte, in every stage, the same ONNX graphs (their metadata name the moment), and nothing half-written
beside them. `--tiny` takes the recipe of the tests, which is all stages in seconds. Times serve to spread the kills and
are no result.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx

from aum_compress.bundle import file_sha256, machine

COMMAND = [sys.executable, "-c", "from aum_compress.cli import main; main()", "run"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--each", type=int, default=1, help="kills of one run before it is left to end")
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--tiny", action="store_true", help="the recipe of the tests in place of --recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        recipe = _tiny(place) if arguments.tiny else arguments.recipe
        started = time.monotonic()
        _run(recipe, place / "whole")
        seconds = time.monotonic() - started
        wanted = _models(place / "whole")
        rows: list[dict[str, Any]] = []
        killed = 0
        while killed < arguments.kills:
            times = min(arguments.each, arguments.kills - killed)
            moments = sorted(generator.uniform(0, seconds) for _ in range(times))
            waits = [moment - before for before, moment in zip([0.0, *moments], moments)]
            rows.append(_killed(recipe, place / "killed", waits, wanted))
            killed += rows[-1]["kills"]
            print(f"{killed} of {arguments.kills}: {rows[-1]}", file=sys.stderr, flush=True)
            shutil.rmtree(place / "killed", ignore_errors=True)
            _write(arguments.out, rows, len(wanted))  # what is done is not lost if this one is killed itself
    same = sum(row["same"] for row in rows)
    print(f"{killed} kills of {len(rows)} runs, all models the same in {same}: {arguments.out}")


def _write(out: Path, rows: list[dict[str, Any]], models: int) -> None:
    record = {
        "command": " ".join(["python", "benchmarks/kill_runs.py", *sys.argv[1:]]),
        "machine": machine(),
        "models": models,
        "kills": sum(row["kills"] for row in rows),
        "ended": len(rows),
        "same_models": sum(row["same"] for row in rows),
        "nothing_left_over": sum(not row["left_over"] for row in rows),
        "runs": rows,
    }
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _tiny(place: Path) -> str:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from audio_trees import write_tau_tree
    from tiny_recipe import write_recipe

    return str(write_recipe(place, write_tau_tree(place / "tree")))


def _start(recipe: str, out: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"AUM_CACHE": str(out.parent / f"cache-of-{out.name}")}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen([*COMMAND, recipe, "--out", str(out)], env=environment, **quiet)


def _run(recipe: str, out: Path) -> None:
    process = _start(recipe, out)
    _, stderr = process.communicate()
    if process.returncode:
        raise SystemExit(f"the run itself has failed: {stderr.decode()[-2000:]}")


def _killed(recipe: str, out: Path, waits: list[float], wanted: dict[str, str]) -> dict[str, Any]:
    """One run, started again behind each kill, after so many seconds each; at last left to end."""
    kills, done = 0, []
    for wait in waits:
        process = _start(recipe, out)
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        done.append(len(list(out.glob("runs/*/*/bundle.json"))))
    _run(recipe, out)
    found = _models(out)
    left_over = [
        str(path.relative_to(out)) for path in out.rglob(".*") if "writing" in path.name or "replaced" in path.name
    ]
    shutil.rmtree(out.parent / f"cache-of-{out.name}", ignore_errors=True)
    changed = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    return {
        "after_seconds": [round(wait, 2) for wait in waits],
        "kills": kills,
        "stages_done": done,
        "same": not changed,
        "changed": changed,
        "left_over": left_over,
    }


def _models(out: Path) -> dict[str, str]:
    """SHA-256 of all tensors, and of all ONNX files without their metadata."""
    found = {}
    for path in [*out.rglob("model.safetensors"), *out.rglob("*.onnx")]:
        if ".work" in path.parts:
            continue
        name = str(path.relative_to(out))
        if path.suffix == ".onnx":
            model = onnx.load(path)
            del model.metadata_props[:]
            found[name] = hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
        else:
            found[name] = file_sha256(path)
    return found


if __name__ == "__main__":
    main()
