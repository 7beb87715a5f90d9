"""`aum-compress bench`: files, bundles and presets timed in onnxruntime, side by side. Torch-free for files."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aum_compress.bundle import CARD, read_bundle
from aum_compress.console import progress
from aum_compress.errors import AumError, BundleError, ModelFileError
from aum_compress.export.runtime import open_session, read_metadata
from aum_compress.export.timing import (
    Spread,
    interleaved,
    load_milliseconds,
    machine,
    node_times,
    peak_memory,
    random_feeds,
)
from aum_compress.models.presets import PRESETS, front_end_of

_LOADS, _PROFILED_RUNS = 5, 30
THREADS = {"1": 1, "all": 0}
"""What a row of the result is called -> onnxruntime's setting."""


def bench(target: str, against: str | None, rounds: int, dims: Mapping[str, int]) -> dict[str, Any]:
    """Times the files of `target`, and one of `against`, in one interleaved run.

    Returns:
        JSON values: `machine`, `rounds`, `models` (one record a file) and, with `against`, `ratios`: the time of each
        file of `target` over that of `against`.

    Raises:
        AumError: what is named is no file, bundle or preset, or holds no model; `against` holds several files; a size
            in `dims` that no file leaves open.
    """
    with ExitStack() as stack:
        files = dict(stack.enter_context(_files(target)))
        mine = list(files)
        if against is not None:
            others = dict(stack.enter_context(_files(against)))
            if len(others) > 1:
                raise AumError(f"--against {against}: holds {', '.join(others)}: name one of these files")
            ((name, path),) = others.items()
            rival = name if name not in files else f"{name} (against)"
            files[rival] = path
        if dims:
            _check_dims(files.values(), dims)
        with progress("bench") as reporter:
            models = {name: _measured_alone(path, dims) for name, path in files.items()}
            ratios: dict[str, dict[str, Any]] = {name: {} for name in mine} if against is not None else {}
            for done, (threads, setting) in enumerate(THREADS.items(), start=1):
                wall = _raced(files, setting, rounds, dims, models, threads)
                for name in ratios:
                    each = [one / other for one, other in zip(wall[name], wall[rival])]
                    ratios[name][threads] = asdict(Spread.of(each))
                reporter.advance(done, len(THREADS))
    found = {"machine": machine(), "rounds": rounds, "models": [{"name": n, **record} for n, record in models.items()]}
    return found if against is None else found | {"against": rival, "ratios": ratios}


def _check_dims(files: Iterable[Path], dims: Mapping[str, int]) -> None:
    sessions = [open_session(path, intra_op_num_threads=1) for path in files]
    sizes = [size for session in sessions for value in session.get_inputs() for size in value.shape]
    left_open = sorted({str(size) for size in sizes if not isinstance(size, int)})
    if unknown := sorted(dims.keys() - set(left_open)):
        raise AumError(
            f"--dim {unknown[0]}={dims[unknown[0]]}: no input leaves such a size open; open are: "
            f"{', '.join(left_open) or 'none'}"
        )


def _measured_alone(path: Path, dims: Mapping[str, int]) -> dict[str, Any]:
    session = open_session(path, intra_op_num_threads=1)
    feeds = random_feeds(session, str(path), dims)
    nodes = node_times(path, feeds, _PROFILED_RUNS)
    whole = sum(node.milliseconds for node in nodes)
    memory = peak_memory(path, feeds)
    return {
        "file_bytes": path.stat().st_size,
        "inputs": {name: list(value.shape) for name, value in feeds.items()},
        "clip_seconds": _clip_seconds(path),
        "load_ms": asdict(Spread.of(load_milliseconds(path, _LOADS))),
        "peak_memory_bytes": None if memory is None else memory[0],
        "peak_memory_of_model_bytes": None if memory is None else memory[1],
        "threads": {},
        "nodes": [asdict(node) | {"share": node.milliseconds / whole if whole else 0.0} for node in nodes],
    }


def _raced(
    files: Mapping[str, Path],
    setting: int,
    rounds: int,
    dims: Mapping[str, int],
    models: Mapping[str, dict[str, Any]],
    threads: str,
) -> dict[str, list[float]]:
    """Milliseconds by the clock of each round; what they come to goes into `models`."""
    sessions = {name: open_session(path, intra_op_num_threads=setting) for name, path in files.items()}
    feeds = {name: random_feeds(session, str(files[name]), dims) for name, session in sessions.items()}
    wall, processor = interleaved(sessions, feeds, rounds)
    for name, record in models.items():
        spread, seconds = Spread.of(wall[name]), record["clip_seconds"]
        if seconds is not None:  # an exported file: its one input begins with the batch axis
            seconds *= next(iter(feeds[name].values())).shape[0]
        record["threads"][threads] = {
            "ms": asdict(spread),
            "processor_ms": asdict(Spread.of(processor[name])) if setting == 1 else None,
            "real_time_factor": None if seconds is None else spread.median / 1000 / seconds,
        }
    return wall


