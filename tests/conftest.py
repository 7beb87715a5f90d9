import os
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_audio() -> Path:
    """The folder of real recordings: AUM_AUDIO, or shared/audio beside the checkout. Tests are skipped without it."""
    folder = Path(os.environ.get("AUM_AUDIO") or Path(__file__).parents[2] / "shared" / "audio")
    if not folder.is_dir():
        pytest.skip(f"AUM_AUDIO: no folder of real recordings at {folder}")
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A small recipe that has been run to its end, once for all tests."""
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
