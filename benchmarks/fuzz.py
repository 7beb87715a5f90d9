"""Damaged files for every reader of bytes from outside, for as long as one has time; findings and counts as JSON.

    python benchmarks/fuzz.py [--minutes 60] [--seed 0] [--only NAME...] [--out benchmarks/fuzz.json]

Each reader gets the same share of the time. A finding is an exception that is no AumError, memory beyond 6 GB among
them, or a file that takes longer than 10 s: its seed makes the file again. `tests/test_fuzz.py` holds the cases that
were found.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fuzzing import fuzzed, quiet, targets
from tiny_recipe import finished_run

from aum_compress.bundle import machine

MOST_BYTES, MOST_SECONDS = 6 * 2**30, 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        finished = finished_run(Path(folder) / "run")
        (Path(folder) / "files").mkdir()
        made = targets(Path(folder) / "files", finished.out / "runs" / "tiny" / "06-quantize", finished.outcome.folder)
        chosen = [target for target in made if not arguments.only or target.name in arguments.only]
        quiet()
        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
        rows = [_row(target, arguments.seed, 60 * arguments.minutes / len(chosen)) for target in chosen]
    record = {"command": " ".join(["python", "benchmarks/fuzz.py", *sys.argv[1:]]), "machine": machine()}
    record |= {"files": sum(row["files"] for row in rows), "findings": sum(len(row["findings"]) for row in rows)}
    arguments.out.write_text(json.dumps(record | {"readers": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"{record['files']:,} files, {record['findings']} findings: {arguments.out}")


def _row(target, seed: int, seconds: float) -> dict:
    """One reader: how many files it read in so many seconds, and what it stumbled over."""
    found: Counter[str] = Counter()
    first: dict[str, int] = {}
    started, count = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        begun = time.monotonic()
        _, error = fuzzed(target, seed + count)
        if error is None and time.monotonic() - begun > MOST_SECONDS:
            error = TimeoutError()
        if error is not None:
            frames = traceback.extract_tb(error.__traceback__)
            where = f" in {Path(frames[-1].filename).name}, {frames[-1].name}" if frames else ""
            what = f"{type(error).__name__}{where}"
            found[what] += 1
            first.setdefault(what, seed + count)
        count += 1
    findings = [{"what": what, "files": n, "first_seed": first[what]} for what, n in found.items()]
    return {"reader": target.name, "files": count, "findings": findings}


if __name__ == "__main__":
    main()
