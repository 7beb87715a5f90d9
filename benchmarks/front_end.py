"""Log-mel inside an ONNX graph: four formulations, one CPU thread, interleaved in one run.

    python benchmarks/front_end.py [--rounds 60] [--out benchmarks/front_end.json]

For one second of audio, waveform to log-mel image: the `STFT` operator; one product with the whole DFT basis; the
two-step DFT with filters as one dense matrix; and what `export` writes, the two-step DFT with filters in bands, its
tables made in the graph at load. Each has agreed with the front-end of training before it is timed. Beside DCASE's
front-end, a small one that a recipe may ask for (n_fft 1024, 64 mel bins).

Rounds are interleaved: each runs every formulation once, so that whatever else the machine does falls on all alike; the
whole basis, whose 52 MB push everything else out of the caches, has rounds of its own. Times are those of the thread on
the processor, which leaves out what other programs take; the figures to trust are ratios. `load_ms` opens the session.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from aum_compress.audio.config import LogMelConfig
from aum_compress.audio.front_ends import features
from aum_compress.audio.mel import frame_padding, hann_window, mel_filterbank
from aum_compress.export.front_end_function import FrontEndPlan, front_end_function
from aum_compress.export.timing import machine

CASES = {
    "DCASE: n_fft 4096, 256 mel bins": LogMelConfig(),
    "edge: n_fft 1024, 64 mel bins": LogMelConfig(n_fft=1024, window_samples=1024, n_mels=64),
}
STFT, DIRECT, DENSE, SHIPPED = (
    "STFT operator",
    "whole DFT basis",
    "two steps, dense filters",
    "two steps, bands (shipped)",
)


def stft_graph(config: LogMelConfig) -> onnx.ModelProto:
    """The operator that ONNX has for it; frames cut to n_fft, filters as one matrix."""
    rate, n_fft, hop = config.sample_rate_hz, config.n_fft, config.hop_samples
    window = np.zeros(n_fft, np.float32)
    begin = (n_fft - config.window_samples) // 2
    window[begin : begin + config.window_samples] = hann_window(config.window_samples)
    mel = mel_filterbank(n_fft, config.n_mels, rate, config.f_min_hz, config.f_max_hz)
    text = f"""
    <ir_version: 10, opset_import: ["": 20]>
    stft (float[1, {rate}] waveform) => (float[1, 1, {config.n_mels}, frames] features)
    <int64[4] ends = {{0, {n_fft // 2}, 0, {n_fft // 2}}}, int64 hop = {{{hop}}}, int64[1] last = {{-1}},
     int64[1] first = {{1}}, float offset = {{{config.log_offset}}}>
    {{ padded = Pad <mode = "reflect"> (waveform, ends)
       spectrum = STFT (padded, hop, window)
       squares = Mul (spectrum, spectrum)
       power = ReduceSum <keepdims = 0> (squares, last)
       bands = MatMul (power, filters)
       above = Add (bands, offset)
       logarithm = Log (above)
       image = Transpose <perm = [0, 2, 1]> (logarithm)
       features = Unsqueeze (image, first) }}
    """
    return with_tensors(text, {"window": window, "filters": np.asarray(mel)})


def direct_graph(config: LogMelConfig) -> onnx.ModelProto:
    """A strided convolution with the windowed basis: cosines, then sines."""
    rate, n_fft = config.sample_rate_hz, config.n_fft
    before, after = frame_padding(rate, n_fft, config.window_samples)
    bins = n_fft // 2 + 1
    angles = 2 * np.pi / n_fft * (np.outer(np.arange(bins), np.arange(config.window_samples)) % n_fft)
    basis = np.concatenate([np.cos(angles), np.sin(angles)]) * hann_window(config.window_samples)
    mel = mel_filterbank(n_fft, config.n_mels, rate, config.f_min_hz, config.f_max_hz)
    text = f"""
    <ir_version: 10, opset_import: ["": 20]>
    direct (float[1, {rate}] waveform) => (float[1, 1, {config.n_mels}, frames] features)
    <int64[4] ends = {{0, {before}, 0, {after}}}, int64[1] first = {{1}}, float offset = {{{config.log_offset}}}>
    {{ padded = Pad <mode = "reflect"> (waveform, ends)
       channel = Unsqueeze (padded, first)
       both = Conv <strides = [{config.hop_samples}]> (channel, basis)
       real, imaginary = Split <axis = 1, num_outputs = 2> (both)
       squares = Mul (real, real)
       others = Mul (imaginary, imaginary)
       power = Add (squares, others)
       bands = MatMul (filters, power)
       above = Add (bands, offset)
       logarithm = Log (above)
       features = Unsqueeze (logarithm, first) }}
    """
    return with_tensors(text, {"basis": basis[:, None].astype(np.float32), "filters": np.ascontiguousarray(mel.T)})


def with_tensors(text: str, tensors: dict[str, np.ndarray]) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(numpy_helper.from_array(tensor, name) for name, tensor in tensors.items())
    return proto


def shipped_graph(config: LogMelConfig, bands: bool) -> onnx.ModelProto:
    """What `export` writes; without bands, all filters over all bins."""
    plan = FrontEndPlan(config.model_dump(), config.sample_rate_hz)
    if not bands:
        vars(plan)["bands"] = [(0, *plan.mel.shape[:1], 0, plan.mel.shape[1])]
    function = front_end_function(plan, 0.0, 1.0, 20)
    taken = helper.make_tensor_value_info("waveform", onnx.TensorProto.FLOAT, [1, plan.clip_samples])
    made = helper.make_tensor_value_info("features", onnx.TensorProto.FLOAT, [1, 1, config.n_mels, plan.n_frames])
    stored = [numpy_helper.from_array(tensor, name) for name, tensor in plan.tensors.items()]
    call = helper.make_node(function.name, ["waveform", *plan.tensors], ["features"], domain=function.domain)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(function.domain, 1)]
    graph = helper.make_graph([call], "shipped", [taken], [made], stored)
    return helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10)


def measure(config: LogMelConfig, rounds: int) -> dict[str, dict[str, float]]:
    graphs = {
        STFT: stft_graph(config),
        DIRECT: direct_graph(config),
        DENSE: shipped_graph(config, bands=False),
        SHIPPED: shipped_graph(config, bands=True),
    }
    waveform = np.random.default_rng(0).normal(0, 0.1, (1, config.sample_rate_hz)).astype(np.float32)
    wanted = features(waveform[0], config.model_dump())
    sessions, rows = {}, {}
    for name, proto in graphs.items():
        content = proto.SerializeToString()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        begin = time.perf_counter()
        sessions[name] = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        load = time.perf_counter() - begin
        error = float(np.abs(sessions[name].run(None, {"waveform": waveform})[0][0, 0] - wanted).max())
        if error > 1e-3:
            raise SystemExit(f"{name}: differs from the front-end of training by {error:.2g}")
        rows[name] = {"file_bytes": len(content), "load_ms": 1e3 * load, "largest_error": error}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for names in ([name for name in sessions if name != DIRECT], [DIRECT]):
        for _ in range(rounds):
            for name in names:
                begin = time.thread_time()
                sessions[name].run(None, {"waveform": waveform})
                times[name].append(1e3 * (time.thread_time() - begin))
    for name, row in rows.items():
        row |= {"median_ms": statistics.median(times[name]), "fastest_ms": min(times[name])}
    for row in rows.values():
        row["median_share_of_stft"] = row["median_ms"] / rows[STFT]["median_ms"]
        row["fastest_share_of_stft"] = row["fastest_ms"] / rows[STFT]["fastest_ms"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    found = {}
    for case, config in CASES.items():
        found[case] = measure(config, arguments.rounds)
        for name, row in found[case].items():
            share, size = row["fastest_share_of_stft"], row["file_bytes"]
            print(f"{case:32} {name:28} {row['median_ms']:7.2f} ms  fastest {row['fastest_ms']:6.2f} ms  ", end="")
            print(f"{share:5.2f} of STFT  {size:>11,} bytes  error {row['largest_error']:.0e}")
    report = {"machine": machine(), "threads": 1, "rounds": arguments.rounds, "one_second": found}
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
