"""A teacher's depth in ONNX: few nodes a block, the functions shared, equal to torch; narrow, so that it is quick."""

import onnx
import torch
from exported import LABELS, SPEC, liven, metadata

from aum_compress.export.onnx_writer import export_onnx
from aum_compress.export.verify import Reference, verify_onnx
from aum_compress.models.config import BlockConfig, PatchStem
from aum_compress.models.factory import build_model
from aum_compress.models.presets import aum

DEPTH = 24


def test_24_blocks_of_both_types_are_small_in_nodes_and_verified(tmp_path):
    blocks = tuple(BlockConfig(d_inner=16, d_state=4, dt_rank=1, block_type=kind) for kind in ("v1", "v2"))
    config = aum(8, SPEC.front_end.n_mels, SPEC.feature_shape[2], len(LABELS)).model_copy(
        update={
            "blocks": blocks * (DEPTH // 2),
            "stem": PatchStem(patch_mels=8, patch_frames=4, stride_mels=8, stride_frames=4),
        }
    )
    torch.manual_seed(0)
    model, path = liven(build_model(config)), tmp_path / "teacher.onnx"
    export_onnx(model, path, metadata("fp32"))
    proto = onnx.load(path)
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.count("Block1") == kinds.count("Block2") == DEPTH // 2
    assert len(kinds) <= DEPTH + 40
    functions = {function.name: [node.op_type for node in function.node] for function in proto.functions}
    assert functions.keys() == {"Block1", "Block2", "SelectiveScanBiBi", "SelectiveScanFoBi"}
    assert functions["Block1"].count("SelectiveScanFoBi") == functions["Block2"].count("SelectiveScanBiBi") == 1
    assert max(map(len, functions.values())) <= 90
    verification = verify_onnx(path, Reference(model, LABELS, SPEC))
    assert verification.passed, "\n".join(verification.lines())
