"""A small model of each precision and its exported file, made once a test session."""

import tempfile
from functools import cache
from pathlib import Path

import torch

from aum_compress.audio.config import InputSpec, LogMelConfig
from aum_compress.compress.quantize import quantize
from aum_compress.export.metadata import OnnxMetadata, Precision
from aum_compress.export.onnx_writer import export_onnx, fold_if_needed, round_to_half
from aum_compress.export.verify import Reference
from aum_compress.export.waveform_input import write_waveform_file
from aum_compress.models.config import AudioMambaConfig, ConvStage, ConvStem, uniform_blocks
from aum_compress.models.factory import Model, build_model
from aum_compress.recipe_schema import QuantizeSection

LABELS = ("airport", "bus", "metro", "park")
SPEC = InputSpec(
    front_end=LogMelConfig(sample_rate_hz=8000, n_fft=512, window_samples=400, hop_samples=250, n_mels=32),
    clip_seconds=0.5,
    mean=-4.0,
    std=3.0,
)
CONFIG = AudioMambaConfig(
    n_mels=32,
    n_frames=17,
    n_classes=len(LABELS),
    d_model=16,
    blocks=uniform_blocks(1, 16, d_state=4),
    stem=ConvStem(stages=(ConvStage(channels=8, stride_frames=2, expansion=0), ConvStage(channels=8))),
)


def liven(model: Model, seed: int = 0) -> Model:
    """Initial weights give logits near zero for any input; these differ between inputs by more than a tolerance."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0, generator=generator)
        elif tensor.is_floating_point() and not name.endswith(("_log", "dt_proj.bias", "dt_proj_b.bias")):
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.2)
    return model.eval()


@cache
def model(precision: Precision) -> Model:
    """What the file of this precision must be equal to."""
    torch.manual_seed(0)
    trained = liven(build_model(CONFIG))
    if precision == "fp32":
        return trained
    rounded = round_to_half(trained)
    if precision == "fp16":
        return rounded
    heard = torch.randn(16, 1, CONFIG.n_mels, CONFIG.n_frames, generator=torch.Generator().manual_seed(1))
    return quantize(rounded, [heard], QuantizeSection(weights="int4-weight" if precision == "int4" else "int8"))


def metadata(precision: Precision, **changes) -> OnnxMetadata:
    """Metadata of the small model."""
    values = {"labels": LABELS, "input": SPEC.model_dump(mode="json"), "precision": precision, "recipe": "small"}
    return OnnxMetadata(**values | changes)


def reference(precision: Precision) -> Reference:
    """What `verify_onnx` is to compare with."""
    return Reference(fold_if_needed(model(precision)), LABELS, SPEC)


def exported(precision: Precision, *, dynamic_batch: bool = False) -> bytes:
    """The file of this precision."""
    return _exported(precision, dynamic_batch)


@cache
def _exported(precision: Precision, dynamic_batch: bool) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model-{precision}.onnx"
        export_onnx(model(precision), path, metadata(precision), dynamic_batch=dynamic_batch)
        return path.read_bytes()


@cache
def exported_waveform(precision: Precision, *, dynamic_batch: bool = False, input_rate_hz: int | None = None) -> bytes:
    """The same with the front-end inside."""
    with tempfile.TemporaryDirectory() as folder:
        source = written(Path(folder), precision, dynamic_batch=dynamic_batch)
        target = Path(folder) / "waveform.onnx"
        write_waveform_file(source, target, input_rate_hz)
        return target.read_bytes()


def written(folder: Path, precision: Precision, *, dynamic_batch: bool = False) -> Path:
    """That file in `folder`."""
    path = folder / f"model-{precision}.onnx"
    path.write_bytes(exported(precision, dynamic_batch=dynamic_batch))
    return path


def written_waveform(folder: Path, precision: Precision, **options) -> Path:
    """The one with the front-end inside in `folder`; options as in `exported_waveform`."""
    path = folder / f"model-{precision}-waveform.onnx"
    path.write_bytes(exported_waveform(precision, **options))
    return path
