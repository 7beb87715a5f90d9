"""The house rules of the design: who may import whom, what stays free of torch, what never appears."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from exported import written

import aum_compress

PACKAGE = Path(aum_compress.__file__).parent
ORDER: tuple[set[str], ...] = (
    {"errors"},
    {"audio", "kernels", "device_names", "processor", "array_files"},
    {"models"},
    {"data"},
    {"recipe_checks", "recipe_train"},
    {"bundle", "recipe_schema", "console"},  # top-level files that what follows builds on
    {"budget", "packs"},
    {"train", "compress", "export"},
    {"report"},
    {"recipe"},
    {"workspace"},
    {"same_data"},
    {"teaching", "quantising"},
    {"stages", "publish", "evaluate", "benching", "comparing"},
    {"pruning", "exporting"},
    {"prune_sensitivity"},
    {"submission", "devices"},
    {"pipeline", "verifying"},
    {"sweep", "doctor"},
    {"cli_options"},
    {"cli_stages"},
    {
        *("cli_bench", "cli_budget", "cli_data", "cli_doctor", "cli_evaluate", "cli_export", "cli_predict"),
        *("cli_package", "cli_prune", "cli_quantize", "cli_report", "cli_sweep"),
    },
    {"cli"},
)
"""Packages and top-level modules: each imports only from sets that stand before its own, so there is no cycle."""
HEAVY = {"torch", "torchaudio", "lightning", "torch_pruning", "fvcore"}
MOST_LINES = 400


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imports(name: str) -> set[str]:
    """All that a module imports, at its top or inside functions: our own modules in full, others by package."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}, line {node.lineno}: relative import"
            wholes = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (wholes & MODULES.keys()) or {node.module}
    return {module if module in MODULES else module.partition(".")[0] for module in found}


def unit(name: str) -> str:
    """The package, or the top-level module, that a module belongs to; "" for aum_compress itself."""
    return name.split(".")[1] if "." in name else ""


def test_arrows_point_one_way():
    place = {member: position for position, group in enumerate(ORDER) for member in group}
    against = []
    for name in MODULES:
        others = {module for module in imports(name) & MODULES.keys() if unit(module) not in ("", unit(name))}
        against += [
            f"{name} -> {other}" for other in others if not unit(name) or place[unit(other)] >= place[unit(name)]
        ]
    assert against == []


def test_order_names_what_exists():
    assert set.union(*ORDER) == {unit(name) for name in MODULES if unit(name)}


def test_modules_do_not_import_in_a_circle():
    graph = {name: (imports(name) & MODULES.keys()) - {name} for name in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_package_files_import_nothing():
    importing = {name: imports(name) for name, path in MODULES.items() if path.name == "__init__.py"}
    assert {name for name, found in importing.items() if found} == set()


def test_runtime_and_all_it_imports_never_name_torch():
    seen, waiting = set(), {"aum_compress.export.runtime", "aum_compress.export.stream"}
    while waiting:
        name = waiting.pop()
        seen.add(name)
        assert not imports(name) & HEAVY, name
        waiting |= (imports(name) & MODULES.keys()) - seen
    assert {"aum_compress.audio.mel", "aum_compress.audio.reading", "aum_compress.export.metadata"} <= seen


def test_files_are_readable_in_one_sitting():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}
    assert {path.stem for path in MODULES.values()} & {"utils", "util", "helpers", "common", "misc"} == set()


def test_nothing_is_unpickled_evaluated_or_imported_by_a_variable():
    found = []
    for name, tree in TREES.items():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            text = ast.unparse(call.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if (
                text.startswith("pickle.")
                or text in {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "__import__"}
                or (text.endswith("import_module") and not isinstance(call.args[0], ast.Constant))
                or (text in {"torch.load", "trainer.fit"} and keywords.get("weights_only") != "True")
                or keywords.get("allow_pickle", "False") != "False"
            ):
                found.append(f"{name}, line {call.lineno}: {ast.unparse(call)}")
        found += [f"{name}: {module}" for module in imports(name) & {"dill", "cloudpickle", "joblib", "shelve"}]
        from_pickle = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "pickle"]
        found += [f"{name}, line {node.lineno}: {ast.unparse(node)}" for node in from_pickle]
    assert found == []


def test_no_place_of_one_machine_is_written_down():
    found = []
    for name, tree in TREES.items():
        texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        found += [(name, text) for text in texts if any(p in text for p in ("/tmp/", "/work/", "/home/", "/root/"))]
    assert found == []


def run_python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


WITHOUT_TORCH = f"""
import sys
for name in {sorted(HEAVY)!r}:
    sys.modules[name] = None
from aum_compress.cli import main
main()
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Path by name: an exported file and a recording."""
    folder = tmp_path_factory.mktemp("inputs")
    samples = np.random.default_rng(0).uniform(-0.1, 0.1, 8000)
    soundfile.write(folder / "second.wav", samples, 8000)
    return {"MODEL": written(folder, "int8"), "WAV": folder / "second.wav", "ROOT": folder / "none"}


@pytest.mark.parametrize(
    ("command", "code", "answer"),
    [
        ("--help", 0, "run a compression recipe"),
        ("run --help", 0, "--until"),
        ("budget MODEL", 0, "param bytes: "),
        ("budget plan --tokens 64", 0, "configurations fit"),
        ("predict MODEL WAV", 0, "vote"),
        ("bench MODEL --rounds 3", 0, "1 thread: "),
        ("recipes check quickstart", 0, "max_param_bytes: 128000"),
        ("data check ROOT", 2, "no such folder"),
        ("doctor --no-time", 2, "scan: could not be looked at"),
    ],
)
def test_answers_where_torch_cannot_be_imported(inputs, command, code, answer):
    done = run_python(WITHOUT_TORCH, *(inputs.get(word, word) for word in command.split()))
    assert done.returncode == code, done.stderr
    assert answer in done.stdout + done.stderr


@pytest.mark.parametrize("code", ["import aum_compress", "from aum_compress.cli import main; main()"])
def test_start_imports_nothing_heavy(code):
    """`import aum_compress` and `aum-compress --help`."""
    heavy = sorted(HEAVY | {"numpy", "onnx", "onnxruntime", "scipy"})
    code = f"import atexit, sys\natexit.register(lambda: print([n for n in {heavy!r} if n in sys.modules]))\n{code}"
    done = run_python(code, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
