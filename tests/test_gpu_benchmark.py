"""The GPU benchmark's refusals, its search and its rows on the CPU; the memory that is computed without a GPU."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from aum_compress.kernels import build, cuda
from aum_compress.models.presets import aum

TINY = ["--device", "cpu", "--tiny", "--seconds", "0"]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    import gpu_training

    return gpu_training


@pytest.fixture
def memory(benchmark):
    import training_memory

    return training_memory


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [([], "no CUDA device found"), (["--tiny"], "no CUDA device found"), (["--device", "cpu"], "add --tiny")],
)
def test_refuses_what_cannot_be_measured(benchmark, monkeypatch, capsys, arguments, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        benchmark.main(arguments)
    assert end.value.code == 2
    assert reason in capsys.readouterr().err


def test_without_mamba_ssm_only_the_loop_is_measured(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "scans", lambda u, A: False)
    with FakeTensorMode(), pytest.raises(SystemExit) as end:
        benchmark.main([])
    assert end.value.code == 2
    assert "--routes loop" in capsys.readouterr().err


def test_tiny_run_writes_every_combination(benchmark, tmp_path):
    benchmark.main([*TINY, "--out", str(tmp_path / "found.json")])
    report = json.loads((tmp_path / "found.json").read_text())
    assert report["machine"]["torch"] == torch.__version__
    assert (report["precision"], report["memory_gb"], report["clips_a_step"]) == ("bf16-mixed", 16.0, 4)
    rows = {(row["model"], row["route"], row["checkpointing"]): row for row in report["rows"]}
    assert len(rows) == len(report["rows"]) == 8
    assert all(row["micro_batch"] == 4 and row["clips_per_second"] > 0 for row in rows.values())
    for (model, route, checkpointing), row in rows.items():
        if checkpointing:
            assert row["peak_bytes"] < rows[model, route, False]["peak_bytes"]
    ratios = [row["times_faster"] for row in report["kernels_against_loop"]]
    wanted = [
        rows[model, "kernels", checkpointing]["clips_per_second"]
        / rows[model, "loop", checkpointing]["clips_per_second"]
        for model in ("tiny v1", "tiny v2")
        for checkpointing in (False, True)
    ]
    assert ratios == wanted


def test_no_clip_fits_is_told(benchmark, tmp_path):
    arguments = [*TINY, "--memory-gb", "1e-6", "--routes", "kernels", "--out", str(tmp_path / "found.json")]
    benchmark.main(arguments)
    report = json.loads((tmp_path / "found.json").read_text())
    assert {(row["micro_batch"], row["clips_per_second"]) for row in report["rows"]} == {(0, None)}
    assert report["kernels_against_loop"] == []


@pytest.mark.parametrize(
    ("limit", "most", "wanted"),
    [(89, 64, (4, 50)), (90, 64, (8, 90)), (1000, 64, (8, 90)), (1000, 4, (4, 50)), (19, 64, (0, 0))],
)
def test_largest_micro_batch(benchmark, limit, most, wanted):
    asked = []

    def peak(micro_batch: int) -> int:
        asked.append(micro_batch)
        if micro_batch > 8:
            raise torch.OutOfMemoryError
        return 10 + 10 * micro_batch

    assert benchmark.largest_micro_batch(peak, limit, most) == wanted
    assert asked == [2**n for n in range(len(asked))]


def test_loop_keeps_the_kernels_out_and_gives_them_back(benchmark):
    before = (cuda.scans, cuda.convolves, build.library)
    with benchmark.route("loop"):
        x = torch.ones(1, 1, 1)
        assert not cuda.scans(x, x)
        assert build.library() is None
    assert (cuda.scans, cuda.convolves, build.library) == before


def test_live_bytes_counts_what_is_alive(memory):
    before = torch.ones(100)
    with memory.LiveBytes() as live:
        first = torch.ones(1000)
        assert live.held == 4000
        view = first[10:].view(-1)
        before.add_(1)
        del first
        assert live.held == 4000
        second = view * 2
        assert live.held == 4000 + 3960
        del view, second
        assert (live.held, live.peak) == (0, 7960)


@pytest.mark.parametrize("block_type", ["v1", "v2"])
def test_computed_memory_is_what_a_cpu_step_takes(memory, block_type):
    if build.library() is None:
        pytest.skip("no C compiler: the loop takes memory that is not computed")
    config = aum(64, 64, 512, 10, block_type, depth=4)
    computed, uncounted = [], []
    for checkpointing in (False, True):
        step = memory.computed_step(config, 1, checkpointing=checkpointing, as_on_gpu=False)
        computed.append(step["peak_bytes"])
        uncounted.append(memory.measured_step(config, checkpointing=checkpointing) - step["peak_bytes"])
    assert 0 <= min(uncounted) <= max(uncounted) < 0.15 * computed[0]
    # the kernel's scratch is all that is not counted, and is the same with and without checkpointing
    assert max(uncounted) - min(uncounted) < 0.01 * computed[1]


def test_checkpointing_keeps_what_enters_each_block(memory):
    batch, depth = 3, 5
    shallow, deep = (aum(32, 64, 64, 10, "v1", depth=n) for n in (1, depth))
    kept = [
        memory.computed_step(config, batch, checkpointing=True, as_on_gpu=True)["kept_bytes"]
        for config in (shallow, deep)
    ]
    residual_stream = batch * deep.n_tokens * deep.d_model * 4
    assert kept[1] - kept[0] == (depth - 1) * residual_stream


def test_half_precision_keeps_less(memory):
    config = aum(64, 64, 256, 10, "v1", depth=2)
    single, half = (memory.computed_step(config, 8, checkpointing=False, as_on_gpu=gpu) for gpu in (False, True))
    # of two routes: in float32 both directions of a scan share what they keep
    assert half["kept_bytes"] < 0.85 * single["kept_bytes"]
    parameters = sum(p.numel() for p in memory.AudioMamba(config).parameters())
    assert half["state_bytes"] == single["state_bytes"] == 16 * parameters


def test_largest_computed_micro_batch_is_within_the_limit(memory):
    config = aum(64, 64, 256, 10, "v1", depth=2)
    steps = [memory.computed_step(config, n, checkpointing=False, as_on_gpu=True) for n in (1, 2, 4, 8)]
    totals = [step["state_bytes"] + step["peak_bytes"] for step in steps]
    row = memory.computed_row(config, totals[2], 8, checkpointing=False)
    assert row["bytes_by_micro_batch"] == dict(zip((1, 2, 4, 8), totals))
    assert (row["state_bytes"], row["largest_micro_batch"]) == (steps[0]["state_bytes"], 4)
    assert memory.computed_row(config, totals[0] - 1, 2, checkpointing=False)["largest_micro_batch"] == 0


def test_stand_in_keeps_what_causal_conv1d_keeps(memory):
    kept = []
    with FakeTensorMode():
        x = torch.empty(2, 5, 8, requires_grad=True)
        weight, bias = (torch.empty(shape, requires_grad=True) for shape in ((8, 4), (8,)))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
            y = memory.CausalConvolution.apply(x.transpose(1, 2), weight, bias)
        F.silu(y).sum().backward()
    assert y.shape == (2, 8, 5)
    assert kept[:3] == [(2, 8, 5), (8, 4), (8,)]
    assert (x.grad.shape, weight.grad.shape, bias.grad.shape) == (x.shape, weight.shape, bias.shape)
