"""Equal blocks stand once in a file, which computes, stores and costs what it did with each written out."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exported import CONFIG, LABELS, SPEC, liven, metadata
from onnx import helper

from aum_compress.budget.check_onnx import check_onnx
from aum_compress.compress.quantize import quantize
from aum_compress.export import onnx_writer
from aum_compress.export.onnx_blocks import outline_blocks
from aum_compress.export.onnx_writer import export_onnx, round_to_half
from aum_compress.export.runtime import open_session, run_session
from aum_compress.export.verify import Reference, verify_onnx
from aum_compress.models.config import BlockConfig, ConvBlockConfig, Mamba2BlockConfig
from aum_compress.models.factory import Model, build_model
from aum_compress.recipe_schema import QuantizeSection

V1 = BlockConfig(d_inner=16, d_state=4, dt_rank=1, block_type="v1")
V2 = V1.model_copy(update={"block_type": "v2"})
NARROW = V1.model_copy(update={"d_inner": 12})
MAMBA2 = Mamba2BlockConfig(d_inner=16, head_dim=4, d_state=4, two_way=True)
CONV = ConvBlockConfig(d_inner=16, d_conv=3)
BLOCKS = (V1, V2, NARROW, V1, MAMBA2, V2, CONV, V1, MAMBA2, CONV)


@pytest.fixture(scope="module")
def student() -> Model:
    """int8, with blocks of every mixer twice at least, and one whose widths no other has."""
    torch.manual_seed(0)
    rounded = round_to_half(liven(build_model(CONFIG.model_copy(update={"blocks": BLOCKS}))))
    heard = torch.randn(8, 1, CONFIG.n_mels, CONFIG.n_frames, generator=torch.Generator().manual_seed(1))
    return quantize(rounded, [heard], QuantizeSection())


@pytest.fixture(scope="module")
def files(student, tmp_path_factory) -> tuple[Path, Path]:
    """Its file, and the one in which every block is written out."""
    folder = tmp_path_factory.mktemp("blocks")
    outlined, written_out = folder / "outlined.onnx", folder / "written_out.onnx"

    def keep_and_outline(proto: onnx.ModelProto) -> None:  # an export takes as long as all else here
        onnx.save(proto, written_out)
        outline_blocks(proto)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(onnx_writer, "outline_blocks", keep_and_outline)
        export_onnx(student, outlined, metadata("int8"))
    return outlined, written_out


@pytest.mark.parametrize("optimise", [False, True])
def test_same_results_as_with_every_block_written_out(files, optimise):
    features = np.random.default_rng(0).standard_normal((1, 1, CONFIG.n_mels, CONFIG.n_frames), dtype=np.float32)
    found, wanted = (
        run_session(open_session(path, optimise=optimise, intra_op_num_threads=1), features) for path in files
    )
    np.testing.assert_array_equal(found, wanted)


def test_same_bytes_and_costs_as_with_every_block_written_out(files):
    found, wanted = map(check_onnx, files)
    assert (found.param_bytes, found.params, found.macs) == (wanted.param_bytes, wanted.params, wanted.macs)
    assert found.elementwise == wanted.elementwise
    macs = [{layer.name: layer.macs for layer in report.layers if layer.macs} for report in (found, wanted)]
    assert macs[0] == macs[1]


def test_the_file_is_verified(files, student):
    verification = verify_onnx(files[0], Reference(student, LABELS, SPEC))
    assert verification.passed, "\n".join(verification.lines())


def test_one_function_for_each_kind_and_one_node_for_each_block(files):
    proto = onnx.load(files[0])
    calls = {node.name: node for node in proto.graph.node if node.name.startswith("layers")}
    kinds = [calls[f"layers.{number}"].op_type if number != 2 else None for number in range(len(BLOCKS))]
    assert kinds == [
        *("Block1", "Block2", None, "Block1", "Block3", "Block2", "Block4", "Block1", "Block3", "Block4"),
    ]
    # what is not said of another block stays written out
    assert len([name for name in calls if name.startswith("layers.2")]) > 20
    first, second = (function for function in proto.functions if function.name in ("Block1", "Block2"))
    assert {"norm/Div", "mixer.in_proj/MatMul", "mixer/SelectiveScanFoBi"} <= {node.name for node in first.node}
    assert "mixer/SelectiveScanBiBi" in {node.name for node in second.node}
    place = list(first.input).index("mixer.in_proj.weight")
    assert calls["layers.3"].input[place] == "layers.3.mixer.in_proj.weight"
    names = [node.name for node in proto.graph.node if node.name]
    assert len(set(names)) == len(names)


def test_a_block_more_of_a_kind_takes_three_kilobytes_of_names(files):
    """Written out, a v2 block takes 9 kB beside its values."""
    proto = onnx.load(files[0])
    (call,) = (node for node in proto.graph.node if node.name == "layers.5")
    tensors = [tensor for tensor in proto.graph.initializer if tensor.name.startswith("layers.5.")]
    values = sum(len(tensor.raw_data) for tensor in tensors)
    assert call.ByteSize() + sum(tensor.ByteSize() for tensor in tensors) - values < 3_300


def small() -> onnx.ModelProto:
    """Two blocks alike: a product with weights of their own, negated."""
    nodes, read = [], "x"
    for block, made in (("layers.0", "b"), ("layers.1", "y")):
        nodes += [
            helper.make_node("Mul", [read, f"{block}.weight"], [f"{made}_product"], f"{block}/Mul"),
            helper.make_node("Neg", [f"{made}_product"], [made], f"{block}/Neg"),
        ]
        read = made
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]) for name in "xy")
    weights = [helper.make_tensor(f"layers.{n}.weight", onnx.TensorProto.FLOAT, [4], [n + 1, 2, 3, 4]) for n in (0, 1)]
    graph = helper.make_graph(nodes, "small", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_two_equal_blocks_become_calls():
    proto, before = small(), small()
    outline_blocks(proto)
    onnx.checker.check_model(proto, full_check=True)
    assert [(node.op_type, node.name) for node in proto.graph.node] == [("Block1", "layers.0"), ("Block1", "layers.1")]
    x = np.array([1, -2, 3, 0.5], dtype=np.float32)
    found, wanted = (onnx.reference.ReferenceEvaluator(m).run(None, {"x": x})[0] for m in (proto, before))
    np.testing.assert_array_equal(found, wanted)


def test_a_block_with_a_stranger_inside_is_left_alone():
    """What reads a block before its last node cannot stand before or behind the call."""
    proto = small()
    stranger = helper.make_node("Relu", ["b_product"], ["r"], "other/Relu")
    inside = helper.make_node("Add", ["b", "r"], ["b2"], "layers.0/Add")
    nodes = [*proto.graph.node[:2], stranger, inside, *proto.graph.node[2:]]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    nodes[4].input[0] = "b2"
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    onnx.checker.check_model(proto, full_check=True)
    before = proto.SerializeToString()
    outline_blocks(proto)
    assert proto.SerializeToString() == before


def test_what_is_outlined_stays_as_it_is():
    proto = small()
    outline_blocks(proto)
    again = onnx.ModelProto.FromString(proto.SerializeToString())
    outline_blocks(again)
    assert again == proto
