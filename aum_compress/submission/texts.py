"""The text files of a submission package: its module, setup.py, requirements and README."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version

from aum_compress import __version__
from aum_compress.submission.record import Costs

_RUNS_ON = ("torch>=2.11,<2.14", "numpy>=1.26", "pydantic>=2.7,<3", "safetensors>=0.4.5", "soundfile>=0.12.1")
_SCRIPTS_NEED = ("torchinfo==1.8.0", "pandas>=2", "scikit-learn>=1.4")
"""What the organisers' scripts import besides torch."""


def requirements() -> str:
    """requirements.txt."""
    return "\n".join(
        (
            "# the model",
            *_RUNS_ON,
            "# the organisers' test_complexity.py and evaluate_submission.py",
            *_SCRIPTS_NEED,
            "",
        )
    )


def setup(label: str) -> str:
    """setup.py."""
    needs = ",\n".join(f"        {requirement!r}" for requirement in (*_RUNS_ON, *_SCRIPTS_NEED))
    return f'''from setuptools import find_packages, setup

setup(
    name="{label}",
    version="0.1.0",
    description="Inference package for DCASE 2025 Task 1",
    packages=find_packages(include=["{label}", "{label}.*"]),
    package_data={{"": ["*.csv", "*.wav", "*.safetensors", "*.json", "*.c", "*.h", "LICENSE"]}},
    python_requires=">=3.11",
    install_requires=[
{needs},
    ],
)
'''


def module(label: str, index: int) -> str:
    """`<label>_<index>.py`: the four functions."""
    return f'''"""The four functions that DCASE 2025 Task 1 wants of {label}_{index}."""

from pathlib import Path
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from {label}.aum_compress.submission import inference

CHECKPOINT = Path(__file__).parent / "ckpts" / "{label}_{index}.safetensors"


def predict(
    file_paths: List[str],
    device_ids: List[str],
    model_file_path: Optional[str] = None,
    use_cuda: bool = True,
    batch_size: int = 64,
) -> Tuple[List[Tensor], List[str]]:
    """Logits [n_classes] of each file, in order, and the class names in the order of the logits."""
    return inference.predict(file_paths, device_ids, load_model(model_file_path), use_cuda, batch_size)


def load_model(model_file_path: Optional[str] = None) -> torch.nn.Module:
    """The submission in this package, or in another checkpoint (.safetensors) of the same form."""
    return inference.load_model(model_file_path or CHECKPOINT)


def load_inputs(file_paths: List[str], device_ids: List[str], model: torch.nn.Module) -> List[Tensor]:
    """What a device's model reads of each file, [1, 1, n_mels, n_frames], in order."""
    return inference.load_inputs(file_paths, device_ids, model)


def get_model_for_device(model: torch.nn.Module, device_id: str) -> torch.nn.Module:
    """The device's own model; the general one for devices without, and for unknown names."""
    return inference.get_model_for_device(model, device_id)
'''


def readme(label: str, systems: Mapping[int, Mapping[str, Costs]], labels: Sequence[str]) -> str:
    """README.md.

    Args: systems: index -> name of each of its models -> its costs, as package.json holds them.
    """
    rows = [
        f"| {label}_{index} | {name} | {costs.dcase_bytes:,} | {costs.param_bytes:,} | {costs.dcase_macs:,} | "
        f"{costs.macs:,} |"
        for index, models in sorted(systems.items())
        for name, costs in models.items()
    ]
    first = min(systems)
    return f"""# {label}: inference package for DCASE 2025 Task 1

Written by aum-compress {__version__} with torch {version("torch")}. Classes: {", ".join(labels)}.

```
pip install .
python test_complexity.py --submission_name {label} --submission_index {first}
python evaluate_submission.py --submission_name {label} --submission_index {first} --dev_set_dir DEV --eval_set_dir EVAL
```

Both scripts, and `complexity.py`, are the organisers' (https://github.com/CPJKU/dcase2025_task1_inference) and run
unchanged. `predictions/` holds what they would write and what is submitted with it.

## Size and multiplications

| system | model for | bytes, by the script | bytes stored | MACs of a clip, by the script | MACs of a second, in all |
|---|---|--:|--:|--:|--:|
{chr(10).join(rows)}

Limits: 128,000 bytes and 30,000,000 MACs for each model. The script adds up parameters; here every tensor that is
stored, int8 weights, scales and zero points among them, is one. It lets torchinfo 1.8.0 count multiplications, which
takes a linear layer to run once, whatever the length of its sequence; here linear layers stand as the 1x1 convolutions
that they are, so they are counted at their full length. torchinfo does not see what has no module of its own: the
selective scan. *In all* has it, at 4 multiplications a channel and state and 3 a channel for each token and
direction, and leaves out what torchinfo adds for biases and norms.

Models for devices that are not listed, and for unknown names, are the general one.

`{label}/aum_compress/` holds those source files of aum-compress (MIT licence, see there) that inference needs.
"""
