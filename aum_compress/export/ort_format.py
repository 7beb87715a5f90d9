"""onnxruntime's own format, for builds of it that hold a model's operators and nothing else. Torch-free."""

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from aum_compress.errors import ModelFileError, VerificationFailed
from aum_compress.export.onnx_file import load_onnx
from aum_compress.export.runtime import open_session, read_metadata, run_session
from aum_compress.export.verification import TOLERANCES, compare

CONFIG = "required_operators.config"
"""What onnxruntime's build script takes as `--include_ops_by_config`."""


def write_ort(source: Path, target: Path) -> None:
    """Writes the ONNX file at `source` in ORT format, metadata included.

    The graph is optimised for good, but not for one processor: a layout for x86 alone is left out, as
    `onnxruntime.tools.convert_onnx_models_to_ort` does. Constants are folded, so a file with a front-end inside stores
    its tables, which the ONNX file computes at load: it is larger by two megabytes at n_fft 4096.

    Raises:
        ModelFileError: a source that onnxruntime does not load, or with weights of 4 bits; or a target
            that cannot be written.
        VerificationFailed: the new file computes something else than its source.
    """
    if narrow := [t.name for t in load_onnx(source).graph.initializer if t.data_type == onnx.TensorProto.INT4]:
        raise ModelFileError(
            f"{source}: {narrow[0]} has 4 bits a weight, which onnxruntime cannot read back from its own format; ship "
            "the .onnx file, or quantise to int8"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.save_model_format", "ORT")
    with tempfile.TemporaryDirectory(dir=_folder(target)) as beside:
        options.optimized_model_filepath = str(Path(beside) / target.name)
        try:
            onnxruntime.InferenceSession(
                str(source), options, providers=["CPUExecutionProvider"], disabled_optimizers=["NchwcTransformer"]
            )
        except Exception as error:  # onnxruntime raises a class of its own for each of its status codes
            reason = " ".join(str(error).split())[:300]
            raise ModelFileError(f"{source}: onnxruntime cannot write it in ORT format: {reason}") from None
        _check_equal(source, Path(options.optimized_model_filepath))
        os.replace(options.optimized_model_filepath, target)


def _check_equal(source: Path, written: Path) -> None:
    sessions = [open_session(path, intra_op_num_threads=1) for path in (source, written)]
    metadata = read_metadata(sessions[1], written)
    inputs = np.random.default_rng(0).uniform(-1, 1, (4, *metadata.input_shape)).astype(np.float32)
    wanted, found = (run_session(session, inputs) for session in sessions)
    check = compare("random", found, wanted, TOLERANCES[metadata.precision, True], optimised=True)
    if not check.passed:
        raise VerificationFailed(f"{source}: in ORT format it computes something else: {check.reason}")


def _folder(target: Path) -> Path:
    if not target.parent.is_dir():
        raise ModelFileError(f"{target}: cannot be written: there is no folder {target.parent}")
    return target.parent


def required_operators(files: Sequence[Path]) -> str:
    """Configuration of a reduced build: domain, opset and operators that the `.ort` files run, a line each.

    Raises:
        ModelFileError: no `.ort` files, or one that cannot be read.
    """
    from onnxruntime.tools.ort_format_model import create_config_from_models  # it sets up logging when imported

    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)  # it names a temporary folder
    if not files:
        raise ModelFileError("no .ort files to take operators from")
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / CONFIG
        for chosen in (*([file] for file in files), list(files)):  # each alone first: who fails is named
            try:
                create_config_from_models(chosen, written, enable_type_reduction=False)
            except Exception as error:  # its reader trusts every offset in a file
                reason = f"{type(error).__name__}: {error}"[:200]
                raise ModelFileError(
                    f"{chosen[0]}: its operators cannot be read ({reason}): damaged, or no file in ORT format; take it "
                    "away or export it again"
                ) from None
        lines = [line for line in written.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return "\n".join((f"# operators of {', '.join(sorted(file.name for file in files))}", *lines)) + "\n"


def operator_names(config: str) -> list[str]:
    """Operators in such a configuration, `Domain.Name` where the domain is not ONNX's own."""
    found = set()
    for line in config.splitlines():
        if line and not line.startswith("#"):
            domain, _, operators = line.split(";")
            found |= {name if domain == "ai.onnx" else f"{domain}.{name}" for name in operators.split(",")}
    return sorted(found)
