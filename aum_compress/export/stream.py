"""Classify sound while it is heard, with an exported file: numpy and onnxruntime, never torch."""

import numpy as np

from aum_compress.errors import DataError
from aum_compress.export.runtime import SHORTEST_REST, Classifier, Prediction, check_hop, mono_samples


class Stream:
    """A recording that goes on: chunks of samples come in, of any size; each hop a prediction goes out.

        stream = Stream(Classifier("model-int8.onnx"), sample_rate_hz=48_000, hop_seconds=0.5)
        for chunk in microphone:
            for heard in stream.feed(chunk):
                print(heard.starts_seconds[0], heard.label)

    Each window of `clip_seconds` is heard as `Classifier.classify_file` would hear it in a file. The first prediction
    comes when the first window is full. No more than a window and a hop of samples are kept.

    Raises DataError when made with a rate that is not a positive whole number, or a hop that is not above zero.
    """

    def __init__(self, classifier: Classifier, sample_rate_hz: int, *, hop_seconds: float | None = None) -> None:
        """Args: hop_seconds: from the beginning of one window to the next; a window's length when left out."""
        if isinstance(sample_rate_hz, bool) or sample_rate_hz != int(sample_rate_hz) or sample_rate_hz <= 0:
            raise DataError(f"a sample rate of {sample_rate_hz} Hz: wanted a whole number above zero")
        self.classifier, self.sample_rate_hz = classifier, int(sample_rate_hz)
        window_seconds = classifier.metadata.clip_seconds
        self.hop_seconds = check_hop(hop_seconds, window_seconds)
        self._window = round(window_seconds * self.sample_rate_hz)
        self._held = np.zeros(0, dtype=np.float32)
        self._first = 0
        """Place of the first held sample in the stream."""
        self._heard = 0
        """Windows so far."""
        self._finished = False

    @property
    def seconds(self) -> float:
        """Length of all that has come in."""
        return (self._first + len(self._held)) / self.sample_rate_hz

    def feed(self, samples: np.ndarray) -> list[Prediction]:
        """Takes the next samples; returns a prediction of one window for each window that they complete, mostly none.

        Args:
            samples: (n,) or (n,channels), float, full scale = 1; n may be 0, and differ from chunk to chunk.

        Raises:
            DataError: samples of another shape or type, NaN or infinity among them, or a stream that is finished. What
                came in before is kept.
        """
        if self._finished:
            raise DataError("the stream is finished: make another one for what comes next")
        self._held = np.concatenate([self._held, mono_samples(samples)])
        found = []
        while (start := self._start(self._heard)) + self._window <= self._first + len(self._held):
            found.append(self._classify(start))
            self._heard += 1
        # the last window of all may begin before the next one in turn
        kept_from = max(self._first, min(start, self._first + len(self._held) - self._window))
        self._held, self._first = self._held[kept_from - self._first :], kept_from
        return found

    def finish(self) -> list[Prediction]:
        """What is left at the end: a stream shorter than a window, padded with silence; or one more window that ends
        with the stream, unless less than a tenth of a window is new in it. Nothing comes in afterwards."""
        self._finished = True
        end = self._first + len(self._held)
        if not self._heard:
            return [self._classify(0)] if len(self._held) else []
        unheard = end - (self._start(self._heard - 1) + self._window)
        return [self._classify(end - self._window)] if unheard >= SHORTEST_REST * self._window else []

    def _start(self, number: int) -> int:
        return round(number * self.hop_seconds * self.sample_rate_hz)

    def _classify(self, start: int) -> Prediction:
        clip = self._held[start - self._first : start - self._first + self._window]
        return self.classifier.classify_window(clip, self.sample_rate_hz, start / self.sample_rate_hz)
