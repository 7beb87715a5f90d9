"""Views: renderings of training clips, drawn once and kept as features, so that a training step computes none.

View 0 is the clip itself. Each other one begins a little earlier or later in its recording, is played faster or slower,
rolled in time and, with some probability, heard through a device's impulse response; all of it is drawn by (seed, clip
id, view) and by nothing else. So a teacher can hear the
very view that the student hears, with a front-end of its own: "consistent teaching" (Beyer et al. 2022; CED, Dinkel et
al. 2023).

    <cache_dir>/<key>/clips.npy     (n,F,T) float16: one view of all clips, in their order
    <cache_dir>/<key>/index.json    SHA-256 of clips.npy

Half the bytes of float32, and an error of at most 0.004 in features whose deviation is about 3
(`benchmarks/views.py`). A view is an entry of its own, so more can be added later.
"""

import hashlib
import inspect
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock

from aum_compress.audio import augment, frontend, kaldi, mel, reading, resample
from aum_compress.audio.augment import DeviceResponses
from aum_compress.data import recordings
from aum_compress.data.cache import CachedClips, cannot_write, read_entry, seal_entry
from aum_compress.data.clips import Clip
from aum_compress.data.config import cache_root
from aum_compress.data.examine import Progress
from aum_compress.data.recordings import Recordings
from aum_compress.errors import DataError

CLEAN = "clean"
"""Name of view 0."""
BATCH = 64
_SPEED_STEPS = 100
"""Speeds are hundredths: a ratio of small whole numbers, of which the resampler has few filters to make."""


class Draw(NamedTuple):
    """How one view of one clip is made, in this order."""

    shift_seconds: float
    """Later begin of the window, before it is held to what there is of the recording."""
    speed: float
    """Seconds of the recording in a second of the view."""
    roll_seconds: float
    response: int | None
    """Number of the impulse response, if any."""


