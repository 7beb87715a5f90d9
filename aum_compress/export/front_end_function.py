"""Both front-ends in ONNX: a model-local function from waveforms to normalised features, shown as one node.

The discrete Fourier transform is done in two steps, as products of matrices (Cooley and Tukey, 1965). With
n_fft = N1 * N2, sample n = N2 * n1 + n2 and bin k = k1 + N1 * k2:

    Y[k1, n2] = sum over n1 of x[n1, n2] * exp(-2 pi i n1 k1 / N1)
    X[k1, k2] = sum over n2 of Y[k1, n2] * exp(-2 pi i n2 (k1 + N1 k2) / n_fft)

Samples are real, so rows k1 above N1 / 2 mirror those below and are never computed: that is half of all work. Frames
are the last axis throughout: nothing is moved between the two products, and the image comes out as (F,T).

Both matrices are made in the graph from whole numbers, exact but for the last cosine; runtimes that fold constants do
it once, at load. Two mel weights a bin are stored, since a bin lies in two triangles at most, and filters are applied
in bands to the bins around them: a tenth of the dense product.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx

from aum_compress.audio.front_ends import KALDI, LOG_MEL, count_frames, kind_of
from aum_compress.audio.kaldi import POWER_FLOOR, fft_size, kaldi_filterbank
from aum_compress.audio.mel import frame_padding, mel_filterbank
from aum_compress.export.scan_function import SCAN_DOMAIN

FRONT_ENDS = {LOG_MEL: "LogMel", KALDI: "KaldiFbank"}
"""Kind of a front-end -> name of its function."""
_FILTERS_A_STEP = 8
_BAND_MACS = 4000
"""What one more band costs, as multiplications a frame: two nodes."""


@dataclass(frozen=True)
class FrontEndPlan:
    """Sizes of the computation, and the mel filters in its order of bins."""

    record: Mapping[str, Any]
    """`FrontEnd.model_dump()`."""
    clip_samples: int
    """S, at the front-end's rate."""

    @property
    def is_kaldi(self) -> bool:
        return kind_of(self.record) == KALDI

    @property
    def n_fft(self) -> int:
        return fft_size(self.record["window_samples"]) if self.is_kaldi else self.record["n_fft"]

    @property
    def n_frames(self) -> int:
        """Frames that are computed, before kaldi's `fixed_frames` cut or add some."""
        return count_frames(self.clip_samples, {**self.record, "fixed_frames": None})

    @cached_property
    def factors(self) -> tuple[int, int]:
        """N1, which is even, and N2: those with the fewest multiplications."""
        pairs = [(first, self.n_fft // first) for first in range(2, self.n_fft + 1, 2) if self.n_fft % first == 0]
        return min(pairs, key=lambda pair: self._fft_macs(*pair))

    def _fft_macs(self, first: int, second: int) -> int:
        padded = -(-self.record["window_samples"] // second) * second
        return (first + 2) * padded + (first // 2 + 1) * (2 * second) ** 2

    @property
    def padded_window(self) -> int:
        """Samples of a window, with zeros behind it up to a multiple of N2."""
        _, second = self.factors
        return -(-self.record["window_samples"] // second) * second

    @property
    def half(self) -> int:
        """Rows k1 that are computed."""
        return self.factors[0] // 2 + 1

    @cached_property
    def blocks(self) -> list[int]:
        """k2 in the order in which their bins ascend."""
        first, second = self.factors
        return sorted(range(second), key=lambda k2: self._mirrored(first / 4 + first * k2))

    def _mirrored(self, k: float) -> float:
        """Bins above n_fft / 2 have the power of those below."""
        return min(k, self.n_fft - k)

    @cached_property
    def mel(self) -> np.ndarray:
        """(F, N2 * half): the filters over the computed bins. One that is computed twice weighs once."""
        bins = [int(self._mirrored(k1 + self.factors[0] * k2)) for k2 in self.blocks for k1 in range(self.half)]
        bank = (kaldi_filterbank if self.is_kaldi else mel_filterbank)(
            self.n_fft,
            self.record["n_mels"],
            self.record["sample_rate_hz"],
            self.record["f_min_hz"],
            self.record["f_max_hz"],
        )
        found = bank[bins].T.copy()
        _, firsts = np.unique(bins, return_index=True)
        found[:, np.setdiff1d(np.arange(len(bins)), firsts)] = 0
        return found

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """What is stored: of each computed bin the lower filter it lies in, and its weights in that and the next."""
        lower = (self.mel != 0).argmax(0)
        padded = np.vstack([self.mel, np.zeros_like(self.mel[:1])])
        bins = np.arange(self.mel.shape[1])
        weights = np.stack([padded[lower, bins], padded[lower + 1, bins]])
        return {"mel_filter": lower.astype(np.int16), "mel_weight": weights}

    @cached_property
    def bands(self) -> list[tuple[int, int, int, int]]:
        """Of each band: filters from, to; bins from, to. Together those with the fewest multiplications."""
        n_mels = len(self.mel)
        cuts = [*range(0, n_mels, _FILTERS_A_STEP), n_mels]
        best: dict[int, tuple[int, list[tuple[int, int, int, int]]]] = {0: (0, [])}
        for place, end in enumerate(cuts[1:], start=1):
            options = []
            for begin in cuts[:place]:
                bins = np.flatnonzero(self.mel[begin:end].any(0))
                low, high = (int(bins[0]), int(bins[-1]) + 1) if bins.size else (0, 1)
                cost, bands = best[begin]
                cost += (end - begin) * (high - low) + _BAND_MACS
                options.append((cost, [*bands, (begin, end, low, high)]))
            best[end] = min(options, key=lambda option: option[0])
        return best[n_mels][1]


def front_end_function(plan: FrontEndPlan, mean: float, std: float, opset: int) -> onnx.FunctionProto:
    """`aum_compress::LogMel` or `aum_compress::KaldiFbank` over operators of `opset`, all in float32.

    (waveform (B,S), mel_filter, mel_weight of `FrontEndPlan.tensors`) to features (B,1,F,T), normalised.
    """
    steps = (_FIRST, _frames(plan), _windowed(plan), _spectrum(plan), _mel(plan), _image(plan, mean, std))
    body = "\n".join(line for step in steps for line in step)
    head = f'<domain: "{SCAN_DOMAIN}", opset_import: ["": {opset}]>'
    signature = f"{FRONT_ENDS[kind_of(plan.record)]} (waveform, mel_filter, mel_weight) => (features)"
    return onnx.parser.parse_function(f"{head}\n{signature}\n{{\n{body}\n}}")


_FIRST = (
    "zero = Constant <value_int = 0> ()",
    "one = Constant <value_int = 1> ()",
    "first_axis = Constant <value_ints = [0]> ()",
    "second_axis = Constant <value_ints = [1]> ()",
    "last_axis = Constant <value_ints = [-1]> ()",
)


def ints(name: str, *values: int) -> str:
    """A list of whole numbers as a Constant: a tensor, since onnxruntime 1.20 loses the shape of `value_ints`."""
    return f"{name} = Constant <value = int64[{len(values)}] {{{', '.join(map(str, values))}}}> ()"


def whole(name: str, value: int) -> str:
    """One whole number as a Constant."""
    return f"{name} = Constant <value_int = {value}> ()"


def scalar(name: str, value: float) -> str:
    """One float32 as a Constant."""
    return f"{name} = Constant <value_float = {np.float32(value):.9e}> ()"


def _frames(plan: FrontEndPlan) -> Iterator[str]:
    """`frames` (window, B*T). Rows of one hop each are turned into columns; a frame is some of them, one below the
    other, so that nothing is gathered sample by sample."""
    record, samples, length = plan.record, "waveform", plan.clip_samples
    window, hop = record["window_samples"], record["hop_samples"]
    if not plan.is_kaldi:
        before, after = frame_padding(length, plan.n_fft, window)
        yield ints("ends", 0, before, 0, after)
        yield 'reflected = Pad <mode = "reflect"> (waveform, ends)'
        samples, length = "reflected", length + before + after
    hops_a_frame = -(-window // hop)
    hops = plan.n_frames - 1 + hops_a_frame
    yield ints("rest", 0, 0, 0, hops * hop - length)
    yield f"whole_hops = Pad ({samples}, rest)"
    yield ints("hop_shape", 0, hops, hop)
    yield "hops = Reshape (whole_hops, hop_shape)"
    yield "by_sample = Transpose <perm = [2, 0, 1]> (hops)"
    yield ints("samples_and_frames", 0, 2)
    for number in range(hops_a_frame):
        yield ints(f"from_{number}", 0, number)
        yield ints(f"to_{number}", min(hop, window - number * hop), number + plan.n_frames)
        yield f"part_{number} = Slice (by_sample, from_{number}, to_{number}, samples_and_frames)"
    yield f"parts = Concat <axis = 0> ({', '.join(f'part_{number}' for number in range(hops_a_frame))})"
    yield ints("frames_shape", window, -1)
    yield "frames = Reshape (parts, frames_shape)"


def _windowed(plan: FrontEndPlan) -> Iterator[str]:
    """`columns` (window / N2, N2*B*T): frames weighted by a Hann window, with zeros below where N2 does not divide."""
    window, (_, second) = plan.record["window_samples"], plan.factors
    source, period = "frames", window
    if plan.is_kaldi:
        source, period = "emphasised", window - 1
        yield "means = ReduceMean (frames, first_axis)"
        yield "level = Sub (frames, means)"
        yield "oldest = Slice (level, first_axis, second_axis, first_axis)"
        yield "newest_axis = Neg (second_axis)"
        yield "all_but_newest = Slice (level, first_axis, newest_axis, first_axis)"
        yield "before = Concat <axis = 0> (oldest, all_but_newest)"
        yield scalar("pre_emphasis", plan.record["pre_emphasis"])
        yield "expected = Mul (pre_emphasis, before)"
        yield "emphasised = Sub (level, expected)"
    yield whole("window_length", window)
    yield "places = Range (zero, window_length, one)"
    yield "places_float = Cast <to = 1> (places)"
    yield scalar("window_step", 2 * math.pi / period)
    yield "window_angles = Mul (places_float, window_step)"
    yield "window_cosines = Cos (window_angles)"
    yield scalar("half", 0.5)
    yield "half_cosines = Mul (half, window_cosines)"
    yield "window = Sub (half, half_cosines)"
    yield "window_column = Unsqueeze (window, last_axis)"
    yield f"weighted = Mul ({source}, window_column)"
    padded = plan.padded_window
    if padded != window:
        yield ints("zeros_below", 0, 0, padded - window, 0)
        yield "filled = Pad (weighted, zeros_below)"
    yield ints("columns_shape", padded // second, -1)
    yield f"columns = Reshape ({'filled' if padded != window else 'weighted'}, columns_shape)"


def _spectrum(plan: FrontEndPlan) -> Iterator[str]:
    """`power` (computed bins, B*T), in the order of `FrontEndPlan.mel`.

    A row of the first product is (k1, part), part 0 real and 1 imaginary; -sin(x) is cos(x + a quarter turn), so angles
    are counted in quarters of a step: 4 * n * k + part * period, of 4 * period a turn.
    """
    (first, second), half, n_fft = plan.factors, plan.half, plan.n_fft
    yield whole("half_rows", half)
    yield "k1 = Range (zero, half_rows, one)"
    yield whole("column_rows", plan.padded_window // second)
    yield "n1 = Range (zero, column_rows, one)"
    yield whole("two", 2)
    yield "part = Range (zero, two, one)"
    yield whole("four", 4)
    yield whole("first_factor", first)
    yield ints("behind_k1", 1, 2)
    yield "k1_column = Unsqueeze (k1, behind_k1)"
    yield "part_column = Unsqueeze (part, last_axis)"
    yield "k1_n1 = Mul (k1_column, n1)"
    yield "quarters_1 = Mul (k1_n1, four)"
    yield "turned_1 = Mul (part_column, first_factor)"
    yield "angles_1 = Add (quarters_1, turned_1)"
    yield from _cosines("basis_1", "angles_1", 4 * first, (2 * half, -1))
    yield "step_1 = MatMul (basis_1, columns)"
    yield ints("step_1_shape", half, 2 * second, -1)
    yield "halfway = Reshape (step_1, step_1_shape)"
    # axes of the second basis: k1, part out, k2, part in, n2
    yield ints("k2", *plan.blocks)
    yield whole("second_factor", second)
    yield "n2 = Range (zero, second_factor, one)"
    yield whole("n_fft", n_fft)
    yield ints("one_behind", 1, 2, 3, 4)
    yield "k1_out = Unsqueeze (k1, one_behind)"
    yield "k2_out = Unsqueeze (k2, behind_k1)"
    yield "k2_bins = Mul (k2_out, first_factor)"
    yield "bins = Add (k1_out, k2_bins)"
    yield "bins_n2 = Mul (bins, n2)"
    yield "quarters_2 = Mul (bins_n2, four)"
    yield ints("three_behind", 1, 2, 3)
    yield "part_out = Unsqueeze (part, three_behind)"
    yield "part_difference = Sub (part_out, part_column)"
    yield "turned_2 = Mul (part_difference, n_fft)"
    yield "angles_2 = Add (quarters_2, turned_2)"
    yield from _cosines("basis_2", "angles_2", 4 * n_fft, (half, 2 * second, 2 * second))
    yield "spectrum = MatMul (basis_2, halfway)"
    yield "squares = Mul (spectrum, spectrum)"
    yield ints("parts_shape", half, 2, second, -1)
    yield "squares_by_part = Reshape (squares, parts_shape)"
    yield "power_by_k1 = ReduceSum <keepdims = 0> (squares_by_part, second_axis)"
    yield "power_by_k2 = Transpose <perm = [1, 0, 2]> (power_by_k1)"
    yield ints("power_shape", half * second, -1)
    yield "power = Reshape (power_by_k2, power_shape)"


def _cosines(name: str, angles: str, turn: int, shape: tuple[int, ...]) -> Iterator[str]:
    """cos(2 pi angles / turn) for whole angles, taken to the turn around zero, where float32 has most digits."""
    yield whole(f"{name}_turn", turn)
    yield whole(f"{name}_half_turn", turn // 2)
    yield f"{name}_ahead = Add ({angles}, {name}_half_turn)"
    yield f"{name}_rest = Mod ({name}_ahead, {name}_turn)"
    yield f"{name}_near = Sub ({name}_rest, {name}_half_turn)"
    yield f"{name}_float = Cast <to = 1> ({name}_near)"
    yield scalar(f"{name}_step", 2 * math.pi / turn)
    yield f"{name}_radians = Mul ({name}_float, {name}_step)"
    yield f"{name}_cosines = Cos ({name}_radians)"
    yield ints(f"{name}_shape", *shape)
    yield f"{name} = Reshape ({name}_cosines, {name}_shape)"


def _mel(plan: FrontEndPlan) -> Iterator[str]:
    """`mel` (F, B*T). The dense matrix is made once, and cut into bands; only these are multiplied."""
    yield whole("n_mels", len(plan.mel))
    yield "filters = Range (zero, n_mels, one)"
    yield "filter_column = Unsqueeze (filters, last_axis)"
    yield "lower_filter = Cast <to = 7> (mel_filter)"
    yield "upper_filter = Add (lower_filter, one)"
    yield "in_lower = Equal (filter_column, lower_filter)"
    yield "in_upper = Equal (filter_column, upper_filter)"
    yield "lower_weight, upper_weight = Split <axis = 0, num_outputs = 2> (mel_weight)"
    yield scalar("no_weight", 0)
    yield "lower = Where (in_lower, lower_weight, no_weight)"
    yield "upper = Where (in_upper, upper_weight, no_weight)"
    yield "mel_matrix = Add (lower, upper)"
    for number, (begin, end, low, high) in enumerate(plan.bands):
        yield ints(f"band_from_{number}", begin, low)
        yield ints(f"band_to_{number}", end, high)
        yield f"band_matrix_{number} = Slice (mel_matrix, band_from_{number}, band_to_{number})"
        yield ints(f"bins_from_{number}", low)
        yield ints(f"bins_to_{number}", high)
        yield f"band_power_{number} = Slice (power, bins_from_{number}, bins_to_{number}, first_axis)"
        yield f"band_{number} = MatMul (band_matrix_{number}, band_power_{number})"
    yield f"mel = Concat <axis = 0> ({', '.join(f'band_{number}' for number in range(len(plan.bands)))})"


def _image(plan: FrontEndPlan, mean: float, std: float) -> Iterator[str]:
    """`features` (B,1,F,T), normalised."""
    if plan.is_kaldi:
        yield scalar("floor", POWER_FLOOR)
        yield "above_floor = Max (mel, floor)"
    else:
        yield scalar("offset", plan.record["log_offset"])
        yield "above_floor = Add (mel, offset)"
    yield "logarithm = Log (above_floor)"
    yield ints("image_shape", len(plan.mel), -1, plan.n_frames)
    yield "image = Reshape (logarithm, image_shape)"
    image, fixed = "image", plan.record.get("fixed_frames")
    if fixed not in (None, plan.n_frames):
        yield ints("missing_frames", 0, 0, 0, 0, 0, fixed - plan.n_frames)
        yield "fixed_image = Pad (image, missing_frames)"
        image = "fixed_image"
    yield scalar("mean", mean)
    yield f"centred = Sub ({image}, mean)"
    yield scalar("deviation", std)
    yield "normalised = Div (centred, deviation)"
    yield "images = Transpose <perm = [1, 0, 2]> (normalised)"
    yield "features = Unsqueeze (images, second_axis)"
