"""Augmentation of whole batches on whatever device they are on.

Every function draws from the CPU generator that it is given and from nothing else: a seed gives the same draws on a CPU
and on a GPU. Nothing is changed in place.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor, nn

from aum_compress.audio.reading import AUDIO_SUFFIXES, read_audio
from aum_compress.audio.torchaudio_compat import functional
from aum_compress.errors import DataError, join_problems


def time_roll(x: Tensor, max_shift: int, generator: Generator) -> Tensor:
    """Roll each example along the last axis by its own shift, uniform from -max_shift to max_shift, ends joined.

    Waveforms (B, S) roll by samples, log-mel images (B, 1, F, T) by frames.
    """
    shifts = torch.randint(-max_shift, max_shift + 1, (len(x),), generator=generator).tolist()
    return torch.stack([example.roll(shift, dims=-1) for example, shift in zip(x, shifts, strict=True)])


def frequency_mask(x: Tensor, max_bins: int, generator: Generator) -> Tensor:
    """Overwrite up to `max_bins` neighbouring mel bins of each log-mel image (B, 1, F, T) with its mean."""
    return _mask(x, max_bins, 2, generator)


def time_mask(x: Tensor, max_frames: int, generator: Generator) -> Tensor:
    """Overwrite up to `max_frames` neighbouring frames of each log-mel image (B, 1, F, T) with its mean."""
    return _mask(x, max_frames, 3, generator)


def freq_mixstyle(x: Tensor, p: float, alpha: float, generator: Generator) -> Tensor:
    """Freq-MixStyle on log-mel images (B, 1, F, T), tossed with probability `p` for the batch as a whole.

    Each example's mean and deviation in every mel bin are blended with those of another example; the own share of each
    is drawn from Beta(alpha, alpha).

    The maths of `mixstyle` in CPJKU/dcase2024_task1_baseline, helpers/utils.py (Kim et al. 2022; Schmid et al. 2022):
    statistics over axes 1 and 3, unbiased variance + 1e-6, no gradient through the statistics.
    """
    if torch.rand((), generator=generator) > p:
        return x
    own_share = _beta(alpha, len(x), generator).to(x)[:, None, None, None]
    permutation = torch.randperm(len(x), generator=generator).to(x.device)
    mean = x.mean(dim=(1, 3), keepdim=True).detach()
    deviation = (x.var(dim=(1, 3), keepdim=True) + 1e-6).sqrt().detach()
    new_mean = torch.lerp(mean[permutation], mean, own_share)
    new_deviation = torch.lerp(deviation[permutation], deviation, own_share)
    return (x - mean) / deviation * new_deviation + new_mean


def mixup(x: Tensor, alpha: float, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Mix each example of (B, ...) with another: returns the mixture, the permutation (B,) and the own share (B,).

    The own share is max(lambda, 1 - lambda) with lambda ~ Beta(alpha, alpha) for each example (Zhang et al. 2018), so
    an example stays the louder part in its own place. The caller mixes labels and teacher logits with `blend`.
    """
    own_share = _beta(alpha, len(x), generator)
    own_share = torch.maximum(own_share, 1 - own_share).to(x)
    permutation = torch.randperm(len(x), generator=generator).to(x.device)
    return blend(x, permutation, own_share), permutation, own_share


def blend(values: Tensor, permutation: Tensor, own_share: Tensor) -> Tensor:
    """own_share * values + (1 - own_share) * values[permutation] for float values (B, ...): one-hot labels, logits."""
    share = own_share.reshape(-1, *[1] * (values.ndim - 1)).to(values.dtype)
    return torch.lerp(values[permutation], values, share)


