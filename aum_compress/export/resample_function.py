"""Resampling in ONNX: a model-local function, equal to `audio.resample`, shown as one node."""

import math
from collections.abc import Iterator

import onnx

from aum_compress.audio.resample import ZERO_CROSSINGS, crossings_a_block, rate_steps, reached_samples
from aum_compress.errors import ModelFileError
from aum_compress.export.front_end_function import ints, scalar, whole
from aum_compress.export.scan_function import SCAN_DOMAIN

RESAMPLE = "Resample"
_MOST_TAPS = 2_000_000
"""Values of the largest kernel that is made at load: 8 MB."""


def resample_function(from_hz: int, to_hz: int, n_in: int, n_out: int, opset: int) -> onnx.FunctionProto:
    """`aum_compress::Resample`: samples (B,n_in) to (B,n_out), cut or filled with silence at the end.

    One convolution, which takes `step` samples in and gives `phases` out at a time. Its kernel is made in the graph.

    Raises:
        ModelFileError: two rates that have so little in common that the kernel would be huge.
    """
    step, phases = rate_steps(from_hz, to_hz)
    taps = step + 2 * reached_samples(step, phases)
    if phases * taps > _MOST_TAPS:
        raise ModelFileError(
            f"an input rate of {from_hz} Hz cannot be resampled to the model's {to_hz} Hz in the graph: that takes "
            f"{phases:,} filters of {taps:,} taps, at most {_MOST_TAPS:,} taps in all are made; choose a usual rate "
            "such as 16000, 44100 or 48000"
        )
    body = "\n".join((*_kernel(step, phases, taps), *_convolution(step, phases, taps, n_in, n_out)))
    head = f'<domain: "{SCAN_DOMAIN}", opset_import: ["": {opset}]>'
    return onnx.parser.parse_function(f"{head}\n{RESAMPLE} (samples) => (resampled)\n{{\n{body}\n}}")


def _kernel(step: int, phases: int, taps: int) -> Iterator[str]:
    """`kernel` (phases, 1, taps): sinc times Hann. Places are counted in whole parts of `step * phases` a block."""
    crossings = crossings_a_block(step, phases)
    yield whole("origin", 0)
    yield whole("each", 1)
    yield whole("phases", phases)
    yield whole("taps", taps)
    yield "phase = Range (origin, phases, each)"
    yield "tap = Range (origin, taps, each)"
    yield whole("reach", reached_samples(step, phases))
    yield "offset = Sub (tap, reach)"
    yield "offset_parts = Mul (offset, phases)"
    yield whole("step", step)
    yield "phase_parts = Mul (phase, step)"
    yield ints("columns", 1, 2)
    yield "phase_column = Unsqueeze (phase_parts, columns)"
    yield "place = Sub (offset_parts, phase_column)"
    yield "place_float = Cast <to = 1> (place)"
    yield scalar("crossings_a_part", crossings / (step * phases))
    yield "unbounded = Mul (place_float, crossings_a_part)"
    yield scalar("lowest", -ZERO_CROSSINGS)
    yield scalar("highest", ZERO_CROSSINGS)
    yield "crossing = Clip (unbounded, lowest, highest)"
    yield scalar("pi", math.pi)
    yield "angle = Mul (crossing, pi)"
    yield "sine = Sin (angle)"
    yield "ratio = Div (sine, angle)"
    yield "is_centre = Equal (place, origin)"
    yield scalar("unit", 1)
    yield "sinc = Where (is_centre, unit, ratio)"
    yield scalar("hann_step", math.pi / (2 * ZERO_CROSSINGS))
    yield "hann_angle = Mul (crossing, hann_step)"
    yield "hann_cosine = Cos (hann_angle)"
    yield "hann = Mul (hann_cosine, hann_cosine)"
    yield "windowed = Mul (sinc, hann)"
    yield scalar("gain", crossings / step)
    yield "kernel = Mul (windowed, gain)"


def _convolution(step: int, phases: int, taps: int, n_in: int, n_out: int) -> Iterator[str]:
    reach = reached_samples(step, phases)
    # training pads what comes out of `audio.resample` with silence: no filter runs on beyond the last sample it gives
    kept = min(n_out, -(-n_in * phases // step))
    blocks = -(-kept // phases)
    yield ints("silence", 0, reach, 0, (blocks - 1) * step + taps - reach - n_in)
    yield "padded = Pad (samples, silence)"
    yield ints("channel_axis", 1)
    yield "channel = Unsqueeze (padded, channel_axis)"
    yield f"by_phase = Conv <strides = [{step}]> (channel, kernel)"
    yield "by_block = Transpose <perm = [0, 2, 1]> (by_phase)"
    yield ints("flat", 0, -1)
    yield "all_blocks = Reshape (by_block, flat)"
    yield ints("surplus", 0, 0, 0, kept - blocks * phases)
    yield f"{'resampled' if kept == n_out else 'whole'} = Pad (all_blocks, surplus)"
    if kept != n_out:
        yield ints("missing", 0, 0, 0, n_out - kept)
        yield "resampled = Pad (whole, missing)"
