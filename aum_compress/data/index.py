"""From the recipe's `data` section to an index of clips, whatever the kind of data. Torch-free."""

import hashlib
import inspect
import json
import shutil
from pathlib import Path

from filelock import FileLock

from aum_compress.data import synth, synth_devices, synth_scenes
from aum_compress.data.clips import DataIndex
from aum_compress.data.config import DataConfig, FolderData, SynthData, TauData, cache_root
from aum_compress.data.examine import Progress
from aum_compress.data.folders import load_folders
from aum_compress.data.tau import load_tau
from aum_compress.errors import DataError

_SETTINGS_FILE = "soundscapes.json"


def load_index(config: DataConfig, seed: int, progress: Progress | None = None) -> DataIndex:
    """The data set that a recipe names, cut into parts; the same for the same config, seed and files.

    `progress` is called while soundscapes are generated; nothing else here takes long. Raises DataError.
    """
    if isinstance(config, SynthData):
        root = _soundscapes(config, progress)
        shared = config.model_dump(include={"clip_seconds", "validation_fraction", "on_bad_files"})
        config = TauData(kind="tau", root=root, train_split="100", **shared)
    loaders = {TauData: load_tau, FolderData: load_folders}
    return loaders[type(config)](config, seed)


def _soundscapes(config: SynthData, progress: Progress | None) -> Path:
    """The folder with these soundscapes, generated if it is not there yet: beside its place, then renamed into it."""
    numbers = config.model_dump(include={"seed", "train_clips_per_class", "test_clips_per_class", "clip_seconds"})
    source = "".join(inspect.getsource(module) for module in (synth, synth_devices, synth_scenes))
    settings = numbers | {"made_by": hashlib.sha256(source.encode()).hexdigest()}
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    root = config.root.expanduser() if config.root is not None else cache_root() / "soundscapes" / name
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root.with_name(f"{root.name}.lock")):
            if root.is_dir() and any(root.iterdir()):
                _require_settings(root, settings)
                return root
            partial = root.with_name(f"{root.name}.partial")
            # under the lock, a partial tree is what a killed process left behind
            shutil.rmtree(partial, ignore_errors=True)
            try:
                synth.write_soundscapes(partial, **numbers, progress=progress)
                (partial / _SETTINGS_FILE).write_text(json.dumps(settings), encoding="utf-8")
                if root.is_dir():
                    root.rmdir()
                partial.rename(root)
            except BaseException:  # Ctrl-C too
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise DataError(
            f"{root}: soundscapes cannot be written there: {error.strerror or error}. Make room, or name another "
            f"folder with data.root or the environment variable AUM_CACHE"
        ) from error
    return root


def _require_settings(root: Path, settings: dict) -> None:
    try:
        found = json.loads((root / _SETTINGS_FILE).read_bytes())
    except (OSError, ValueError):
        found = "other files"
    if found != settings:
        raise DataError(
            f"{root}: wanted soundscapes of {settings}, found {found}. Remove it, or name another with data.root"
        )
