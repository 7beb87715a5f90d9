"""What an exported file says about itself: everything a runtime needs beside the graph. Torch-free, pydantic-free.

Stored in ONNX `metadata_props`, one JSON value a key, so that any runtime in any language can read it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from aum_compress import __version__
from aum_compress.audio.front_ends import KALDI, LOG_MEL, count_frames, kind_of
from aum_compress.errors import ModelFileError, join_problems

Precision = Literal["fp32", "fp16", "int8", "int4", "mixed"]
"""How values are stored; the last three are quantised, `mixed` layer by layer (`models.storage`)."""
Reads = Literal["features", "waveform"]
"""What a file takes in, which is also the name of its input: normalised features, or samples that its own front-end
turns into them."""
FEATURES, WAVEFORM = "features", "waveform"
FORMAT = "aum-compress/1"
_FORMAT_KEY = "format"
RATE_KEY = "sample_rate_hz"
_LATER_KEYS = ("reads", "input_rate_hz")
"""Absent in files from before there were two kinds of input; their defaults say what those files are."""

_NUMBER = (int, float)
_INPUT_FIELDS: dict[str, tuple[type, ...]] = {
    "front_end": (dict,),
    "clip_seconds": _NUMBER,
    "mean": _NUMBER,
    "std": _NUMBER,
}
_BOTH_FRONT_ENDS: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "sample_rate_hz": (int,),
    "window_samples": (int,),
    "hop_samples": (int,),
    "n_mels": (int,),
    "f_min_hz": _NUMBER,
    "f_max_hz": (*_NUMBER, type(None)),
}
_FRONT_END_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    LOG_MEL: {**_BOTH_FRONT_ENDS, "n_fft": (int,), "log_offset": _NUMBER},
    KALDI: {**_BOTH_FRONT_ENDS, "pre_emphasis": _NUMBER, "fixed_frames": (int, type(None))},
}
_POSITIVE_FIELDS = ("sample_rate_hz", "window_samples", "hop_samples", "n_mels", "n_fft", "log_offset", "fixed_frames")


@dataclass(frozen=True)
class OnnxMetadata:
    """Labels, input and origin of an exported model.

    Raises ModelFileError, with all problems at once, when made from values that no runtime could use.
    """

    labels: tuple[str, ...]
    """Class names in the order of the logits (C of them)."""
    input: Mapping[str, Any]
    """`InputSpec.model_dump()`: features = (front_end(clip) - mean) / std."""
    precision: Precision
    budget: Mapping[str, Any] | None = None
    """The budget's verdict, keys as in DESIGN section 2 (`param_bytes`, `macs`, ...)."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """What was measured, e.g. `{"accuracy": 0.61}`."""
    recipe: str = ""
    recipe_sha256: str = ""
    """Of `recipe.yaml` as it lies beside the model."""
    parent_sha256: str = ""
    """Of the card of the bundle that was exported."""
    tool_version: str = __version__
    reads: Reads = FEATURES
    input_rate_hz: int | None = None
    """Of the samples that a file takes in which reads waveforms, and resamples; None for the front-end's own rate."""

    def __post_init__(self) -> None:
        if problems := self._problems():
            raise ModelFileError(join_problems("metadata that no runtime could use:", problems))

    def _problems(self) -> list[str]:
        problems = []
        labels = self.labels
        if len(labels) < 2 or not all(isinstance(label, str) for label in labels) or len(set(labels)) < len(labels):
            problems.append(f"labels: found {list(labels)}, wanted at least two different class names")
        if self.precision not in get_args(Precision):
            problems.append(f"precision: found {self.precision!r}, wanted {', '.join(get_args(Precision))}")
        if self.reads not in (FEATURES, WAVEFORM):
            problems.append(f"reads: found {self.reads!r}, wanted {FEATURES} or {WAVEFORM}")
        rate = self.input_rate_hz
        if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int) or rate <= 0):
            problems.append(f"input_rate_hz: found {rate!r}, wanted a whole number of hertz above zero")
        elif rate is not None and self.reads == FEATURES:
            problems.append(f"input_rate_hz: found {rate}, but the file reads features")
        problems += _wrong_fields("input", self.input, _INPUT_FIELDS)
        if isinstance(self.input, Mapping) and isinstance(self.input.get("front_end"), Mapping):
            problems += self._front_end_problems()
        if problems:
            return problems
        positive = {"input." + key: self.input[key] for key in ("clip_seconds", "std")}
        stated = {key: self.front_end.get(key) for key in _POSITIVE_FIELDS}
        positive |= {"input.front_end." + key: value for key, value in stated.items() if value is not None}
        problems += [
            f"{key}: found {n}, wanted a number above zero" for key, n in positive.items() if not 0 < n < math.inf
        ]
        if not math.isfinite(self.mean):
            problems.append(f"input.mean: found {self.mean}, wanted a finite number")
        return problems

    def _front_end_problems(self) -> list[str]:
        kind = kind_of(self.front_end)
        if kind not in (LOG_MEL, KALDI):
            return [f"input.front_end.kind: found {kind!r}, wanted {LOG_MEL} or {KALDI}"]
        return _wrong_fields("input.front_end", self.front_end, _FRONT_END_FIELDS[kind])

    @property
    def front_end(self) -> dict[str, Any]:
        """Record of `audio.front_ends`; files from before there were two kinds do not state theirs."""
        return {"kind": LOG_MEL, **self.input["front_end"]}

    @property
    def sample_rate_hz(self) -> int:
        """Rate of the samples that the front-end reads."""
        return self.front_end["sample_rate_hz"]

    @property
    def waveform_rate_hz(self) -> int:
        """Rate of the samples that one has to give: to the file where it reads waveforms, else to the front-end."""
        return self.sample_rate_hz if self.input_rate_hz is None else self.input_rate_hz

    @property
    def waveform_samples(self) -> int:
        """S: length of one clip at that rate."""
        return round(self.clip_seconds * self.waveform_rate_hz)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one clip, without the batch axis: (1,F,T), or (S,) where the file reads waveforms."""
        return self.feature_shape if self.reads == FEATURES else (self.waveform_samples,)

    @property
    def clip_seconds(self) -> float:
        """Length of one input."""
        return self.input["clip_seconds"]

    @property
    def clip_samples(self) -> int:
        """S: length of one clip in samples of the front-end."""
        return round(self.clip_seconds * self.sample_rate_hz)

    @property
    def mean(self) -> float:
        """Subtracted from the features."""
        return self.input["mean"]

    @property
    def std(self) -> float:
        """The features are divided by it."""
        return self.input["std"]

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """(1,F,T) of one clip."""
        return (1, self.front_end["n_mels"], count_frames(self.clip_samples, self.front_end))

    def to_props(self) -> dict[str, str]:
        """Keys and JSON values for `metadata_props`; the sample rate stands there a second time, easy to find."""
        props = {_FORMAT_KEY: FORMAT, RATE_KEY: self.sample_rate_hz}
        props |= {f.name: getattr(self, f.name) for f in fields(self)}
        return {key: json.dumps(value, sort_keys=True, ensure_ascii=False) for key, value in props.items()}

    @classmethod
    def from_props(cls, props: Mapping[str, str], source: str) -> "OnnxMetadata":
        """Reads what `to_props` wrote.

        Args:
            source: file name for messages.

        Raises:
            ModelFileError: keys absent or values that cannot be read; `source` is named.
        """
        wanted = [_FORMAT_KEY, *(f.name for f in fields(cls))]
        wanted = [key for key in wanted if key in props or key not in _LATER_KEYS]
        if absent := [key for key in wanted if key not in props]:
            raise ModelFileError(
                f"{source}: metadata_props lack {', '.join(absent)}: not a file that aum-compress exported, or one "
                "that a tool has stripped; export it again"
            )
        values = {}
        for key in wanted:
            try:
                values[key] = json.loads(props[key])
            except ValueError:
                raise ModelFileError(f"{source}: metadata_props {key}: {props[key][:60]!r} is not JSON") from None
        if (found := values.pop(_FORMAT_KEY)) != FORMAT:
            raise ModelFileError(
                f"{source}: metadata of format {found!r}, wanted {FORMAT!r}: use the version that wrote it"
            )
        if not isinstance(values["labels"], list):
            raise ModelFileError(f"{source}: metadata_props labels: found {props['labels'][:60]}, wanted a list")
        try:
            return cls(**values | {"labels": tuple(values["labels"])})
        except ModelFileError as error:
            raise ModelFileError(f"{source}: {error}") from None


def _wrong_fields(place: str, found: Any, wanted: Mapping[str, tuple[type, ...]]) -> list[str]:
    if not isinstance(found, Mapping):
        return [f"{place}: found {found!r}, wanted keys and values"]
    problems = [f"{place}.{key}: absent" for key in wanted.keys() - found.keys()]
    problems += [f"{place}.{key}: unknown" for key in found.keys() - wanted.keys()]
    for key in wanted.keys() & found.keys():
        if isinstance(found[key], bool) or not isinstance(found[key], wanted[key]):
            names = " or ".join(kind.__name__ for kind in wanted[key])
            problems.append(f"{place}.{key}: found {found[key]!r}, wanted {names}")
    return sorted(problems)
