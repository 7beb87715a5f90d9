"""The front-ends as torch modules: waveforms (B, S) to images (B, 1, F, T), float32 even under autocast.

They learn nothing and hold no state: their tensors are non-persistent buffers, outside checkpoints and budget.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from aum_compress.audio.config import KaldiConfig, LogMelConfig
from aum_compress.audio.kaldi import POWER_FLOOR, check_length, fft_size, kaldi_filterbank, symmetric_hann
from aum_compress.audio.mel import frame_padding, hann_window, mel_filterbank

_MELS_PER_BAND = 16


class LogMel(nn.Module):
    """Log-mel image, T = 1 + S // hop_samples.

    Equal to log(torchaudio.transforms.MelSpectrogram(...) + log_offset) and to `mel.log_mel`: to 1e-4 on broadband
    sound, to 1e-2 in cells 100 dB below a pure tone of the same frame, where any float32 FFT has but rounding noise.

    Mel filters are applied 16 at a time to the bins that they touch, 7 % of the dense filterbank's multiplications: 32
    clips of 1 s at 32 kHz with the default values take 31 ms on one CPU thread, against 42 ms with one dense matmul and
    50 ms in torchaudio (best of 15). Frames are cut to the window, not to n_fft.

    Raises DataError for clips too short to be reflected at their ends.
    """

    def __init__(self, config: LogMelConfig) -> None:
        super().__init__()
        self.config = config
        window = hann_window(config.window_samples)
        mel = mel_filterbank(config.n_fft, config.n_mels, config.sample_rate_hz, config.f_min_hz, config.f_max_hz)
        self.register_buffer("window", torch.tensor(window), persistent=False)
        self.register_buffer("mel", torch.tensor(mel), persistent=False)
        self._bands = _bands(self.mel)

    def forward(self, waveforms: Tensor) -> Tensor:
        return _in_float32(self._log_mel, waveforms)

    def _log_mel(self, waveforms: Tensor) -> Tensor:
        padding = frame_padding(waveforms.shape[-1], self.config.n_fft, self.config.window_samples)
        padded = functional.pad(waveforms, padding, mode="reflect")
        frames = padded.unfold(-1, self.config.window_samples, self.config.hop_samples) * self.window
        mel = _mel_power(frames, self.config.n_fft, self.mel, self._bands)
        return torch.log(mel + self.config.log_offset).transpose(-1, -2).unsqueeze(1)


class KaldiFbank(nn.Module):
    """Kaldi's log-mel image, as AuM reads it; T = 1 + (S - window_samples) // hop_samples, or `fixed_frames`.

    Equal to torchaudio.compliance.kaldi.fbank with AuM's arguments (`audio/kaldi.py`) and to `kaldi.kaldi_fbank`: to
    1e-4 on broadband sound, where filters lie farther below others of their frame by float32's rounding.

    Raises DataError for clips shorter than one window.
    """

    def __init__(self, config: KaldiConfig) -> None:
        super().__init__()
        self.config = config
        self.n_fft = fft_size(config.window_samples)
        mel = kaldi_filterbank(self.n_fft, config.n_mels, config.sample_rate_hz, config.f_min_hz, config.f_max_hz)
        self.register_buffer("window", torch.tensor(symmetric_hann(config.window_samples)), persistent=False)
        self.register_buffer("mel", torch.tensor(mel), persistent=False)
        self._bands = _bands(self.mel)

    def forward(self, waveforms: Tensor) -> Tensor:
        return _in_float32(self._fbank, waveforms)

    def _fbank(self, waveforms: Tensor) -> Tensor:
        config = self.config
        check_length(waveforms.shape[-1], config.window_samples)
        frames = waveforms.unfold(-1, config.window_samples, config.hop_samples)
        frames = frames - frames.mean(-1, keepdim=True)
        before = torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
        frames = (frames - config.pre_emphasis * before) * self.window
        mel = _mel_power(frames, self.n_fft, self.mel, self._bands)
        image = torch.log(mel.clamp_min(POWER_FLOOR)).transpose(-1, -2).unsqueeze(1)
        if config.fixed_frames is None:
            return image
        return functional.pad(image, (0, config.fixed_frames - image.shape[-1]))  # a negative padding cuts


def front_end_module(config: LogMelConfig | KaldiConfig) -> LogMel | KaldiFbank:
    """The module of a front-end's record."""
    return KaldiFbank(config) if isinstance(config, KaldiConfig) else LogMel(config)


def _in_float32(transform: Callable[[Tensor], Tensor], waveforms: Tensor) -> Tensor:
    # A half-precision power spectrum overflows at 65,504, and log_offset is below its smallest normal number.
    # The context is entered only where autocast is on: an exported graph would keep it as a node of its own.
    if torch.is_autocast_enabled(waveforms.device.type):
        with torch.autocast(waveforms.device.type, enabled=False):
            return transform(waveforms.float())
    return transform(waveforms.float())


def _mel_power(frames: Tensor, n_fft: int, mel: Tensor, bands: list[tuple[slice, slice]]) -> Tensor:
    """Windowed frames (..., T, window_samples) to mel power (..., T, F)."""
    spectrum = torch.fft.rfft(frames, n=n_fft)
    power = spectrum.real.square() + spectrum.imag.square()
    return torch.cat([power[..., bins] @ mel[bins, filters] for bins, filters in bands], dim=-1)


def _bands(mel: Tensor) -> list[tuple[slice, slice]]:
    """Filters in groups of `_MELS_PER_BAND`, each with the bins that it touches: (bins, filters)."""
    return [_band(mel, first) for first in range(0, mel.shape[1], _MELS_PER_BAND)]


def _band(mel: Tensor, first: int) -> tuple[slice, slice]:
    filters = slice(first, first + _MELS_PER_BAND)
    touched = mel[:, filters].any(dim=1).nonzero().flatten().tolist() or [0]
    return slice(touched[0], touched[-1] + 1), filters
