import copy
import functools
import os
import shutil
import sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: one thread for each of the processes
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

SLOWEST = (
    "test_pipeline.py",
    "test_budget_witnesses.py",
    "test_docs.py",
    "test_devices.py",
    "test_cli_files.py",
    "test_submission.py",
    "test_plan.py",
    "test_distributed.py",
    "test_interrupted.py",
    "test_budget_onnx.py",
)
"""Files that take the longest, first: one of them that starts last is waited for by processes without work. The second
one does not need the run that `finished` makes, which the first one is making then."""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """No worker where a single file is asked for: it runs in one of them, and each takes its seconds to start."""
    files = {argument.partition("::")[0] for argument in config.args}
    return 0 if len(files) == 1 and files.pop().endswith(".py") else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session", autouse=True)
def _translations_parsed_once():
    """torch's exporter parses the sources of its 500 translations of operators anew for each file: a third of the time
    of a small export, of which there are many here."""
    if "aum_compress.export.onnx_writer" not in sys.modules:
        return
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    parsed = functools.cache(ONNXRegistry.from_torchlib)

    @staticmethod
    def copied(*args, **kwargs) -> ONNXRegistry:
        registry = copy.copy(parsed(*args, **kwargs))
        registry.functions = {name: [*found] for name, found in registry.functions.items()}  # an export adds its own
        return registry

    ONNXRegistry.from_torchlib = copied


@pytest.fixture(scope="session")
def real_audio() -> Path:
    """The folder of real recordings: AUM_AUDIO, or shared/audio beside the checkout. Tests are skipped without it."""
    folder = Path(os.environ.get("AUM_AUDIO") or Path(__file__).parents[2] / "shared" / "audio")
    if not folder.is_dir():
        pytest.skip(f"AUM_AUDIO: no folder of real recordings at {folder}")
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A small recipe that has been run to its end, once for all tests of all processes."""
    from tiny_recipe import finished_run

    return finished_run(tmp_path_factory.getbasetemp())


@pytest.fixture
def cache_of_finished(finished, monkeypatch) -> None:
    """The features of that run, for runs that follow."""
    monkeypatch.setenv("AUM_CACHE", str(finished.cache))


@pytest.fixture(scope="session")
def exports(finished) -> Path:
    return finished.out / "exports" / "tiny"


@pytest.fixture(scope="session")
def runs(finished) -> Path:
    return finished.out / "runs" / "tiny"


@pytest.fixture
def recipe(finished, tmp_path) -> Path:
    """The file of the recipe of `finished`."""
    from tiny_recipe import write_recipe

    return write_recipe(tmp_path, finished.tree)


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """What `finished` has made, to be altered."""
    return Path(shutil.copytree(finished.out, tmp_path / "copy"))