def response_files(folder: Path | str, exclude: Sequence[str] = ()) -> list[Path]:
    """The audio files of a folder of impulse responses, sorted, without those whose names are in `exclude`.

    Raises DataError when the folder is missing, lacks a file that `exclude` names, or has no other audio.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: a folder of impulse responses was wanted, there is no such folder")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in AUDIO_SUFFIXES)
    # a misspelt name would let a test device's response into training without a word
    if missing := sorted(set(exclude) - {path.name for path in files}):
        raise DataError(
            join_problems(
                f"{folder}: device_response_exclude names {len(missing)} files that are not among its {len(files)} "
                "impulse responses; wanted names with suffix, without folder:",
                missing,
            )
        )
    if not (kept := [path for path in files if path.name not in exclude]):
        wanted = ", ".join(sorted(AUDIO_SUFFIXES))
        left = "is left by device_response_exclude" if files else "found"
        raise DataError(f"{folder}: no impulse response {left}: put audio files in it ({wanted})")
    return kept


def responses_sha256(folder: Path | str, exclude: Sequence[str] = ()) -> str:
    """Of the names and bytes of `response_files`."""
    digest = hashlib.sha256()
    for path in response_files(folder, exclude):
        digest.update(f"{path.name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


class DeviceResponses(nn.Module):
    """Impulse responses of recording devices, convolved with random clips of a batch (Morocutti et al. 2023).

    Reads the `response_files` of `folder` and resamples them to `sample_rate_hz`. Unit energy keeps the level of white
    noise; output is taken from the peak of the response on, so that nothing moves in time.

    Raises DataError as `response_files` does, or naming all files that are unreadable or silent.
    """

    responses: Tensor
    """(responses, taps) float32, all peaks at the same tap."""

    def __init__(self, folder: Path | str, sample_rate_hz: int, exclude: Sequence[str] = ()) -> None:
        super().__init__()
        self.files = response_files(folder, exclude)
        loaded, problems = [], []
        for path in self.files:
            try:
                loaded.append(_unit_energy(read_audio(path, sample_rate_hz), path))
            except DataError as error:
                problems.append(str(error))
        if problems:
            raise DataError(
                join_problems(f"{Path(folder)}: {len(problems)} impulse responses cannot be used:", problems)
            )
        peaks = [int(np.abs(response).argmax()) for response in loaded]
        self.peak = max(peaks)
        taps = max(self.peak - peak + len(response) for peak, response in zip(peaks, loaded, strict=True))
        responses = torch.zeros(len(loaded), taps)
        for row, peak, response in zip(responses, peaks, loaded, strict=True):
            row[self.peak - peak : self.peak - peak + len(response)] = torch.from_numpy(response)
        self.register_buffer("responses", responses, persistent=False)

    def forward(self, waveforms: Tensor, p: float, generator: Generator) -> Tensor:
        """Waveforms (B, S) to (B, S): each is heard, with probability `p`, through a response drawn for it alone."""
        n_clips = len(waveforms)
        chosen = torch.rand(n_clips, generator=generator) < p
        if not chosen.any():
            return waveforms
        which = torch.randint(len(self.responses), (n_clips,), generator=generator)[chosen].to(waveforms.device)
        chosen = chosen.to(waveforms.device)
        out = waveforms.clone()
        out[chosen] = self.heard_through(which, waveforms[chosen]).to(out.dtype)
        return out

    def heard_through(self, which: Tensor, waveforms: Tensor) -> Tensor:
        """Waveforms (B, S), each through the response that `which` (B,) numbers; float32."""
        n_samples = waveforms.shape[1]
        # Room for the whole convolution, so that nothing wraps around, and no large prime for the FFT to stumble on.
        n_fft = -(-(n_samples + self.responses.shape[1] - 1) // 1024) * 1024
        spectrum = torch.fft.rfft(waveforms.float(), n=n_fft) * torch.fft.rfft(self.responses[which], n=n_fft)
        return torch.fft.irfft(spectrum, n=n_fft)[:, self.peak : self.peak + n_samples]


def _unit_energy(response: np.ndarray, path: Path) -> np.ndarray:
    energy = float(np.square(response, dtype=np.float64).sum())
    if energy == 0:
        raise DataError(f"{path}: is silent: an impulse response was wanted, take the file away")
    return (response / energy**0.5).astype(np.float32)


def _mask(x: Tensor, max_width: int, axis: int, generator: Generator) -> Tensor:
    """torchaudio's mask, which can draw from the global generator alone: that is left as it was found."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_seed(generator))
        ones = torch.ones(len(x), 1, x.shape[axis])
        kept = functional.mask_along_axis_iid(ones, min(max_width, x.shape[axis]), mask_value=0.0, axis=2)
    shape = [len(x), 1, 1, 1]
    shape[axis] = x.shape[axis]
    return torch.where(kept.reshape(shape).to(x.device) > 0, x, x.mean(dim=(1, 2, 3), keepdim=True))


def _beta(alpha: float, count: int, generator: Generator) -> Tensor:
    """(count,) float32 draws of Beta(alpha, alpha): numpy's, as torch.distributions takes no generator."""
    return torch.from_numpy(np.random.default_rng(_seed(generator)).beta(alpha, alpha, count).astype(np.float32))


def _seed(generator: Generator) -> int:
    return int(torch.randint(2**63 - 1, (), generator=generator))
