"""The front-end's parameters, torch-free: recipes, bundles and the ONNX metadata all carry this record."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]


class FrontEndConfig(BaseModel):
    """Log-mel spectrogram; the defaults are those of the DCASE 2025 Task 1 baseline.

    A clip of S samples gives T = 1 + S // hop_samples frames (centred frames, reflected ends).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sample_rate_hz: Positive = 32_000
    n_fft: Positive = 4096
    window_samples: Positive = 3072
    hop_samples: Positive = 500
    n_mels: Positive = 256
    f_min_hz: Annotated[float, Field(ge=0)] = 0.0
    f_max_hz: float | None = None
    """Upper edge of the mel bank in Hz; half the sample rate when left out."""
    log_offset: Annotated[float, Field(gt=0)] = 1e-5
    """Added to the mel power before the natural logarithm."""

    @model_validator(mode="after")
    def _check(self) -> "FrontEndConfig":
        if self.n_fft % 2:
            raise ValueError(f"n_fft {self.n_fft} must be even, so that centred frames number 1 + S // hop_samples")
        if self.window_samples > self.n_fft:
            raise ValueError(f"window_samples {self.window_samples} must be at most n_fft {self.n_fft}")
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
        return 1 + self.clip_samples(clip_seconds) // self.hop_samples


class InputSpec(BaseModel):
    """What a model expects: features = (log_mel(clip) - mean) / std, one (1,F,T) map a clip.

    The normalisation belongs to the front-end, outside the model and its budget, as the log-mel itself does.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    front_end: FrontEndConfig
    clip_seconds: Annotated[float, Field(gt=0)]
    mean: float = 0.0
    std: Annotated[float, Field(gt=0)] = 1.0

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """(1,F,T) of one clip."""
        return (1, self.front_end.n_mels, self.front_end.n_frames(self.clip_seconds))
