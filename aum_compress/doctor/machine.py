"""Processor, scan, onnxruntime and cache folder, as this process finds them. Nothing heavy is imported at the top."""

import logging
import os
import shutil
import tempfile
from importlib.util import find_spec

from aum_compress.data.config import cache_root
from aum_compress.doctor.findings import Finding
from aum_compress.processor import exact_int8_products, processor, processor_flags

INT8_FEATURES = {
    "avx512_vnni": "VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx2": "AVX2",
    "asimddp": "dot products",
    "i8mm": "int8 matrix products",
}
"""Flag of /proc/cpuinfo -> what it is called."""
LEAST_FREE_BYTES = 2_000_000_000


def cpu_findings() -> list[Finding]:
    """Model and cores, and what int8 products will run on."""
    cores = os.cpu_count() or 1
    findings = [Finding("processor", "cores", "ok", f"{cores}", processor())]
    flags = processor_flags()
    if not flags:
        return [*findings, Finding("processor", "int8", "absent", "unknown", "this system does not list the features")]
    found = [title for flag, title in INT8_FEATURES.items() if flag in flags]
    note = "int8 files run as they are counted"
    if not exact_int8_products():
        note = (
            "int8 products are summed in 16 bits here, which 8-bit weights may overflow: keep quantize.weight_bits at "
            "7, its default. int8 files are hardly faster than fp32 ones"
        )
    return [*findings, Finding("processor", "int8", "ok", ", ".join(found) or "no extension", note)]


def scan_findings() -> list[Finding]:
    """Which code runs the selective scan, why, and whether it computes what the plain loop does."""
    import torch

    from aum_compress.kernels import build

    if os.environ.get("AUM_NO_KERNEL") == "1":
        backend, note = "loop in torch", "AUM_NO_KERNEL=1 switches the fused scan off"
    else:
        complaints = _Complaints()
        build._log.addHandler(complaints)
        propagate, build._log.propagate = build._log.propagate, False
        try:
            fused = build.library() is not None
        finally:
            build._log.removeHandler(complaints)
            build._log.propagate = propagate
        backend = "fused, in C" if fused else "loop in torch"
        note = "compiled once by the system's C compiler" if fused else " ".join(complaints.said) or "no compiler"
    state = "ok" if backend.startswith("fused") else "absent"
    return [Finding("scan", "CPU", state, backend, note), _agreement(), _gpu(torch)]


class _Complaints(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def _agreement() -> Finding:
    """Forward and backward of the scan in use, against the ten lines that it is defined by."""
    import torch

    from aum_compress.models.scan import selective_scan, selective_scan_oracle

    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 12, 33), (2, 12, 33), (12, 4), (2, 4, 33), (2, 4, 33))
    u, delta, A, B, C = (torch.randn(shape, generator=generator) for shape in shapes)
    A = -A.exp()
    results = []
    for scan in (selective_scan, selective_scan_oracle):
        inputs = [x.clone().requires_grad_() for x in (u, delta, A, B, C)]
        y = scan(*inputs, delta_softplus=True)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    error = max(float((x - y).detach().abs().max() / y.detach().abs().max()) for x, y in zip(*results))
    good = error < 1e-4
    note = "output and gradients, against the plain loop" if good else "delete the compiled scan in the cache folder"
    return Finding("scan", "largest difference", "ok" if good else "problem", f"{error:.1e}", note)


def _gpu(torch) -> Finding:
    if not torch.cuda.is_available():
        return Finding("scan", "GPU", "absent", "none", "training runs on the processor")
    name = torch.cuda.get_device_name()
    if find_spec("mamba_ssm") is None:
        return Finding("scan", "GPU", "absent", name, "the scan is a loop in torch: pip install 'aum-compress[cuda]'")
    return Finding("scan", "GPU", "ok", name, "mamba-ssm's kernels")


def onnxruntime_finding() -> Finding:
    """Whether onnxruntime reads what is written here, and whether its 8-bit products overflow on this processor."""
    import numpy as np
    import onnx
    import onnxruntime

    from aum_compress.export.onnx_writer import IR_VERSION, OPSET

    graph = onnx.parser.parse_graph(
        "products (uint8[1, 64] x, int8[64, 32] w) => (int32[1, 32] y) { y = MatMulInteger(x, w) }"
    )
    opset = onnx.helper.make_opsetid("", OPSET)
    model = onnx.helper.make_model(graph, ir_version=IR_VERSION, opset_imports=[opset])
    version = onnxruntime.__version__
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        x, w = np.full((1, 64), 255, np.uint8), np.full((64, 32), 127, np.int8)
        (found,) = session.run(None, {"x": x, "w": w})
    except Exception as error:  # onnxruntime's own exceptions have no common base
        note = f"does not run a file of opset {OPSET}, IR {IR_VERSION}: {' '.join(str(error).split())}"
        return Finding("onnxruntime", "runs our files", "problem", version, note)
    exact = bool((found == 64 * 255 * 127).all())
    note = f"opset {OPSET}, IR {IR_VERSION}; " + (
        "8-bit products are exact" if exact else "8-bit products overflow: keep quantize.weight_bits at 7, its default"
    )
    return Finding("onnxruntime", "runs our files", "ok", version, note)


def cache_finding() -> Finding:
    """Where features and the compiled scan are kept, whether it can be written, and what is left there."""
    folder = cache_root()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        note = f"cannot be written: {error.strerror or error}; name another folder in AUM_CACHE"
        return Finding("cache", "folder", "problem", str(folder), note)
    note = f"{free / 1e9:.1f} GB free"
    if free < LEAST_FREE_BYTES:
        note += "; features of a large data set may not fit: name a folder with more room in AUM_CACHE"
    return Finding("cache", "folder", "ok", str(folder), note)