def _clip_seconds(path: Path) -> float | None:
    """Audio behind one clip of an input; None for files of other makers."""
    try:
        return read_metadata(open_session(path, intra_op_num_threads=1), path).clip_seconds
    except ModelFileError:
        return None


@contextmanager
def _files(target: str) -> Iterator[dict[str, Path]]:
    """Name -> file of what is named; what has to be exported first lies in a folder that is gone afterwards."""
    path = Path(target)
    if path.suffix in (".onnx", ".ort"):
        yield {path.name: path}
        return
    if target not in PRESETS and not path.exists():
        raise AumError(
            f"{target}: no such bundle or ONNX file, and no preset of that name; presets: {', '.join(PRESETS)}"
        )
    with TemporaryDirectory() as folder:
        if not path.exists():
            yield {target: _exported_preset(target, Path(folder))}
            return
        bundle = read_bundle(path.parent if path.name == CARD else path)
        files = {name: bundle.path / name for name in sorted(bundle.card.files) if name.endswith(".onnx")}
        if bundle.card.kind == "model":
            files = {f"{target} ({bundle.card.precision})": _exported_bundle(bundle, Path(folder))}
        if not files:
            raise BundleError(f"{target}: holds no ONNX file")
        yield files


def _exported_preset(name: str, folder: Path) -> Path:
    from aum_compress.audio.config import InputSpec
    from aum_compress.export.metadata import OnnxMetadata
    from aum_compress.export.onnx_writer import export_onnx
    from aum_compress.models.factory import build_model

    spec = InputSpec(front_end=front_end_of(name), clip_seconds=1.0)
    labels = tuple(f"class {number}" for number in range(10))
    model = build_model(PRESETS[name](*spec.feature_shape[1:], len(labels))).eval()
    path = folder / f"{name}.onnx"
    export_onnx(model, path, OnnxMetadata(labels=labels, input=spec.model_dump(mode="json"), precision="fp32"))
    return path


def _exported_bundle(bundle: Any, folder: Path) -> Path:
    from aum_compress.export.metadata import OnnxMetadata
    from aum_compress.export.onnx_writer import export_onnx

    card = bundle.card
    metadata = OnnxMetadata(labels=card.labels, input=card.input.model_dump(mode="json"), precision=card.precision)
    path = folder / "model.onnx"
    export_onnx(bundle.load_model(), path, metadata)
    return path


def bench_lines(found: Mapping[str, Any], top: int = 8) -> list[str]:
    """For people: one line a model and number of threads, where the time goes, then the ratios."""
    cpu = found["machine"]
    lines = [f"{cpu['cpu']}, {cpu['cores']} cores, onnxruntime {cpu['onnxruntime']}; {found['rounds']} rounds in turn"]
    for model in found["models"]:
        lines.append(f"{model['name']}: {model['file_bytes']:,} bytes, {_sizes(model['inputs'])}")
        lines.append(f"  load {_spread(model['load_ms'])}, {_memory(model)}")
        for threads, figures in model["threads"].items():
            factor = figures["real_time_factor"]
            real_time = "" if factor is None else f", real-time factor {factor:.5f}"
            count = "1 thread" if threads == "1" else "all threads"
            lines.append(f"  {count}: {_spread(figures['ms'])}{real_time}")
        shares = [f"{n['operator']} {n['share']:.0%} ({n['calls']:.0f})" for n in model["nodes"][:top]]
        lines.append(f"  nodes: {', '.join(shares)}")
    for name, ratios in found.get("ratios", {}).items():
        for threads, ratio in ratios.items():
            count = "1 thread" if threads == "1" else "all threads"
            lines.append(
                f"{name} takes {ratio['median']:.2f} times {found['against']}'s time on {count} "
                f"({ratio['p10']:.2f} to {ratio['p90']:.2f})"
            )
    return lines


def _sizes(inputs: Mapping[str, list[int]]) -> str:
    return ", ".join(f"{name} {json.dumps(shape)}" for name, shape in inputs.items())


def _spread(record: Mapping[str, float]) -> str:
    return f"{record['median']:.3f} ms ({record['p10']:.3f} to {record['p90']:.3f})"


def _memory(model: Mapping[str, Any]) -> str:
    if model["peak_memory_bytes"] is None:
        return "peak memory unknown on this system"
    whole, own = model["peak_memory_bytes"] / 1e6, model["peak_memory_of_model_bytes"] / 1e6
    return f"peak memory {whole:.1f} MB, of which {own:.1f} MB beyond onnxruntime itself"
