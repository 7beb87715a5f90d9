"""The log-mel front-end as a torch module."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from aum_compress.audio.config import FrontEndConfig
from aum_compress.audio.mel import frame_padding, hann_window, mel_filterbank

_MELS_PER_BAND = 16


class LogMel(nn.Module):
    """Waveforms (B, S) to log-mel images (B, 1, F, T), T = 1 + S // hop_samples; float32 even under autocast.

    Equal to log(torchaudio.transforms.MelSpectrogram(...) + log_offset) and to `mel.log_mel`: to 1e-4 on broadband
    sound, to 1e-2 in cells 100 dB below a pure tone of the same frame, where any float32 FFT has but rounding noise.
    It learns nothing and holds no state: its tensors are non-persistent buffers, outside checkpoints and budget.

    Mel filters are applied 16 at a time to the bins that they touch, 7 % of the dense filterbank's multiplications: 32
    clips of 1 s at 32 kHz with the default values take 31 ms on one CPU thread, against 42 ms with one dense matmul and
    50 ms in torchaudio (best of 15). Frames are cut to the window, not to n_fft.

    Raises DataError for clips too short to be reflected at their ends.
    """

    def __init__(self, config: FrontEndConfig) -> None:
        super().__init__()
        self.config = config
        window = hann_window(config.window_samples)
        mel = mel_filterbank(config.n_fft, config.n_mels, config.sample_rate_hz, config.f_min_hz, config.f_max_hz)
        self.register_buffer("window", torch.tensor(window), persistent=False)
        self.register_buffer("mel", torch.tensor(mel), persistent=False)
        self._bands = [_band(self.mel, first) for first in range(0, config.n_mels, _MELS_PER_BAND)]

    def forward(self, waveforms: Tensor) -> Tensor:
        # A half-precision power spectrum overflows at 65,504, and log_offset is below its smallest normal number.
        # The context is entered only where autocast is on: an exported graph would keep it as a node of its own.
        if torch.is_autocast_enabled(waveforms.device.type):
            with torch.autocast(waveforms.device.type, enabled=False):
                return self._log_mel(waveforms.float())
        return self._log_mel(waveforms.float())

    def _log_mel(self, waveforms: Tensor) -> Tensor:
        padding = frame_padding(waveforms.shape[-1], self.config.n_fft, self.config.window_samples)
        padded = functional.pad(waveforms, padding, mode="reflect")
        frames = padded.unfold(-1, self.config.window_samples, self.config.hop_samples) * self.window
        spectrum = torch.fft.rfft(frames, n=self.config.n_fft)
        power = spectrum.real.square() + spectrum.imag.square()
        mel = torch.cat([power[..., bins] @ self.mel[bins, filters] for bins, filters in self._bands], dim=-1)
        return torch.log(mel + self.config.log_offset).transpose(-1, -2).unsqueeze(1)


def _band(mel: Tensor, first: int) -> tuple[slice, slice]:
    """The bins that the filters from `first` on touch, and those filters."""
    filters = slice(first, first + _MELS_PER_BAND)
    touched = mel[:, filters].any(dim=1).nonzero().flatten().tolist() or [0]
    return slice(touched[0], touched[-1] + 1), filters
