"""ONNX files as they are met: weights outside, cut short, damaged; and their bytes against those of the bundle."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx_text import graph, ones

from aum_compress.budget.check_onnx import check_onnx
from aum_compress.budget.onnx_bytes import (
    FOLDED,
    FOLDED_BIAS,
    KEPT_WIDE,
    NARROWED,
    NEVER_READ,
    QUANTISED,
    SAME,
    SCALES,
    STRUCTURE,
    bundle_sizes,
    explain_bytes,
)
from aum_compress.budget.onnx_file import read_onnx
from aum_compress.budget.onnx_graph import measure_graph
from aum_compress.budget.records import Limits, enforce
from aum_compress.errors import AumError, BudgetExceeded, ModelFileError

TWO_LAYERS = """g (float[1,6] x) => (float[1,3] z) {
    y = MatMul (x, one_weight)  a = Relu (y)  z = MatMul (a, two_weight)
}"""


def two_layers() -> onnx.ModelProto:
    return graph(TWO_LAYERS, one_weight=ones(6, 5), two_weight=ones(5, 3))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    return two_layers().SerializeToString()


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_that_was_cut_short_is_refused(data, whole, tmp_path):
    path = tmp_path / "cut.onnx"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ModelFileError, match=r"cut\.onnx: "):
        check_onnx(path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_counted_or_refused_but_never_breaks(data, whole, tmp_path):
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.onnx"
    path.write_bytes(damaged)
    try:
        report = check_onnx(path)
    except AumError:
        return
    assert report.macs >= 0


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=400))
def test_random_bytes_are_refused(content, tmp_path):
    path = tmp_path / "random.onnx"
    path.write_bytes(content)
    with pytest.raises(AumError, match=r"random\.onnx: "):
        check_onnx(path)


def test_a_weight_that_is_shorter_than_its_shape_is_named(tmp_path):
    model = two_layers()
    model.graph.initializer[1].raw_data = model.graph.initializer[1].raw_data[:-30]
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match=r"two_weight: shape \[5, 3\] takes 60 bytes, found 30"):
        check_onnx(tmp_path / "m.onnx")


def test_a_node_that_reads_what_nothing_makes_is_named(tmp_path):
    model = two_layers()
    del model.graph.node[0]
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match="a reads 'y', which nothing before it makes"):
        check_onnx(tmp_path / "m.onnx")


def external(folder: Path, **entries: str) -> Path:
    """A file whose first weight lies in weights.bin; `entries` replaces what is said of its place."""
    model = two_layers()
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        entry.value = entries.get(entry.key, entry.value)
    path.write_bytes(model.SerializeToString())
    return path


def test_weights_outside_the_file_belong_to_its_bytes(tmp_path):
    path = external(tmp_path)
    report = check_onnx(path)
    assert report.param_bytes == 180
    assert report.file_bytes == path.stat().st_size + (tmp_path / "weights.bin").stat().st_size
    onnx.save(two_layers(), inside := tmp_path / "inside.onnx")
    assert check_onnx(inside).file_bytes == inside.stat().st_size


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "../weights.bin"}, r"one_weight: \.\./weights\.bin: outside the model's folder"),
        ({"location": "/etc/hostname"}, r"one_weight: /etc/hostname: outside the model's folder"),
        ({"location": "a/../../weights.bin"}, "outside the model's folder"),
        ({"location": "other.bin"}, r"one_weight: other\.bin: absent"),
        ({"location": ""}, "one_weight: no file named"),
        ({"length": "100"}, r"one_weight: weights\.bin: 100 bytes at 0, its shape \[6, 5\] takes 120"),
        ({"offset": "-4"}, "120 bytes at -4"),
        ({"offset": "some"}, "offset or length is not a number"),
        ({"offset": "100000"}, r"weights\.bin has [\d,]+ bytes, wanted at least 100,120"),
    ],
)
def test_weights_that_cannot_be_where_the_file_says_are_refused(entries, message, tmp_path):
    path = external(tmp_path / "inner", **entries)
    (tmp_path / "weights.bin").write_bytes(bytes(1000))
    with pytest.raises(ModelFileError, match=message):
        check_onnx(path)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    path = external(tmp_path / "inner")
    (tmp_path / "elsewhere.bin").write_bytes((tmp_path / "inner/weights.bin").read_bytes())
    (tmp_path / "inner/weights.bin").unlink()
    (tmp_path / "inner/weights.bin").symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(ModelFileError, match="outside the model's folder"):
        check_onnx(path)


def test_a_model_one_byte_over_names_its_largest_layers(tmp_path):
    onnx.save(two_layers(), tmp_path / "m.onnx")
    report = check_onnx(tmp_path / "m.onnx", Limits(max_param_bytes=180, max_macs=45))
    enforce(report)
    with pytest.raises(BudgetExceeded, match=r"180 bytes .*over by 1\); largest: one_weight 120, two_weight 60"):
        enforce(replace(report, limits=Limits(max_param_bytes=179)))
    with pytest.raises(BudgetExceeded, match=r"45 MACs .*over by 1\); largest: one_weight 30, two_weight 15"):
        enforce(replace(report, limits=Limits(max_macs=44)))


def test_a_large_file_is_followed_without_touching_its_weights():
    layers = 40
    nodes = "".join(f"e{n} = MatMul (x, w{n})\n" for n in range(layers))
    weight = np.zeros((1024, 512), np.float32)
    model = graph(f"g (float[4,1024] x) => (float[4,512] e0) {{ {nodes} }}", **{f"w{n}": weight for n in range(layers)})
    assert model.ByteSize() > 80_000_000
    started = time.process_time()
    found = measure_graph(model, "test.onnx")
    assert time.process_time() - started < 0.5
    assert sum(own.macs for own in found.operations.values()) == layers * 4 * 1024 * 512


BUNDLE = {
    "conv.weight": (6 * 4, "float32"),
    "norm.weight": (8, "float32"),
    "norm.bias": (8, "float32"),
    "norm.running_mean": (8, "float32"),
    "norm.running_var": (8, "float32"),
    "norm.num_batches_tracked": (8, "int64"),
    "a.weight": (20, "float16"),
    "b.weight": (40, "float32"),
    "c.weight": (40, "float32"),
    "c.bias": (8, "float32"),
}


def exported() -> onnx.ModelProto:
    """What an export may make of BUNDLE; only names, types and sizes matter here."""
    model = graph(
        """g (float[1,5] x, float[1,1,3] m) => (float[1,2] y, float[1,2] z, float[1,2] q, float[1,2,1] k) {
            k = Conv (m, conv_weight, conv_bias)
            y = MatMul (x, a_weight)
            half = Cast <to = 1> (b_weight)  z = MatMul (x, half)
            w = DequantizeLinear <axis = 1> (c_weight, c_weight_scale)  q = Gemm (x, w, c_bias)
            n = Shape (shape)
        }""",
        conv_weight=ones(2, 1, 3),
        conv_bias=ones(2),
        a_weight=ones(5, 2),
        b_weight=np.ones((5, 2), np.float16),
        c_weight=np.ones((5, 2), np.int8),
        c_weight_scale=ones(2),
        c_bias=ones(2),
        shape=np.array([1, 5]),
    )
    for tensor in model.graph.initializer:
        tensor.name = renamed(tensor.name)
    for node in model.graph.node:
        node.input[:] = [renamed(name) for name in node.input]
    return model


def renamed(name: str) -> str:
    head, _, rest = name.partition("_")
    return f"{head}.{rest}" if rest else name


def test_each_difference_of_bytes_has_its_reason():
    found = explain_bytes(exported(), BUNDLE)
    assert {row.name: (row.onnx_bytes, row.bundle_bytes, row.reason) for row in found.rows} == {
        "conv.weight": (24, 24, SAME),
        "norm.weight": (0, 8, FOLDED),
        "norm.bias": (0, 8, FOLDED),
        "norm.running_mean": (0, 8, FOLDED),
        "norm.running_var": (0, 8, FOLDED),
        "norm.num_batches_tracked": (0, 8, NEVER_READ),
        "conv.bias": (8, 0, FOLDED_BIAS),
        "a.weight": (40, 20, KEPT_WIDE),
        "b.weight": (20, 40, NARROWED),
        "c.weight": (10, 40, QUANTISED),
        "c.weight_scale": (8, 0, SCALES),
        "c.bias": (8, 8, SAME),
        "shape": (16, 0, STRUCTURE),
    }
    assert found.bundle_bytes == sum(size for size, _ in BUNDLE.values())
    assert found.onnx_bytes - found.bundle_bytes == sum(found.by_reason.values())
    assert found.summary.startswith("bytes follow from the bundle's tensors: 172; ")
    assert found.summary.endswith("; 134 in the file")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra.weight": (40, "float32")}, r"extra\.weight: absent in the file, 40 bytes float32 in the bundle"),
        ({"b.weight": (44, "float32")}, r"b\.weight: 20 bytes float16 in the file, 44 bytes float32 in the bundle"),
        ({"c.weight": (80, "int64")}, r"c\.weight: 10 bytes int8 in the file, 80 bytes int64"),
        ({"c.bias": None}, r"c\.bias: 8 bytes float32 in the file, 0 bytes \(absent\) in the bundle"),
        ({"norm.running_mean": None}, r"norm\.weight: absent in the file"),
    ],
)
def test_a_difference_without_a_reason_is_an_error(changes, message):
    stored = {name: entry for name, entry in (BUNDLE | changes).items() if entry is not None}
    if changes == {"c.bias": None}:  # without a folded norm, no bias comes from nowhere
        stored = {name: entry for name, entry in stored.items() if not name.startswith("norm")}
    with pytest.raises(AumError, match=message):
        explain_bytes(exported(), stored)


def test_a_file_can_be_explained_by_its_path_and_its_check_says_so(tmp_path):
    onnx.save(two_layers(), tmp_path / "m.onnx")
    stored = {"one_weight": (120, "float32"), "two_weight": (60, "float32")}
    assert explain_bytes(tmp_path / "m.onnx", stored).by_reason == {}
    report = check_onnx(tmp_path / "m.onnx", stored=stored)
    assert "bytes follow from the bundle's tensors: 180; 180 in the file" in report.notes
    with pytest.raises(AumError, match=r"m\.onnx: stored bytes do not follow(.|\n)*two_weight"):
        check_onnx(tmp_path / "m.onnx", stored={"one_weight": (120, "float32")})


def test_sizes_are_read_from_the_head_of_a_safetensors_file(tmp_path):
    from safetensors.numpy import save_file

    tensors = {"a": ones(3, 4), "b": np.ones(5, np.float16), "c": np.ones((2, 2), np.int8), "d": np.ones((), np.int64)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert bundle_sizes(tmp_path / "model.safetensors") == {
        "a": (48, "float32"),
        "b": (10, "float16"),
        "c": (4, "int8"),
        "d": (8, "int64"),
    }
    (tmp_path / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ModelFileError, match="cannot be read as safetensors"):
        bundle_sizes(tmp_path / "model.safetensors")


def test_reading_a_model_needs_no_weights_in_memory_twice(tmp_path):
    path = external(tmp_path)
    assert not any(tensor.raw_data for tensor in read_onnx(path).graph.initializer)
