"""The pages of docs/ taken apart: code, files and commands in their order; commands that no test runs, with the reason.

A command is a line of a block behind `$`, a line of a shell script, or a program with arguments in the text or in
lines that are indented by four.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
PAGES = tuple(sorted(path.stem for path in DOCS.glob("*.md")))

PROMPT = "console"
"""Language of a block whose first line is a command behind `$`; the page itself gives it none."""
_SHELL = ("bash", "sh", "shell", "console")
_PROGRAM = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:srun )?"
    r"(?:\S*/)?(?:aum-compress|python3?|pip|pytest|torchrun|sbatch|srun|arecord|optuna-dashboard|[\w-]+\.sh)\s"
)
_VERB = r"aum-compress\s+(?P<verb>budget\s+plan|data\s+(?:check|split|synth)|[a-z]+)"
"""Without arguments, the name of a verb rather than a command."""
_PARTS = re.compile(
    r"^```(?P<language>[^\n]*)\n(?P<block>.*?)^```|(?<!`)`(?P<span>[^`]+)`(?!`)|^ {4}(?P<line>[^\n]+)",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Part:
    """One fenced block of a page, or one command in its text."""

    language: str
    """Of a block; empty where it is neither commands nor code. A command in the text is `console`."""
    text: str

    def commands(self) -> list[str]:
        """Its commands, each on one line, without comments."""
        lines = re.sub(r"\s*\\\n\s*", " ", self.text).splitlines()
        if self.language == PROMPT:
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        elif self.language in _SHELL:
            lines = [line for line in lines if _PROGRAM.match(line)]
        else:
            return []
        return [re.sub(r"\s+# .*", "", line).strip() for line in lines]


def parts(page: str) -> Iterator[Part]:
    """What a page has besides its text, from top to bottom."""
    for found in _PARTS.finditer((DOCS / f"{page}.md").read_text(encoding="utf-8")):
        if found["block"] is not None:
            prompted = not found["language"] and found["block"].startswith("$ ")
            yield Part(PROMPT if prompted else found["language"], found["block"])
        elif is_command(text := " ".join((found["span"] or found["line"]).split())):
            yield Part(PROMPT, f"$ {text}")


def is_command(text: str) -> bool:
    """Whether it is a program with arguments; `aum-compress budget` in a sentence is the name of a verb."""
    return bool(_PROGRAM.match(text)) and not re.fullmatch(_VERB, text)


def verbs_named(page: str) -> set[str]:
    """Verbs of `aum-compress` that the text names without arguments."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    return {" ".join(found["verb"].split()) for found in re.finditer(rf"(?<!`)`{_VERB}`", text)}


@dataclass(frozen=True)
class Unrun:
    """A command that no test runs as it stands."""

    why: str
    filled_in: str = ""
    """With values in place of words such as FORM, where it cannot be parsed without."""


_FORM = "says how a command is formed; the words in capitals are the reader's"
_HOURS = "a measurement: it takes minutes to hours, and the page has what came of it"
_INSTALLS = "installs from the network"
_GPUS = "wants several GPUs; tests/test_distributed.py runs two processes on CPUs"

UNRUN: dict[str, dict[str, Unrun]] = {
    "budgets": {
        "python benchmarks/mac_counters.py": Unrun("wants other tools than the tests do: thop, ptflops"),
        "python benchmarks/latency_model.py --seed 1": Unrun(_HOURS),
    },
    "dcase": {
        "aum-compress evaluate exports/esc10-edge --data esc10-mobile": Unrun("wants ESC-50 and impulse responses"),
        "python benchmarks/device_gain.py --config student-edge-distilled": Unrun(_HOURS),
        "aum-compress run RECIPE --until devices": Unrun(_FORM),
    },
    "distillation": {"aum-compress recipes check NAME": Unrun(_FORM)},
    "distributed": {
        "aum-compress run my-recipe.yaml --set teacher.train.devices=4 --set teacher.train.strategy=ddp": Unrun(_GPUS),
        "torchrun --nproc-per-node 4 $(which aum-compress) run my-recipe.yaml --set teacher.train.devices=4": Unrun(
            _GPUS
        ),
        "torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint host0:29500 "
        "$(which aum-compress) run my-recipe.yaml --out /shared/aum "
        "--set teacher.train.devices=4 --set teacher.train.nodes=2": Unrun("wants two machines"),
        "srun .venv/bin/aum-compress run my-recipe.yaml --out /shared/aum "
        "--set teacher.train.devices=4 --set teacher.train.nodes=2": Unrun("wants SLURM"),
        "pytest tests/test_distributed.py": Unrun("is part of these tests"),
    },
    "export": {
        "python benchmarks/front_end.py": Unrun(_HOURS),
        "./build.sh --config MinSizeRel --minimal_build --include_ops_by_config required_operators.config": Unrun(
            "is onnxruntime's own, in its sources"
        ),
    },
    "gpu": {
        "python3 -m venv .venv && .venv/bin/pip install .": Unrun(_INSTALLS),
        ".venv/bin/pip install setuptools wheel packaging ninja": Unrun(_INSTALLS),
        'MAX_JOBS=4 .venv/bin/pip install --no-build-isolation "mamba-ssm>=2.2" "causal-conv1d>=1.5"': Unrun(_INSTALLS),
        '.venv/bin/python -c "import causal_conv1d, mamba_ssm.ops.selective_scan_interface"': Unrun("wants CUDA"),
        '.venv/bin/pip install ".[test]" && .venv/bin/pytest -m gpu': Unrun("wants a GPU"),
        "python benchmarks/training_memory.py": Unrun(_HOURS),
        "python benchmarks/gpu_training.py --memory-gb 16": Unrun("wants a GPU"),
    },
    "latency": {
        "python benchmarks/student_latency.py --rounds 200": Unrun(_HOURS),
        "aum-compress bench student-edge --against cp-mobile": Unrun("the page's first command is another of its kind"),
        "aum-compress bench exports/esc10-edge/model-int8.onnx --against cp-mobile": Unrun(
            "the page's first command is another of its kind"
        ),
        "aum-compress export --scan FORM": Unrun(_FORM, "aum-compress export BUNDLE --to DIR --scan chunked"),
    },
    "on-your-device": {
        "pip install onnxruntime numpy": Unrun(_INSTALLS),
        "aum-compress predict MODEL - --rate 44100 --hop 0.5": Unrun(_FORM),
        "aum-compress bench MODEL": Unrun(_FORM),
    },
    "pruning": {"python benchmarks/prune_bar.py": Unrun(_HOURS)},
    "quantisation": {
        "aum-compress recipes check NAME": Unrun(_FORM),
        "python benchmarks/quantize_choices.py runs/quickstart/05-prune": Unrun(_HOURS),
        "python benchmarks/quantize_agreement.py --data DIR --export BUNDLE": Unrun(_FORM),
    },
    "scan": {
        "python benchmarks/scan.py --seconds 1": Unrun(_HOURS),
        "python benchmarks/train_step.py": Unrun(_HOURS),
    },
    "students": {
        "python benchmarks/esc10_mobile.py --data DIR --responses DIR": Unrun(_HOURS),
        "python benchmarks/student_step.py": Unrun(_HOURS),
    },
    "sweeps": {
        "aum-compress export sweeps/second/trials/<trial>/runs/quickstart/06-quantize --to DIR": Unrun(_FORM),
    },
    "your-own-data": {"aum-compress data synth DIR": Unrun(_FORM)},
}
"""Page -> command -> why no test runs it. Every other one is run, page by page, in tests/test_docs.py."""

SHOWN: dict[str, dict[str, str]] = {
    "on-your-device": {
        "cpp": "compiled and run where AUM_ORT_CPP names a release of onnxruntime",
        **dict.fromkeys(("kotlin", "swift"), "as the page says, nothing here can run it"),
    },
    "sweeps": {"sweeps/first/sweep.json": "a list of files"},
    "your-own-data": {"recordings/": "a folder"},
}
"""Page -> language, or beginning where it has none, of a block that is neither run nor read by a test -> why."""
