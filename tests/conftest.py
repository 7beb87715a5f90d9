import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_audio() -> Path:
    """The folder of real recordings: AUM_AUDIO, or shared/audio beside the checkout. Tests are skipped without it."""
    folder = Path(os.environ.get("AUM_AUDIO") or Path(__file__).parents[2] / "shared" / "audio")
    if not folder.is_dir():
        pytest.skip(f"AUM_AUDIO: no folder of real recordings at {folder}")
    return folder
