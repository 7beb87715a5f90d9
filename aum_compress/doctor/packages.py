"""Python and the packages that pyproject.toml asks for, each held against its range. Imports none of them."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from aum_compress import __version__
from aum_compress.doctor.findings import Finding

PACKAGE = "aum-compress"
PYTHON = SpecifierSet(">=3.11,<3.14")
PURPOSE = {
    "torch": "training, pruning, quantising, export",
    "torchaudio": "resampling, the Kaldi front-end",
    "lightning": "training",
    "ml-dtypes": "int4 weights in exported files",
    "filelock": "runs, caches and sweeps that share a folder",
    "fvcore": "the second count of MACs, on the traced graph",
    "torchinfo": "what DCASE's own script would print",
    "onnx": "export, budgets of ONNX files",
    "onnxscript": "export",
    "onnx-ir": "export",
    "onnxruntime": "verification, prediction",
    "numpy": "everything",
    "optuna": "sweeps",
    "packaging": "this check",
    "pydantic": "recipes and bundles",
    "pyyaml": "recipes",
    "rich": "progress bars and tables",
    "safetensors": "bundles",
    "soundfile": "reading audio",
    "threadpoolctl": "numbers of threads",
    "typer": "the command line",
    "typing-extensions": "Python 3.11",
}
"""Package -> what does not work without it."""
OPTIONAL = {
    "cuda": "the scan on an NVIDIA GPU, fused; without it a loop in torch, several times slower",
    "tensorboard": "train.logger: tensorboard",
    "wandb": "train.logger: wandb",
    "test": "running the tests",
}
"""Extra -> what it is for."""


def python_finding() -> Finding:
    """The interpreter."""
    found = platform.python_version()
    if PYTHON.contains(found, prereleases=True):
        return Finding("packages", "python", "ok", found, sys.executable)
    return Finding("packages", "python", "problem", found, f"wanted {PYTHON}; make a virtual environment with one")


def package_findings() -> list[Finding]:
    """One a package, those of extras last; a source folder that was never installed says no ranges."""
    try:
        wanted = [Requirement(text) for text in requires(PACKAGE) or []]
    except PackageNotFoundError:
        wanted = [Requirement(name) for name in PURPOSE]
        own = Finding("packages", PACKAGE, "absent", __version__, "not installed: used from a source folder")
    else:
        own = Finding("packages", PACKAGE, "ok", __version__)
    required = [_finding(one, PURPOSE.get(one.name, "")) for one in wanted if _extra(one) is None]
    extras = [_finding(one, OPTIONAL[extra], extra) for one in wanted if (extra := _extra(one)) in OPTIONAL]
    return [own, *required, *extras]


def _extra(requirement: Requirement) -> str | None:
    """The extra that asks for it; None where it is always wanted."""
    return next((extra for extra in OPTIONAL if requirement.marker and f'"{extra}"' in str(requirement.marker)), None)


def _finding(requirement: Requirement, purpose: str, extra: str | None = None) -> Finding:
    name, range_ = requirement.name, str(requirement.specifier)
    mend = f'pip install "{name}{range_}"' if extra is None else f'pip install "{PACKAGE}[{extra}]"'
    try:
        found = version(name)
    except PackageNotFoundError:
        state = "problem" if extra is None else "absent"
        return Finding("packages", name, state, "not installed", f"needed for {purpose}: {mend}")
    if not requirement.specifier.contains(found, prereleases=True):
        return Finding("packages", name, "problem", found, f"wanted {range_}, for {purpose}: {mend}")
    return Finding("packages", name, "ok", found, purpose)
