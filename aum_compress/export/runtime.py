"""Classify audio with an exported file: numpy and onnxruntime, soundfile to read files. Never torch."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime import InferenceSession
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from aum_compress.audio.front_ends import features
from aum_compress.errors import DataError, ModelFileError
from aum_compress.export.metadata import FEATURES, OnnxMetadata

SHORTEST_REST = 0.1
"""Share of a window below which the end of a recording is left out."""
MOST_CHANNELS = 64
"""Of a recording; an array of more has its axes in the other order."""
_ORT_ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    ValueError,  # names and metadata that are no text, types of tensors that there are not
)


class FileSession(InferenceSession):
    """A session that names its file where a run fails: damage in a graph's shapes shows itself no earlier."""

    def __init__(self, path: Path, content: bytes | None, options: onnxruntime.SessionOptions) -> None:
        super().__init__(content or os.fspath(path), options, providers=["CPUExecutionProvider"], enable_fallback=0)
        self._path = path
        # onnxruntime decodes texts when they are asked for: what is none is found here, not somewhere later
        _ = self.get_modelmeta().custom_metadata_map
        _ = [(value.name, value.shape) for value in (*self.get_inputs(), *self.get_outputs())]

    def run(self, output_names: Any, input_feed: Any, run_options: Any = None) -> list[Any]:
        """As `InferenceSession.run`.

        Raises:
            ModelFileError: onnxruntime stopped at one of the graph's nodes, or the inputs are not the graph's.
        """
        try:
            return super().run(output_names, input_feed, run_options)
        except _ORT_ERRORS as error:
            raise ModelFileError(
                f"{self._path}: onnxruntime {onnxruntime.__version__} cannot run it: {_one_line(error)}. The graph "
                "was altered after its export, or was fed what it does not read: export or copy it again"
            ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def open_session(
    path: Path,
    *,
    optimise: bool = True,
    intra_op_num_threads: int = 0,
    content: bytes | None = None,
    profile: Path | None = None,
) -> FileSession:
    """An onnxruntime session on the CPU.

    Args:
        content: a part of the file to open in place of the whole.
        optimise: let onnxruntime rewrite the graph. Off, it computes node by node what the file says.
        intra_op_num_threads: 0 leaves the choice to onnxruntime.
        profile: how the name of a file begins to which `end_profiling` writes the time of every node.

    Raises:
        ModelFileError: no such file, or one that onnxruntime does not take for a model.
    """
    if not path.is_file():
        found = "it is a folder" if path.is_dir() else "there is no such file"
        raise ModelFileError(f"{path}: an ONNX file was wanted, {found}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = intra_op_num_threads
    options.log_severity_level = 4  # what goes wrong is raised below; printed besides it would stand there twice
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, os.fspath(profile)
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    try:
        return FileSession(path, content, options)
    except _ORT_ERRORS as error:
        raise ModelFileError(
            f"{path}: onnxruntime {onnxruntime.__version__} cannot load it ({path.stat().st_size} bytes): "
            f"{_one_line(error)}. Not an ONNX file, cut short, or made for a newer onnxruntime: export or copy it again"
        ) from None


def read_metadata(session: InferenceSession, path: Path) -> OnnxMetadata:
    """What the file that `session` was opened on says about itself; `path` is for messages.

    Raises:
        ModelFileError: a file that aum-compress did not export, or whose metadata cannot be read.
    """
    return OnnxMetadata.from_props(session.get_modelmeta().custom_metadata_map, str(path))


def clip_features(clip: np.ndarray, metadata: OnnxMetadata) -> np.ndarray:
    """Samples (S,) at the model's rate to its normalised features (1,1,F,T), float32.

    A clip of another length than `metadata.clip_samples` is cut, or padded with silence, at its end.
    """
    samples = _fitted(clip, metadata.clip_samples)
    return ((features(samples, metadata.front_end) - metadata.mean) / metadata.std).astype(np.float32)[None, None]


def clip_input(clip: np.ndarray, metadata: OnnxMetadata) -> np.ndarray:
    """Samples (S,) at `metadata.waveform_rate_hz` to what the file reads of one clip, float32: features (1,1,F,T), or
    the waveform (1,S), cut or padded with silence at its end."""
    if metadata.reads == FEATURES:
        return clip_features(clip, metadata)
    return _fitted(clip, metadata.waveform_samples)[None]


def _fitted(clip: np.ndarray, n_samples: int) -> np.ndarray:
    fitted = np.zeros(n_samples, dtype=np.float32)
    kept = clip[:n_samples]
    fitted[: len(kept)] = kept
    return fitted


def run_session(session: InferenceSession, inputs: np.ndarray) -> np.ndarray:
    """Inputs (B,...) to outputs (B,...), one by one where the file's batch axis is fixed at 1."""
    (values,) = session.get_inputs()
    batches = np.split(inputs, len(inputs)) if isinstance(values.shape[0], int) else [inputs]
    return np.concatenate([session.run(None, {values.name: batch})[0] for batch in batches])


@dataclass(frozen=True)
class Prediction:
    """What a model says about a recording of W windows."""

    labels: tuple[str, ...]
    starts_seconds: tuple[float, ...]
    """Where each window begins (W of them)."""
    log_probabilities: np.ndarray
    """(W,C) float32, natural logarithm."""

    @cached_property
    def probabilities(self) -> np.ndarray:
        """(W,C): by window."""
        return np.exp(self.log_probabilities)

    @cached_property
    def vote(self) -> np.ndarray:
        """(C,): of the whole recording, from the mean of the windows' log-probabilities.

        That is the geometric mean, renormalised: the rule for independent looks at one scene, under which a window that
        excludes a class weighs more than one that is undecided.
        """
        return np.exp(_log_softmax(self.log_probabilities.mean(0)))

    @property
    def label(self) -> str:
        """Class of the highest vote."""
        return self.labels[int(self.vote.argmax())]

    def lines(self, name: str) -> list[str]:
        """For people: a line for each window, and the vote where there is more than one."""
        rows = [
            (f"{start:8.2f} s", self.labels[int(row.argmax())], float(row.max()))
            for start, row in zip(self.starts_seconds, self.probabilities, strict=True)
        ]
        if len(rows) > 1:
            rows.append(("      vote", self.label, float(self.vote.max())))
        return [name, *(f"{place}  {label:<20} {share:6.1%}" for place, label, share in rows)]

    def to_dict(self) -> dict[str, Any]:
        """JSON values: each window and the vote, probabilities by label."""

        def by_label(row: np.ndarray) -> dict[str, float]:
            return {label: float(value) for label, value in zip(self.labels, row, strict=True)}

        windows = [
            {"start_seconds": start, "label": self.labels[int(row.argmax())], "probabilities": by_label(row)}
            for start, row in zip(self.starts_seconds, self.probabilities, strict=True)
        ]
        return {"label": self.label, "vote": by_label(self.vote), "windows": windows}


class Classifier:
    """An exported model, its front-end and its labels.

    A recording is cut into windows of `clip_seconds`, one after the other. One that is shorter than a window is padded
    with silence at its end, as in training. Where windows leave a rest, the last one is moved back to end with the
    recording, so that it hears no padding; a rest below a tenth of a window is left out.

    Raises ModelFileError when the file is no model, or not one that aum-compress exported.
    """

    def __init__(self, path: Path | str, *, intra_op_num_threads: int = 0) -> None:
        self.path = Path(path)
        self._session = open_session(self.path, intra_op_num_threads=intra_op_num_threads)
        self.metadata = read_metadata(self._session, self.path)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        shapes = [value.shape for value in (*inputs, *outputs)]
        if len(shapes) != 2 or shapes[0][1:] != [*self.metadata.input_shape] or shapes[1][1:] != [len(self.labels)]:
            raise ModelFileError(
                f"{self.path}: inputs and outputs of shapes {shapes} do not fit its metadata, which say "
                f"{self.metadata.reads} {self.metadata.input_shape} and {len(self.labels)} labels: the file was "
                "altered, export it again"
            )

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in the order of the outputs."""
        return self.metadata.labels

    def classify_file(self, path: Path | str, *, hop_seconds: float | None = None) -> Prediction:
        """Any file that libsndfile reads, at any rate and channel count. One window is in memory at a time.

        Args:
            hop_seconds: from the beginning of one window to the next; a window's length when left out.

        Raises:
            DataError: a file that cannot be read, named.
        """
        from aum_compress.audio.reading import audio_info, read_audio

        rate, window = self.metadata.waveform_rate_hz, self.metadata.clip_seconds
        starts = window_starts(audio_info(path).seconds, window, hop_seconds)
        clips = (read_audio(path, rate, start_seconds=start, duration_seconds=window) for start in starts)
        return self._predict(starts, clips)

    def classify_samples(
        self, samples: np.ndarray, sample_rate_hz: int, *, hop_seconds: float | None = None
    ) -> Prediction:
        """A recording in memory.

        Args:
            samples: (S,), or (S,channels) whose mean is taken; float, full scale = 1.
            hop_seconds: as in `classify_file`.

        Raises:
            DataError: another shape or type, no samples, more channels than samples, NaN or infinity among them.
        """
        from aum_compress.audio.resample import resample

        mono = mono_samples(samples)
        if not mono.size:
            raise DataError("no samples: wanted at least one; record again")
        if np.ndim(samples) == 2 and np.shape(samples)[1] > len(mono):
            raise _channels_first(np.shape(samples))
        rate = self.metadata.waveform_rate_hz
        mono = resample(mono, sample_rate_hz, rate)
        starts = window_starts(len(mono) / rate, self.metadata.clip_seconds, hop_seconds)
        firsts = [round(start * rate) for start in starts]
        clips = (mono[first : first + self.metadata.waveform_samples] for first in firsts)
        return self._predict(starts, clips)

    def classify_window(self, mono: np.ndarray, sample_rate_hz: int, start_seconds: float) -> Prediction:
        """One window (S,) of a recording that begins `start_seconds` after it."""
        from aum_compress.audio.resample import resample

        return self._predict([start_seconds], [resample(mono, sample_rate_hz, self.metadata.waveform_rate_hz)])

    def logits(self, inputs: np.ndarray) -> np.ndarray:
        """What the file reads, features (B,1,F,T) or waveforms (B,S), to logits (B,C), float32.

        Raises:
            DataError: inputs of another shape or type.
        """
        wanted = self.metadata.input_shape
        if inputs.shape[1:] != wanted or inputs.dtype != np.float32 or not len(inputs):
            raise DataError(
                f"{self.path}: inputs of shape {inputs.shape}, type {inputs.dtype}: wanted {self.metadata.reads} of "
                f"shape (batch, {', '.join(map(str, wanted))}), type float32"
            )
        return run_session(self._session, inputs)

    def _predict(self, starts: list[float], clips: Iterable[np.ndarray]) -> Prediction:
        logits = np.concatenate([self.logits(clip_input(clip, self.metadata)) for clip in clips])
        return Prediction(self.labels, tuple(starts), _log_softmax(logits))


def mono_samples(samples: np.ndarray) -> np.ndarray:
    """(S,) float32: the mean of the channels of (S,) or (S,channels).

    Raises:
        DataError: another shape or type, more than 64 channels, NaN or infinity among them.
    """
    samples = np.asarray(samples)
    if samples.ndim not in (1, 2) or 0 in samples.shape[1:] or not np.issubdtype(samples.dtype, np.floating):
        raise DataError(
            f"samples of shape {samples.shape}, type {samples.dtype}: wanted float (S,) or (S,channels) of "
            "full scale 1; divide 16-bit integers by 32768"
        )
    if samples.ndim == 2 and samples.shape[1] > MOST_CHANNELS:  # few samples are a small chunk of a stream
        raise _channels_first(samples.shape)
    if not np.isfinite(samples).all():
        raise DataError(
            f"{int((~np.isfinite(samples)).sum())} of {samples.size} samples are NaN or infinite: all must be finite"
        )
    return (samples if samples.ndim == 1 else samples.mean(1)).astype(np.float32, copy=False)


def _channels_first(shape: tuple[int, ...]) -> DataError:
    return DataError(
        f"samples of shape {shape}: {shape[1]:,} channels of {shape[0]:,} samples; wanted the order (S,channels), at "
        f"most {MOST_CHANNELS} channels and no more than there are samples: pass samples.T where channels come first"
    )


def window_starts(seconds: float, window: float, hop: float | None = None) -> list[float]:
    """Begin of each window of a recording, in seconds.

    Raises:
        DataError: a hop that is not above zero.
    """
    hop = check_hop(hop, window)
    if seconds < window * (1 - 1e-6):
        return [0.0]
    starts = [k * hop for k in range(int((seconds - window) / hop + 1e-6) + 1)]
    if seconds - (starts[-1] + window) >= SHORTEST_REST * window:
        starts.append(seconds - window)
    return starts


def check_hop(hop: float | None, window: float) -> float:
    """`hop`, or `window` where it is None, in seconds. Raises DataError unless it is above zero."""
    if hop is None:
        return window
    if not 0 < hop < np.inf:
        raise DataError(f"a hop of {hop} s between windows: wanted a number of seconds above zero")
    return hop


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