@dataclass(frozen=True)
class Rendering:
    """How the views of a clip are made."""

    count: int
    """K, the clip itself included."""
    seed: int
    time_roll_seconds: float
    window_shift_seconds: float = 0.0
    speed_factor: float = 1.0
    device_response_p: float = 0.0
    device_response_folder: Path | None = None
    device_response_exclude: tuple[str, ...] = ()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of each view: `clean`, and digests of all that decides the others but clip and front-end.

        Raises DataError when the impulse responses cannot be read.
        """
        responses = None
        if self.device_response_p:
            responses = augment.responses_sha256(self.device_response_folder, self.device_response_exclude)
        sound = [self.time_roll_seconds, self.window_shift_seconds, self.speed_factor]
        described = [self.seed, *sound, self.device_response_p, responses]
        digests = (hashlib.sha256(json.dumps([*described, view]).encode()) for view in range(1, self.count))
        return (CLEAN, *(digest.hexdigest()[:32] for digest in digests))

    def draw(self, clip_id: str, view: int, n_responses: int) -> Draw:
        """What view `view` of a clip is: shift and roll uniform, speed uniform in its logarithm."""
        digest = hashlib.sha256(json.dumps([self.seed, clip_id, view]).encode()).digest()
        chance = np.random.default_rng(int.from_bytes(digest[:16], "little"))
        roll_seconds = chance.uniform(-self.time_roll_seconds, self.time_roll_seconds)
        heard, which = chance.random() < self.device_response_p, int(chance.integers(max(n_responses, 1)))
        shift_seconds = chance.uniform(-self.window_shift_seconds, self.window_shift_seconds)
        speed = round(_SPEED_STEPS * self.speed_factor ** chance.uniform(-1, 1)) / _SPEED_STEPS
        return Draw(shift_seconds, speed, roll_seconds, which if heard else None)


@dataclass(frozen=True, eq=False)
class ViewedClips:
    """n clips in K views: `viewed[i:j]` and `viewed[positions]` are copies, view v of clip k stands at `v * n + k`."""

    clean: CachedClips
    names: tuple[str, ...]
    """(K,) as in `Rendering`."""
    files: tuple[Path, ...]
    """(K-1,) of all views but the first."""
    what = "logmel"

    @property
    def clips(self) -> tuple[Clip, ...]:
        return self.clean.clips

    @property
    def checksums(self) -> tuple[str, ...]:
        return self.clean.checksums

    def __len__(self) -> int:
        return len(self.names) * len(self.clean)

    def __getitem__(self, indices: slice | Sequence[int] | np.ndarray) -> np.ndarray:
        """(B,F,T) features, not normalised, float32."""
        if isinstance(indices, slice):
            indices = np.arange(*indices.indices(len(self)))
        views, clips = np.divmod(np.asarray(indices, dtype=np.int64), len(self.clean))
        out: np.ndarray | None = None
        for view in np.unique(views):
            chosen = views == view
            # opened at each use, as in data/cache.py
            found = np.load(self.files[view - 1], mmap_mode="r")[clips[chosen]] if view else self.clean[clips[chosen]]
            if out is None:
                out = np.empty((len(views), *found.shape[1:]), dtype=np.float32)
            out[chosen] = found
        return self.clean[clips] if out is None else out


def render_views(
    rendering: Rendering,
    clean: CachedClips,
    waveforms: Callable[[], CachedClips],
    *,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> ViewedClips:
    """The views of `clean`'s clips, read from the cache or computed once.

    Args:
        waveforms: gives the same clips at the front-end's sample rate; called only where a view has to be computed.

    Raises:
        DataError: impulse responses that cannot be used, or a cache that has no room or cannot be written.
    """
    folder = cache_dir if cache_dir is not None else cache_root() / "views"
    entries = [folder / _key(name, clean) for name in rendering.names[1:]]
    one_view = 2 * len(clean) * clean[:1].size
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{_key('lock', clean)}.lock"):
            missing = [view for view, entry in enumerate(entries, start=1) if read_entry(entry) is None]
            if (free := shutil.disk_usage(folder).free) < (wanted := len(missing) * one_view):
                raise DataError(
                    f"{folder}: {len(missing)} views of {len(clean):,} clips need {wanted:,} bytes, {free:,} are free. "
                    "Make room, lower train.views, or name another folder with the environment variable AUM_CACHE"
                )
            if missing:
                _render(rendering, clean, waveforms(), {view: entries[view - 1] for view in missing}, progress)
    except OSError as error:
        raise cannot_write(folder, error, len(entries) * one_view) from error
    return ViewedClips(clean, rendering.names, tuple(entry / "clips.npy" for entry in entries))


def _render(
    rendering: Rendering,
    clean: CachedClips,
    waveforms: CachedClips,
    entries: dict[int, Path],
    progress: Progress | None,
) -> None:
    """Args: entries: by view, those to compute."""
    front_end, rate = frontend.front_end_module(clean.front_end), clean.front_end.sample_rate_hz
    responses = None
    if rendering.device_response_p:
        responses = DeviceResponses(rendering.device_response_folder, rate, rendering.device_response_exclude)
    sound = Recordings(waveforms.only(clean.clips), rate)
    starts = range(0, len(clean), BATCH)
    done = 0
    for view, entry in entries.items():
        partial = entry.with_name(f"{entry.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # under the lock: what a killed process left behind
        partial.mkdir()
        try:
            with (partial / "clips.npy").open("wb") as file:
                header = {"descr": "<f2", "fortran_order": False, "shape": (len(clean), *clean[:1].shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
                for start in starts:
                    clips = clean.clips[start : start + BATCH]
                    heard = _heard(rendering, view, clips, sound, responses)
                    with torch.inference_mode():
                        features = front_end(heard)[:, 0]
                    file.write(np.ascontiguousarray(features.numpy(), dtype="<f2"))
                    done += len(clips)
                    if progress:
                        progress(done, len(entries) * len(clean))
            seal_entry(partial, entry, {"view": rendering.names[view]})
        except BaseException:  # Ctrl-C too
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _heard(
    rendering: Rendering,
    view: int,
    clips: Sequence[Clip],
    sound: Recordings,
    responses: DeviceResponses | None,
) -> torch.Tensor:
    """One view of clips (B,S), rolled before they are convolved, as in a training step without views."""
    n_responses = 0 if responses is None else len(responses.responses)
    drawn = [rendering.draw(clip.clip_id, view, n_responses) for clip in clips]
    windows = [sound.window(clip, draw.shift_seconds, draw.speed) for clip, draw in zip(clips, drawn, strict=True)]
    rolled = [np.roll(x, round(draw.roll_seconds * sound.rate_hz)) for x, draw in zip(windows, drawn, strict=True)]
    out = torch.from_numpy(np.stack(rolled))
    chosen = [row for row, draw in enumerate(drawn) if draw.response is not None]
    if chosen:
        with torch.inference_mode():
            out[chosen] = responses.heard_through(torch.tensor([drawn[row].response for row in chosen]), out[chosen])
    return out


def _key(name: str, clean: CachedClips) -> str:
    """Of a view of these clips: all that decides its content. Front-end and length of a clip are in the key of the
    clips' own features."""
    modules = (augment, frontend, kaldi, mel, reading, recordings, resample, sys.modules[__name__])
    source = "".join(inspect.getsource(module) for module in modules)
    clips = list(zip((clip.clip_id for clip in clean.clips), clean.checksums, strict=True))
    described = [hashlib.sha256(source.encode()).hexdigest(), name, clean.path.parent.name, clips]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:32]
