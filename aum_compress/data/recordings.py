"""Clips put together again to the recordings that they were cut from: windows that begin and end between clips."""

import numpy as np

from aum_compress.audio.resample import resample
from aum_compress.data.cache import CachedClips
from aum_compress.data.clips import Clip


class Recordings:
    """Sound around the clips of one part of a data set, which alone it is made of."""

    def __init__(self, waveforms: CachedClips, rate_hz: int) -> None:
        self.waveforms, self.rate_hz = waveforms, rate_hz
        self._row = {clip.clip_id: row for row, clip in enumerate(waveforms.clips)}
        self._next = {clip.follows: row for row, clip in enumerate(waveforms.clips) if clip.follows}

    def window(self, clip: Clip, shift_seconds: float, speed: float) -> np.ndarray:
        """(S,) float32, S samples as the clip has.

        Args:
            shift_seconds: how much later than the clip the middle of the window lies, held to what the clip before, the
                clip itself and the one after it have.
            speed: seconds of the recording in a second of the window, the pitch as much higher. A recording that is too
                short for it is reflected at both ends.
        """
        rows = [self._row.get(clip.follows), self._row[clip.clip_id], self._next.get(clip.clip_id)]
        if shift_seconds == 0 and speed == 1:
            return self.waveforms[rows[1:2]][0]
        sound = self.waveforms[[row for row in rows if row is not None]]
        samples = sound.shape[1]
        wanted = round(samples * speed)
        begin = (rows[0] is not None) * samples + round(shift_seconds * self.rate_hz) + (samples - wanted) // 2
        whole = sound.reshape(-1)
        if (short := wanted - len(whole)) > 0:
            whole = np.pad(whole, (short // 2, short - short // 2), mode="reflect")
        begin = min(max(begin, 0), len(whole) - wanted)
        window = whole[begin : begin + wanted]
        if speed == 1:
            return window
        steps = round(speed * 100)
        played = resample(window, steps, 100)
        return np.pad(played, (0, max(0, samples - len(played))))[:samples]
