"""What `bench` says about files; how fast they are is no test's matter."""

import json
from pathlib import Path

import onnx
import pytest
from exported import written
from tiny_recipe import command

from aum_compress.benching import bench, bench_lines
from aum_compress.errors import AumError, ModelFileError
from aum_compress.export import timing
from aum_compress.export.ort_format import write_ort
from aum_compress.export.runtime import open_session
from aum_compress.export.timing import Spread, interleaved, node_times, random_feeds


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {precision: written(folder, precision) for precision in ("fp32", "int8")}


def test_two_files_in_one_run(files):
    result = command("bench", str(files["int8"]), "--against", str(files["fp32"]), "--rounds", "5", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [record["name"] for record in found["models"]] == ["model-int8.onnx", "model-fp32.onnx"]
    assert found["against"] == "model-fp32.onnx"
    assert set(found["ratios"]["model-int8.onnx"]) == {"1", "all"}
    for record in found["models"]:
        assert record["file_bytes"] == files[record["name"][6:10]].stat().st_size
        assert record["inputs"] == {"features": [1, 1, 32, 17]}
        assert record["clip_seconds"] == 0.5
        assert record["load_ms"]["median"] > 0
        assert record["peak_memory_bytes"] > record["peak_memory_of_model_bytes"] >= 0
        assert sum(node["share"] for node in record["nodes"]) == pytest.approx(1)
        one = record["threads"]["1"]
        assert 0 < one["ms"]["p10"] <= one["ms"]["median"] <= one["ms"]["p90"]
        assert one["real_time_factor"] == pytest.approx(one["ms"]["median"] / 500)
        assert one["processor_ms"]["median"] > 0
        assert record["threads"]["all"]["processor_ms"] is None
    text = "\n".join(bench_lines(found))
    assert "model-int8.onnx takes " in text
    assert "peak memory" in text


def test_a_batch_is_as_much_audio_as_it_has_clips(tmp_path):
    (record,) = bench(str(written(tmp_path, "fp32", dynamic_batch=True)), None, 3, {"batch": 4})["models"]
    assert record["inputs"] == {"features": [4, 1, 32, 17]}
    for threads in record["threads"].values():
        assert threads["real_time_factor"] == pytest.approx(threads["ms"]["median"] / 1000 / (4 * 0.5))


def test_a_size_that_no_input_leaves_open_is_refused(files, tmp_path):
    batch = written(tmp_path, "fp32", dynamic_batch=True)
    result = command("bench", str(batch), "--dim", "batch=2", "--dim", "nosuch=3", "--rounds", "3")
    assert result.exit_code == 2
    assert "--dim nosuch=3: no input leaves such a size open; open are: batch" in result.stderr
    with pytest.raises(AumError, match=r"--dim batch=2: no input leaves such a size open; open are: none"):
        bench(str(files["fp32"]), None, 3, {"batch": 2})


def test_a_file_in_the_format_of_onnxruntime_is_timed_beside_its_source(files, tmp_path):
    write_ort(files["int8"], tmp_path / "model-int8.ort")
    found = bench(str(tmp_path / "model-int8.ort"), str(files["int8"]), 3, {})
    ort, onnx_file = found["models"]
    assert (ort["name"], ort["clip_seconds"]) == ("model-int8.ort", 0.5)
    assert ort["inputs"] == onnx_file["inputs"]
    assert ort["peak_memory_bytes"] > 0
    assert sum(node["share"] for node in ort["nodes"]) == pytest.approx(1)


def test_a_file_against_itself_takes_as_long(files):
    found = bench(str(files["fp32"]), str(files["fp32"]), 5, {})
    assert found["against"] == "model-fp32.onnx (against)"
    assert len(found["models"]) == 2


def test_every_file_has_its_turn_in_every_round_and_begins_as_often(monkeypatch):
    order = []

    class Session:
        def __init__(self, name):
            self.name = name

        def run(self, _, feeds):
            order.append(self.name)

    sessions = {name: Session(name) for name in "abc"}
    monkeypatch.setattr(timing, "_WARM_RUNS", 0)
    wall, processor = interleaved(sessions, dict.fromkeys(sessions), 6)
    assert "".join(order) == "abcbcacab" * 2
    assert {len(times) for times in (*wall.values(), *processor.values())} == {6}


def test_the_time_of_a_body_is_not_counted_twice():
    def node(operator, start, duration):
        return {"args": {"op_name": operator}, "ts": start, "dur": duration}

    nodes = [node("Mul", 0, 5), node("Scan", 10, 50), node("Mul", 20, 10), node("Add", 40, 15), node("Relu", 70, 3)]
    own = {(event["args"]["op_name"], event["ts"]): duration for event, duration in timing._own_durations(nodes)}
    assert own == {("Mul", 0): 5, ("Scan", 10): 25, ("Mul", 20): 10, ("Add", 40): 15, ("Relu", 70): 3}


def test_nodes_are_counted_by_operator(files):
    feeds = random_feeds(open_session(files["fp32"]), "model.onnx")
    found = {node.operator: node for node in node_times(files["fp32"], feeds, 3)}
    assert found["Scan"].calls == 1
    assert found["Mul"].calls >= 2 * 9  # two directions in the body, nine steps
    assert all(node.milliseconds >= 0 for node in found.values())


def test_open_sizes_are_asked_for(tmp_path):
    path = tmp_path / "open.onnx"
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[batch, 3, width] x) => (float[batch, 3, width] y)
        { y = Relu (x) }"""
    onnx.save(onnx.parser.parse_model(text), path)
    assert random_feeds(open_session(path), "open.onnx", {"width": 7})["x"].shape == (1, 3, 7)
    with pytest.raises(ModelFileError, match=r"open\.onnx: input x: size 'width' is open: give it, --dim width=COUNT"):
        random_feeds(open_session(path), "open.onnx")
    result = command("bench", str(path), "--dim", "width=4", "--rounds", "3")
    assert result.exit_code == 0, result.stderr
    assert "x [1, 3, 4]" in result.stdout


def test_a_bundle_of_a_model_is_exported_first(tmp_path, monkeypatch):
    made = []

    def export(model, path, metadata, **options):
        made.append(path)
        path.write_bytes(written(tmp_path, "fp32").read_bytes())

    monkeypatch.setattr("aum_compress.export.onnx_writer.export_onnx", export)
    found = bench("cp-mobile", None, 3, {})
    assert found["models"][0]["name"] == "cp-mobile"
    assert not made[0].exists()
    assert "ratios" not in found


def test_what_cannot_be_timed_is_named(tmp_path):
    with pytest.raises(AumError, match=r"absent: no such bundle or ONNX file, and no preset.*cp-mobile"):
        bench("absent", None, 3, {})
    with pytest.raises(ModelFileError, match=r"absent\.onnx: an ONNX file was wanted"):
        bench(str(Path("absent.onnx")), None, 3, {})


def test_spread_is_of_the_middle():
    spread = Spread.of([float(number) for number in range(101)])
    assert (spread.median, spread.p10, spread.p90) == (50, 10, 90)
