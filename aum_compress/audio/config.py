"""The front-end's parameters, torch-free: recipes, bundles and the ONNX metadata all carry this record."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from aum_compress.audio.front_ends import count_frames, kind_of

Positive = Annotated[int, Field(gt=0)]


class _FrontEnd(BaseModel):
    """What both front-ends have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    sample_rate_hz: Positive
    window_samples: Positive
    hop_samples: Positive
    n_mels: Positive
    f_min_hz: Annotated[float, Field(ge=0)]
    f_max_hz: float | None = None
    """Upper edge of the mel bank in Hz; half the sample rate when left out."""

    deviations: ClassVar[float]
    """Features are divided by so many of their standard deviations over the training part."""

    @model_validator(mode="after")
    def _check_band(self) -> "_FrontEnd":
        top = self.f_max_hz if self.f_max_hz is not None else self.sample_rate_hz / 2
        if not self.f_min_hz < top <= self.sample_rate_hz / 2:
            raise ValueError(
                f"f_min_hz {self.f_min_hz} and f_max_hz {top} must satisfy f_min < f_max <= {self.sample_rate_hz / 2}"
            )
        return self

    def clip_samples(self, clip_seconds: float) -> int:
        """S: samples of one clip at `sample_rate_hz`."""
        return round(clip_seconds * self.sample_rate_hz)

    def n_frames(self, clip_seconds: float) -> int:
        """T: frames of one clip."""
        return count_frames(self.clip_samples(clip_seconds), self.model_dump())


class LogMelConfig(_FrontEnd):
    """Log-mel spectrogram; the defaults are those of the DCASE 2025 Task 1 baseline.

    A clip of S samples gives T = 1 + S // hop_samples frames (centred frames, reflected ends).
    """

    kind: Literal["log_mel"] = "log_mel"
    sample_rate_hz: Positive = 32_000
    n_fft: Positive = 4096
    window_samples: Positive = 3072
    hop_samples: Positive = 500
    n_mels: Positive = 256
    f_min_hz: Annotated[float, Field(ge=0)] = 0.0
    log_offset: Annotated[float, Field(gt=0)] = 1e-5
    """Added to the mel power before the natural logarithm."""

    deviations: ClassVar[float] = 1.0

    @model_validator(mode="after")
    def _check_fft(self) -> "LogMelConfig":
        if self.n_fft % 2:
            raise ValueError(f"n_fft {self.n_fft} must be even, so that centred frames number 1 + S // hop_samples")
        if self.window_samples > self.n_fft:
            raise ValueError(f"window_samples {self.window_samples} must be at most n_fft {self.n_fft}")
        return self


class KaldiConfig(_FrontEnd):
    """Kaldi's log-mel filterbank; the defaults are those of the published AuM checkpoints (`audio/kaldi.py`).

    A clip of S samples gives T = 1 + (S - window_samples) // hop_samples frames: those that lie wholly inside it.
    """

    kind: Literal["kaldi"] = "kaldi"
    sample_rate_hz: Positive = 16_000
    window_samples: Annotated[int, Field(ge=2)] = 400
    hop_samples: Positive = 160
    n_mels: Annotated[int, Field(gt=3)] = 128
    f_min_hz: Annotated[float, Field(ge=0)] = 20.0
    pre_emphasis: Annotated[float, Field(ge=0, le=1)] = 0.97
    fixed_frames: Positive | None = None
    """Frames that every clip is cut or, with zeros, padded to; AuM gives clips of 10 s 1024 in place of their 998."""

    deviations: ClassVar[float] = 2.0


def _tag(record: Any) -> Any:
    return kind_of(record) if isinstance(record, dict) else getattr(record, "kind", None)


FrontEnd = Annotated[
    Annotated[LogMelConfig, Tag("log_mel")] | Annotated[KaldiConfig, Tag("kaldi")],
    Discriminator(
        _tag, custom_error_type="front_end_kind", custom_error_message="wanted kind: log_mel or kaldi, and its keys"
    ),
]
"""Either front-end; a record without `kind` is a log-mel."""


class InputSpec(BaseModel):
    """What a model expects: features = (front_end(clip) - mean) / std, one (1,F,T) map a clip.

    The normalisation belongs to the front-end, outside the model and its budget, as the front-end itself does. AuM's
    (x - mean) / (2 * deviation) stands here with twice the deviation as `std`: for its AudioSet checkpoints mean
    -4.2677393, std 9.1379948.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    front_end: FrontEnd
    clip_seconds: Annotated[float, Field(gt=0)]
    mean: float = 0.0
    std: Annotated[float, Field(gt=0)] = 1.0

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """(1,F,T) of one clip."""
        return (1, self.front_end.n_mels, self.front_end.n_frames(self.clip_seconds))
